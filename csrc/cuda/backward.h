// The backward, without atomics: a kernel for the gradients of queries, then one for those of keys and values.
//
//     p = exp(scale s - lse), ds = p (dp - delta), delta = rowsum(dout * out)
//
// Source: Dao 2023, "FlashAttention-2".
#pragma once

#include "dropout.h"
#include "stream.h"

namespace luke_kernels::cuda {

constexpr float kLog2E = 1.44269504088896341f;

// Not timed on a GPU: what compiles without spills. kColumns keys at a time meet the rows of a block, kRows rows the keys.
template <DType T, int kHeadDim, bool kDropout>
struct BackwardConfig {
  static constexpr bool kFloat = T == DType::kFloat32, kWide = kHeadDim > 64;
  static constexpr int kWarps = 4;
  static constexpr int kTiles = 1;
  static constexpr int kColumns = kFloat && kWide ? 16 : kFloat || kWide ? 32 : 64;
  static constexpr int kRows = kFloat && kWide ? 16 : kFloat || kWide || kDropout ? 32 : 64;
};

// Writes the gradients of queries; and lse in base 2, negative, and delta of each row for the other kernel.
template <DType T, int kHeadDim, bool kDropout, bool kWarpgroups_ = false>
struct QueryGradient {
  using Config = BackwardConfig<T, kHeadDim, kDropout>;
  static constexpr bool kWarpgroups = kWarpgroups_, kHasWarpgroups = T != DType::kFloat32;
  static constexpr int kTiles = Config::kTiles, kColumns = Config::kColumns;
  static constexpr int kThreads = Config::kWarps * 32;
  static constexpr int kRows = Config::kWarps * kTiles * 16;
  using Factor = Rows<T, kTiles, kHeadDim, kRows, !Config::kWide>;
  using Keys = Stream<T, kHeadDim, kColumns, kThreads, kWarpgroups>;
  static constexpr int kRowBytes = Tile<T, kHeadDim, kRows>::kBytes;
  static constexpr int kSharedBytes = 2 * kRowBytes + Keys::kBytes;

  const Arguments& args;
  Program program;
  MixedRows rows;
  Factor queries, dout;
  float dq[kTiles][kHeadDim / 8][4];
  float minus_lse[kTiles][2], delta[kTiles][2];

  LUKE_DEVICE explicit QueryGradient(const Arguments& args)
      : args(args),
        program(args),
        rows{Place(args.op.segments[kWord], program.sequence), Place(args.op.segments[kEntity], program.sequence),
             program.block * kRows} {}

  LUKE_DEVICE int first_row() const { return warp() * 16 * kTiles; }
  LUKE_DEVICE int row(int m, int half) const { return first_row() + 16 * m + 8 * half + lane() / 4; }
  LUKE_DEVICE int64_t token(int i) const { return rows.token(i) + args.op.joint_begin(rows.kind(i)); }

  LUKE_DEVICE void copy(Shared tile, const Buffer& words, const Buffer& entities, int64_t slot) {
    copy_rows<T, kHeadDim, kRows, kThreads>(tile, args.chunks, words.data, [&](int i) {
      return rows.exists(i) ? rows.in(words, entities, i, slot, program.head, kElementBytes<T>) : nullptr;
    });
  }

