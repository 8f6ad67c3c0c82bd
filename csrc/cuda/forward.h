// The forward: flash attention whose loop over keys has two segments, words and entities, each with its own query.
//
// A block of threads has a block of rows, each warp 16 kTiles of them. Source: Dao 2023, "FlashAttention-2".
#pragma once

#include "dropout.h"
#include "stream.h"

namespace luke_kernels::cuda {

// Not timed on a GPU: what compiles without spills. Draws of dropout need registers of their own.
template <DType T, int kHeadDim, bool kDropout, bool kWarpgroups>
struct ForwardConfig {
  static constexpr bool kFloat = T == DType::kFloat32, kWide = kHeadDim > 64;
  static constexpr int kWarps = 4;
  static constexpr int kTiles = kFloat || kWide || kDropout || kWarpgroups ? 1 : 2;
  static constexpr int kColumns = kFloat && kWide ? 16 : kFloat || (kWide && kDropout) ? 32 : 64;
};

template <DType T, int kHeadDim, bool kDropout, bool kWarpgroups_ = false>
struct Forward {
  using Config = ForwardConfig<T, kHeadDim, kDropout, kWarpgroups_>;
  static constexpr bool kWarpgroups = kWarpgroups_, kHasWarpgroups = T != DType::kFloat32;
  static constexpr int kTiles = Config::kTiles, kColumns = Config::kColumns;
  static constexpr int kThreads = Config::kWarps * 32;
  static constexpr int kRows = Config::kWarps * kTiles * 16;
  using Queries = Rows<T, kTiles, kHeadDim, kRows>;
  using Keys = Stream<T, kHeadDim, kColumns, kThreads, kWarpgroups>;
  static constexpr int kQueryBytes = Tile<T, kHeadDim, kRows>::kBytes;
  // Queries that were taken to registers leave their place to the next.
  static constexpr int kQueryTiles = Queries::kInRegisters ? 1 : 2;
  static constexpr int kSharedBytes = kQueryTiles * kQueryBytes + Keys::kBytes;

  const Arguments& args;
  Program program;
  MixedRows rows;
  Queries queries;
  float out[kTiles][kHeadDim / 8][4];
  float row_max[kTiles][2], row_sum[kTiles][2];  // the sum of this lane's columns

  LUKE_DEVICE explicit Forward(const Arguments& args)
      : args(args),
        program(args),
        rows{Place(args.op.segments[kWord], program.sequence), Place(args.op.segments[kEntity], program.sequence),
             program.block * kRows} {}

  LUKE_DEVICE int row(int m, int half) const { return warp() * 16 * kTiles + 16 * m + 8 * half + lane() / 4; }

  LUKE_DEVICE void copy_queries(Shared tile, int64_t slot) {
    const AttentionParams& op = args.op;
    copy_rows<T, kHeadDim, kRows, kThreads>(tile, args.chunks, op.projections[kWord].data, [&](int i) {
      return rows.exists(i) ? rows.in(op.projections[kWord], op.projections[kEntity], i, slot, program.head,
                                      kElementBytes<T>)
                            : nullptr;
    });
  }

  LUKE_DEVICE void run() {
    if (rows.start >= rows.length()) return;
    const AttentionParams& op = args.op;
    const Shared memory = shared_memory(), second_queries = memory + (kQueryTiles - 1) * kQueryBytes;
    Keys keys;
    keys.memory = memory + kQueryTiles * kQueryBytes;
    keys.chunks = args.chunks;
    keys.sources[kWord] = keys_and_values<Keys, T>(op, rows.words, kWord, program.head);
    keys.sources[kEntity] = keys_and_values<Keys, T>(op, rows.entities, kEntity, program.head);
    clear(out);
    LUKE_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      row_max[m][0] = row_max[m][1] = -infinity();
      row_sum[m][0] = row_sum[m][1] = 0;
    }