  LUKE_DEVICE void run() {
    if (rows.start >= rows.length()) return;
    const AttentionParams& op = args.op;
    const Shared memory = shared_memory();
    Keys keys;
    keys.memory = memory + 2 * kRowBytes;
    keys.chunks = args.chunks;
    keys.sources[kWord] = keys_and_values<Keys, T>(op, rows.words, kWord, program.head);
    keys.sources[kEntity] = keys_and_values<Keys, T>(op, rows.entities, kEntity, program.head);

    copy(memory, op.dout[kWord], op.dout[kEntity], 0);
    copy_rows<T, kHeadDim, kRows, kThreads>(memory + kRowBytes, args.chunks, op.out.data, [&](int i) {
      return rows.exists(i) ? address(op.out.data, token(i) * op.out.token_stride + program.head * op.out.head_stride,
                                      kElementBytes<T>)
                            : nullptr;
    });
    commit_copies();
    wait_copies<0>();
    synchronize();
    dout.load(memory, first_row());
    {
      Factor out;
      out.load(memory + kRowBytes, first_row());
      dout.dot(out, delta);
    }
    add_up_rows(delta);
    synchronize();
    read_statistics();

    // dout stays in its tile where it is not in registers; the queries take that of out.
    const Shared query_tile = memory + kRowBytes;
    copy(query_tile, op.projections[kWord], op.projections[kEntity], op.query_slot(kWord));
    keys.copy_next();
    clear(dq);
    for (int kind = 0; kind < kKinds; ++kind) {
      const int length = keys.length(kind);
      LUKE_LOOP
      for (int start = 0; start < length; start += kColumns) {
        const auto block = keys.advance();
        if (start == 0) load_queries(query_tile, static_cast<Kind>(kind));
        if (start + kColumns <= length) {
          gather<kColumns / 8, false>(block, static_cast<Kind>(kind), start, length);
        } else if (start + kColumns / 2 < length) {
          gather<kColumns / 8, true>(block, static_cast<Kind>(kind), start, length);
        } else {
          gather<kColumns / 16, true>(block, static_cast<Kind>(kind), start, length);
        }
      }
      if (kind == kEntity || op.stack == 4) {
        store(op.query_slot(static_cast<Kind>(kind)));
        clear(dq);
      }
    }
  }

  LUKE_DEVICE void load_queries(Shared tile, Kind kind) {
    if (kind == kEntity) {
      copy(tile, args.op.projections[kWord], args.op.projections[kEntity], args.op.query_slot(kEntity));
      commit_copies();
      wait_copies<0>();
      synchronize();
    }
    queries.load(tile, first_row());
  }

  LUKE_DEVICE void read_statistics() {
    const AttentionParams& op = args.op;
    const int64_t num_tokens = op.segments[kWord].num_tokens + op.segments[kEntity].num_tokens;
    const float* lse = static_cast<const float*>(op.lse.data) + program.head * op.lse.head_stride;
    LUKE_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      LUKE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int i = row(m, half);
        minus_lse[m][half] = -infinity();
        if (!rows.exists(i)) continue;
        minus_lse[m][half] = -kLog2E * lse[token(i) * op.lse.token_stride];
        if (lane() % 4 == 0) {
          float* statistics = op.statistics + program.head * num_tokens + token(i);
          statistics[0] = minus_lse[m][half];
          statistics[op.num_heads * num_tokens] = delta[m][half];
        }
      }
    }
  }

  template <int kN, bool kTail>
  LUKE_DEVICE void gather(const typename Keys::Block& block, Kind kind, int start, int length) {
    float p[kTiles][kN][4], ds[kTiles][kN][4];
    clear(p);
    multiply_by_rows<T, kHeadDim, kColumns, kWarpgroups>(p, queries, block.first);
    clear(ds);
    multiply_by_rows<T, kHeadDim, kColumns, kWarpgroups>(ds, dout, block.second);
    if constexpr (kDropout) {
      drop_columns<kTiles>(Draws(args, program), rows, row(0, 0), start, kind, ds, args.keep_scale);
    }
    LUKE_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      LUKE_UNROLL
      for (int n = 0; n < kN; ++n) {
        LUKE_UNROLL
        for (int i = 0; i < 4; ++i) {
          float log_p = fused_multiply_add(p[m][n][i], args.factor, minus_lse[m][i / 2]);
          // An absent key scores 0, which overflows where all true scores are far below.
          if (kTail && start + lane_column(n, i % 2) >= length) log_p = -infinity();
          ds[m][n][i] = exp2_of(log_p) * (ds[m][n][i] - delta[m][i / 2]);
        }
      }
    }
    multiply_by_columns<T, kHeadDim, kColumns, kWarpgroups>(dq, ds, block.first);
  }

  LUKE_DEVICE void store(int64_t slot) {
    const AttentionParams& op = args.op;
    LUKE_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      LUKE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int i = row(m, half);
        if (!rows.exists(i)) continue;
        const char* to = rows.in(op.dprojections[kWord], op.dprojections[kEntity], i, slot, program.head, kElementBytes<T>);
        store_row<T>(const_cast<char*>(to), op.head_dim, dq[m], half, args.scale);
      }
    }
  }
};

// Writes the gradients of keys and values. A block of threads has keys of one kind, which meet one query of each row:
// scores are computed transposed, the keys as rows.
template <DType T, int kHeadDim, bool kDropout, bool kWarpgroups_ = false>
struct KeyGradient {
  using Config = BackwardConfig<T, kHeadDim, kDropout>;
  static constexpr bool kWarpgroups = kWarpgroups_, kHasWarpgroups = T != DType::kFloat32;
  static constexpr int kTiles = Config::kTiles, kRows = Config::kRows;
  static constexpr int kThreads = Config::kWarps * 32;
  static constexpr int kColumns = Config::kWarps * kTiles * 16;
  using Factor = Rows<T, kTiles, kHeadDim, kColumns, !Config::kWide>;
  using Queries = Stream<T, kHeadDim, kRows, kThreads, kWarpgroups, true>;  // with gradients of out
  static constexpr int kKeyBytes = Tile<T, kHeadDim, kColumns>::kBytes;
  static constexpr int kSharedBytes = 2 * kKeyBytes + Queries::kBytes;

  const Arguments& args;
  Program program;
  Place words, entities;
  Kind kind;
  int start;
  Factor keys, values;
  float dk[kTiles][kHeadDim / 8][4], dv[kTiles][kHeadDim / 8][4];

  LUKE_DEVICE explicit KeyGradient(const Arguments& args)
      : args(args),
        program(args),
        words(args.op.segments[kWord], program.sequence),
        entities(args.op.segments[kEntity], program.sequence) {
    const int word_blocks = static_cast<int>(blocks_of(args.op.segments[kWord].max_length, kColumns));
    kind = program.block < word_blocks ? kWord : kEntity;
    start = (program.block - (kind == kWord ? 0 : word_blocks)) * kColumns;
  }

  LUKE_DEVICE Place place(Kind which) const { return which == kWord ? words : entities; }
  LUKE_DEVICE int first_column() const { return warp() * 16 * kTiles; }

  LUKE_DEVICE void run() {
    if (start >= place(kind).length) return;
    const AttentionParams& op = args.op;
    const Shared memory = shared_memory();
    Queries queries;
    queries.memory = memory + 2 * kKeyBytes;
    queries.chunks = args.chunks;
    queries.sources[kWord] = queries_and_douts(kWord);
    queries.sources[kEntity] = queries_and_douts(kEntity);
    const auto own = keys_and_values<Queries, T>(op, place(kind), kind, program.head);
    LUKE_UNROLL
    for (int which = 0; which < 2; ++which) {
      const char* from = own.matrices[which];
      copy_rows<T, kHeadDim, kColumns, kThreads>(memory + which * kKeyBytes, args.chunks, from, [&](int i) {
        return start + i < own.length ? from + (start + i) * own.strides[which] : nullptr;
      });
    }
    queries.copy_next();
    clear(dk);
    clear(dv);
    bool loaded = false;
    for (int row_kind = 0; row_kind < kKinds; ++row_kind) {
      const int length = queries.length(row_kind);
      LUKE_LOOP
      for (int row = 0; row < length; row += kRows) {
        const auto block = queries.advance();
        if (!loaded) {
          keys.load(memory, first_column());
          values.load(memory + kKeyBytes, first_column());
          loaded = true;
        }
        if (row + kRows / 2 < length) {
          gather<kRows / 8>(block, static_cast<Kind>(row_kind), row);
        } else {
          gather<kRows / 16>(block, static_cast<Kind>(row_kind), row);
        }
      }
    }
    store();
  }