    copy_queries(memory, op.query_slot(kWord));
    commit_copies();
    if constexpr (Queries::kInRegisters) {
      wait_copies<0>();
      synchronize();
      queries.load(memory, row(0, 0) - lane() / 4);
      synchronize();
    } else {
      queries.load(memory, row(0, 0) - lane() / 4);
    }
    copy_queries(second_queries, op.query_slot(kEntity));
    keys.copy_next();
    for (int kind = 0; kind < kKinds; ++kind) {
      const int length = keys.length(kind);
      LUKE_LOOP
      for (int start = 0; start < length; start += kColumns) {
        const auto block = keys.advance();
        if (kind == kEntity && start == 0) queries.load(second_queries, row(0, 0) - lane() / 4);
        if (start + kColumns <= length) {
          attend<kColumns / 8, false>(block, static_cast<Kind>(kind), start, length);
        } else if (start + kColumns / 2 < length) {
          attend<kColumns / 8, true>(block, static_cast<Kind>(kind), start, length);
        } else {
          attend<kColumns / 16, true>(block, static_cast<Kind>(kind), start, length);
        }
      }
    }
    finish();
  }

  // Takes in the first 8 kN columns of a block of keys, of which those from `length` on do not exist.
  template <int kN, bool kTail>
  LUKE_DEVICE void attend(const typename Keys::Block& block, Kind kind, int start, int length) {
    float scores[kTiles][kN][4];
    clear(scores);
    multiply_by_rows<T, kHeadDim, kColumns, kWarpgroups>(scores, queries, block.first);
    if (args.scale < 0) {
      // The largest score is found before scaling.
      LUKE_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        LUKE_UNROLL
        for (int n = 0; n < kN; ++n) {
          LUKE_UNROLL
          for (int i = 0; i < 4; ++i) scores[m][n][i] = -scores[m][n][i];
        }
      }
    }
    if constexpr (kTail) {
      LUKE_UNROLL
      for (int n = 0; n < kN; ++n) {
        LUKE_UNROLL
        for (int column = 0; column < 2; ++column) {
          if (start + lane_column(n, column) >= length) {
            LUKE_UNROLL
            for (int m = 0; m < kTiles; ++m) scores[m][n][column] = scores[m][n][2 + column] = -infinity();
          }
        }
      }
    }
    LUKE_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      LUKE_UNROLL
      for (int half = 0; half < 2; ++half) {
        float largest = scores[m][0][2 * half];
        LUKE_UNROLL
        for (int n = 0; n < kN; ++n) {
          largest = larger(largest, larger(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        }
        largest = larger(largest, exchange(largest, 1));
        largest = larger(largest, exchange(largest, 2));
        largest = larger(row_max[m][half], largest * args.factor);
        // Scores may all be -inf so far.
        const float shift = largest == -infinity() ? 0 : largest;
        const float rescale = exp2_of(row_max[m][half] - shift);
        row_max[m][half] = largest;
        float sum = 0;
        LUKE_UNROLL
        for (int n = 0; n < kN; ++n) {
          LUKE_UNROLL
          for (int column = 0; column < 2; ++column) {
            float& score = scores[m][n][2 * half + column];
            score = exp2_of(fused_multiply_add(score, args.factor, -shift));
            sum += score;
          }
        }
        row_sum[m][half] = fused_multiply_add(row_sum[m][half], rescale, sum);
        LUKE_UNROLL
        for (int n = 0; n < kHeadDim / 8; ++n) {
          out[m][n][2 * half] *= rescale;
          out[m][n][2 * half + 1] *= rescale;
        }
      }
    }
    if constexpr (kDropout) drop_columns<kTiles>(Draws(args, program), rows, row(0, 0), start, kind, scores, 1.0f);
    multiply_by_columns<T, kHeadDim, kColumns, kWarpgroups>(out, scores, block.second);
  }

  LUKE_DEVICE void finish() {
    const AttentionParams& op = args.op;
    add_up_rows(row_sum);
    LUKE_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      LUKE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int i = row(m, half);
        if (!rows.exists(i)) continue;
        const int64_t token = rows.token(i) + op.joint_begin(rows.kind(i));
        const int64_t first = token * op.out.token_stride + program.head * op.out.head_stride;
        store_row<T>(const_cast<char*>(address(op.out.data, first, kElementBytes<T>)), op.head_dim, out[m], half,
                     args.keep_scale / row_sum[m][half]);
        if (lane() % 4 == 0) {
          constexpr float kLn2 = 0.693147180559945309f;
          float* lse = static_cast<float*>(op.lse.data);
          lse[program.head * op.lse.head_stride + token * op.lse.token_stride] =
              (row_max[m][half] + log2_of(row_sum[m][half])) * kLn2;
        }
      }
    }
  }
};

}  // namespace luke_kernels::cuda