  LUKE_DEVICE typename Queries::Source queries_and_douts(Kind row_kind) const {
    const AttentionParams& op = args.op;
    const Buffer &q = op.projections[row_kind], &dout = op.dout[row_kind];
    const Place rows = place(row_kind);
    const int64_t num_tokens = op.segments[kWord].num_tokens + op.segments[kEntity].num_tokens;
    return {{address(q.data, rows.offset * q.token_stride + op.query_slot(kind) * q.slot_stride + program.head * q.head_stride,
                     kElementBytes<T>),
             address(dout.data, rows.offset * dout.token_stride + program.head * dout.head_stride, kElementBytes<T>)},
            {q.token_stride * kElementBytes<T>, dout.token_stride * kElementBytes<T>},
            rows.length,
            op.statistics + program.head * num_tokens + op.joint_begin(row_kind) + rows.offset,
            op.num_heads * num_tokens};
  }

  // Adds what the first 8 kN rows of a block give. Rows that do not exist are zeros, and so is what they give.
  template <int kN>
  LUKE_DEVICE void gather(const typename Queries::Block& block, Kind row_kind, int row) {
    float p[kTiles][kN][4], ds[kTiles][kN][4];
    clear(p);
    multiply_by_rows<T, kHeadDim, kRows, kWarpgroups>(p, keys, block.first);
    clear(ds);
    multiply_by_rows<T, kHeadDim, kRows, kWarpgroups>(ds, values, block.second);
    uint32_t kept[kTiles][kN];
    if constexpr (kDropout) {
      draw_rows(Draws(args, program), start + first_column(), kind, row, row_kind, kept);
    }
    LUKE_UNROLL
    for (int n = 0; n < kN; ++n) {
      const Pair minus_lse = load_pair(block.statistics + 4 * lane_column(n, 0));
      const Pair delta = load_pair(block.statistics + 4 * (kRows + lane_column(n, 0)));
      LUKE_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        LUKE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float each = exp2_of(fused_multiply_add(p[m][n][i], args.factor, minus_lse.f[i % 2]));
          if constexpr (kDropout) {
            const bool keep = kept[m][n] >> i & 1;
            ds[m][n][i] = each * ((keep ? ds[m][n][i] * args.keep_scale : 0) - delta.f[i % 2]);
            p[m][n][i] = keep ? each : 0;
          } else {
            ds[m][n][i] = each * (ds[m][n][i] - delta.f[i % 2]);
            p[m][n][i] = each;
          }
        }
      }
    }
    multiply_by_columns<T, kHeadDim, kRows, kWarpgroups>(dv, p, block.second);
    multiply_by_columns<T, kHeadDim, kRows, kWarpgroups>(dk, ds, block.first);
  }

  LUKE_DEVICE void store() {
    const AttentionParams& op = args.op;
    const Buffer& gradient = op.dprojections[kind];
    LUKE_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      LUKE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int column = start + first_column() + 16 * m + 8 * half + lane() / 4;
        if (column >= place(kind).length) continue;
        const int64_t first = (place(kind).offset + column) * gradient.token_stride + program.head * gradient.head_stride;
        char* to = const_cast<char*>(address(gradient.data, first, kElementBytes<T>));
        store_row<T>(to + op.key_slot() * gradient.slot_stride * kElementBytes<T>, op.head_dim, dk[m], half, args.scale);
        store_row<T>(to + op.value_slot() * gradient.slot_stride * kElementBytes<T>, op.head_dim, dv[m], half,
                     args.keep_scale);
      }
    }
  }
};

}  // namespace luke_kernels::cuda
