// Forward: flash attention whose loop over keys has two segments, each with its own query (ops/README.md).
//
// A block of queries meets a block of keys at a time: scores for all its rows panel by panel, while the panel of keys
// lies in the first cache; then, some rows at a time, probabilities and their product with the values.
#pragma once

#include "blocks.h"
#include "draws.h"

namespace luke_kernels::LUKE_ISA {

template <class M, typename In>
class Forward {
  using Word = typename M::Word;
  using Item = typename M::Item;
  using Scalar = typename M::Scalar;
  using Vector = typename M::Vector;
  static constexpr int64_t kLanes = M::kLanes;
  static constexpr int64_t kQueries = 96;       // a block: a multiple of the rows of every tile
  static constexpr int64_t kGroup = M::kTiled ? 32 : 12;  // rows whose probabilities stay in the first cache
  static constexpr int64_t kMaxRows = 1536;     // for which keys are packed once

 public:
  // Takes its memory from `memory`; the same for every head of as many numbers.
  Forward(int64_t head_dim, Memory& memory)
      : head_dim_(head_dim),
        depth_((head_dim + M::kDepth - 1) / M::kDepth),
        width_(round_up(head_dim, kLanes)),
        capacity_(key_capacity<M>(head_dim)),
        pitch_(capacity_ + kLanes),  // not a power of two: rows fall into different sets of a cache
        keys_(memory.take<Word>(capacity_ * depth_)),
        values_(memory.take<Word>(capacity_ / M::kDepth * width_)),
        scores_(memory.take<Scalar>(kQueries * pitch_)),
        maxima_(memory.take<Scalar>(kQueries * kLanes)),
        draws_(memory.take<int32_t>(capacity_ + 4 * kCounters)),
        out_(memory.take<Scalar>(kMaxRows * width_)),
        shift_(memory.take<Scalar>(kMaxRows)),
        sums_(memory.take<Scalar>((kMaxRows + kLanes) * kLanes)),
        weights_(memory.take<Scalar>((kMaxRows + kLanes) * kLanes)),
        queries_(memory.take<Word>(kQueries * padded_words<M>(head_dim))) {}

  void run(const Part& part, const Part* next) {
    for (int64_t begin = part.rows.begin; begin < part.rows.end; begin += kMaxRows) {
      const int64_t end = smaller(begin + kMaxRows, part.rows.end);
      const Part rest = {part.head, {end, part.rows.end}};
      run_slice(part.head, {begin, end}, end < part.rows.end ? &rest : next);
    }
  }

 private:
  void run_slice(const Head& head, Span rows, const Part* next) {
    const int64_t count = rows.end - rows.begin;
    // The running maximum is taken before scaling, which holds for positive factors: queries take the sign; and a
    // scale of zero, which would turn the -inf of absent keys into NaN, becomes a tiny one.
    const double magnitude = head.scale < 0 ? -head.scale : head.scale;
    scale_ = magnitude < 1e-30 ? 1e-30 : magnitude;
    factor_ = static_cast<Scalar>(scale_ * 1.4426950408889634);
    for (int64_t i = 0; i < count * width_; i += kLanes) M::store(out_ + i, M::zero());
    for (int64_t i = 0; i < count * kLanes; i += kLanes) {
      M::store(sums_ + i, M::zero());
      M::store(weights_ + i, M::zero());
    }
    for (int64_t i = 0; i < round_up(count, kLanes); ++i) shift_[i] = -INFINITY;

    const Part again = {head, rows};
    KeyBlocks<M> blocks(head, capacity_, all_rows(head));
    for (bool more = blocks.next(); more;) {
      pack_keys(head, blocks);
      KeyBlocks<M> following = blocks;
      more = following.next();
      if (!more && next) {
        following = KeyBlocks<M>(next->head, capacity_, all_rows(next->head));
        following.next();
      }
      for (int64_t begin = 0; begin < count; begin += kQueries) {
        const Span block = {rows.begin + begin, rows.begin + smaller(begin + kQueries, count)};
        look_ahead(head, rows, block, blocks, more ? &again : next, following, !more);
        score(head, blocks, block);
        weigh(head, blocks, block, begin);
        if (!more) finish(head, block, begin);
      }
      blocks = following;
    }
  }

  // Chooses what is fetched during a block of queries: those after it, its share of the keys that are packed next, and
  // where its output goes, if that is written now.
  void look_ahead(const Head& head, Span rows, Span block, const KeyBlocks<M>& blocks, const Part* next,
                  const KeyBlocks<M>& keys, bool writes) {
    ahead_.clear();
    const auto add_queries = [&](const Head& of, int64_t begin, int64_t end) {
      for_each_kind(of, {begin, smaller(begin + kQueries, end)},
                    [&](const Tokens& tokens, int64_t, int64_t rank, int64_t n, int64_t) {
                      for (const Matrix& queries : tokens.queries) {
                        ahead_.add<In>(queries, {rank, rank + n}, head_dim_);
                      }
                    });
    };
    if (block.end < rows.end) {
      add_queries(head, block.end, rows.end);
    } else if (next) {
      add_queries(next->head, next->rows.begin, next->rows.end);
    }
    if (next) {
      const int64_t shares = (rows.end - rows.begin + kQueries - 1) / kQueries;
      const int64_t share = (block.begin - rows.begin) / kQueries;
      for (int64_t kind = 0; kind < 2; ++kind) {
        const int64_t begin = keys.ranks[kind].begin, size = keys.ranks[kind].end - begin;
        const Span part = {begin + size * share / shares, begin + size * (share + 1) / shares};
        ahead_.add<In>(next->head.tokens[kind].keys, part, head_dim_);
        ahead_.add<In>(next->head.tokens[kind].values, part, head_dim_);
      }
    }
    if (writes) {
      for_each_kind(head, block, [&](const Tokens& tokens, int64_t, int64_t rank, int64_t n, int64_t) {
        ahead_.add<In>(tokens.out, {rank, rank + n}, head_dim_);
      });
    }
    // A few with every tile of scores, and with the probabilities of every row.
    const int64_t count = block.end - block.begin;
    int64_t steps = count;
    for (int64_t p = 0; p < blocks.num_panels; ++p) {
      const int64_t tile_rows = rows_of_tile<M>((blocks.panels[p].count + kLanes - 1) / kLanes);
      steps += (count + tile_rows - 1) / tile_rows;
    }
    ahead_.spread(steps);
  }

  void pack_keys(const Head& head, const KeyBlocks<M>& blocks) {
    for (int64_t p = 0; p < blocks.num_panels; ++p) {
      const KeyPanel& panel = blocks.panels[p];
      const Tokens& tokens = head.tokens[panel.kind];
      const int64_t padded = round_up(panel.count, kLanes);
      pack_columns<M, In>(tokens.keys, panel.rank, panel.count, head_dim_, keys_ + p * kPanel<M> * depth_, kPanel<M>);
      // A panel of columns after the other, each with all keys.
      for (int64_t d = 0; d < width_; d += kPanel<M>) {
        const int64_t columns = smaller(kPanel<M>, width_ - d);
        pack_depths<M, In>(tokens.values, panel.rank, panel.count, padded, d, smaller(columns, head_dim_ - d),
                           values_ + capacity_ / M::kDepth * d + panel.slot / M::kDepth * columns, columns);
      }
    }
  }

  // Scores of a block of queries, and the maxima of their lanes.
  void score(const Head& head, const KeyBlocks<M>& blocks, Span block) {
    const int64_t count = block.end - block.begin;
    for (int64_t i = 0; i < round_up(count, kLanes); ++i) M::store(maxima_ + i * kLanes, M::broadcast(-INFINITY));
    int64_t packed = -1;
    for (int64_t p = 0; p < blocks.num_panels; ++p) {
      const KeyPanel& panel = blocks.panels[p];
      for_each_kind(head, block, [&](const Tokens& tokens, int64_t, int64_t rank, int64_t n, int64_t place) {
        const Matrix& queries = tokens.queries[panel.kind];
        const Word* const keys = keys_ + p * kPanel<M> * depth_;
        if (are_words(queries, head.scale)) {
          const Word* const words = reinterpret_cast<const Word*>(row_of<In>(queries, rank));
          return score_panel(panel, words, queries.stride / M::kDepth, n, keys, place);
        }
        const int64_t stride = padded_words<M>(head_dim_);
        if (packed != panel.kind) {
          pack_rows<M, In>(queries, rank, n, head_dim_, queries_ + place * stride, stride);
          if (head.scale < 0) M::negate(queries_ + place * stride, n * stride);
        }
        score_panel(panel, queries_ + place * stride, stride, n, keys, place);
      });
      packed = panel.kind;
    }
  }

  // Whether rows are operand A as they lie.
  bool are_words(const Matrix& queries, double scale) const {
    return std::is_same_v<In, Item> && scale >= 0 && head_dim_ % M::kDepth == 0 && queries.stride % M::kDepth == 0 &&
           reinterpret_cast<uintptr_t>(queries.data) % sizeof(Word) == 0;
  }

  // Scores of `count` queries, which lie at `place` in their block, with a panel of keys.
  void score_panel(const KeyPanel& panel, const Word* queries, int64_t stride, int64_t count, const Word* keys,
                   int64_t place) {
    const int64_t vectors = (panel.count + kLanes - 1) / kLanes, exist = panel.count - (vectors - 1) * kLanes;
    const int64_t pitch = pitch_;
    Scalar* const scores = scores_ + place * pitch + panel.slot;
    Scalar* const maxima = maxima_ + place * kLanes;
    Ahead* const ahead = &ahead_;
    product_of_vectors<M>(
        vectors, count, depth_, queries, stride, keys, kPanel<M>,
        [=](int64_t row, auto& sums) __attribute__((always_inline)) {
          constexpr int kRows = sizeof sums / sizeof sums[0], kVectors = sizeof sums[0] / sizeof(Vector);
          ahead->advance();
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            Scalar* to = scores + (row + r) * pitch;
            Vector maximum = M::load(maxima + (row + r) * kLanes);
            sums[r][kVectors - 1] = M::first(exist, sums[r][kVectors - 1], M::broadcast(-INFINITY));
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
              M::store(to + v * kLanes, sums[r][v]);
              maximum = M::max(maximum, sums[r][v]);
            }
            M::store(maxima + (row + r) * kLanes, maximum);
          }
        });
  }

  // Probabilities, and their products with the values.
  void weigh(const Head& head, const KeyBlocks<M>& blocks, Span block, int64_t state) {
    const int64_t count = block.end - block.begin;
    Scalar rescale[kQueries], maximum[kQueries];
    reduce_lanes<M>(maxima_, count, maximum, [](Vector a, Vector b) __attribute__((always_inline)) {
      return M::max(a, b);
    });
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vector before = M::load(shift_ + state + i);
      Vector shift = M::max(before, M::load(maximum + i));
      M::store(shift_ + state + i, shift);
      // Scores may all be -inf so far.
      shift = shift == M::broadcast(-INFINITY) ? M::zero() : shift;
      M::store(maximum + i, shift);
      M::store(rescale + i, exp2<kFineDegree>((before - shift) * factor_));
    }
    for (int64_t i = 0; i < count; i += kGroup) {
      const int64_t rows = smaller(kGroup, count - i);
      for (int64_t r = i; r < i + rows; ++r) {
        Scalar* row = scores_ + r * pitch_;
        Scalar *sum = sums_ + (state + r) * kLanes, *weight = weights_ + (state + r) * kLanes;
        Totals totals = {M::load(sum) * rescale[r], M::load(weight) * rescale[r]};
        ahead_.advance();
        if (head.dropout.p > 0) {
          draw_row(head, blocks, block.begin + r);
          exponentiate<true>(row, blocks.slots, maximum[r], totals);
        } else {
          exponentiate<false>(row, blocks.slots, maximum[r], totals);
        }
        M::store(sum, totals.sum);
        M::store(weight, totals.weight);
      }
      for (int64_t d = 0; d < width_; d += kPanel<M>) {
        const int64_t columns = smaller(kPanel<M>, width_ - d), width = width_;
        Scalar* const out = out_ + (state + i) * width_ + d;
        const Scalar* const factors = rescale + i;
        product_of_vectors<M>(
            columns / kLanes, rows, blocks.slots / M::kDepth, reinterpret_cast<const Word*>(scores_ + i * pitch_),
            pitch_, values_ + capacity_ / M::kDepth * d, columns,
            [=](int64_t row, auto& sums) __attribute__((always_inline)) {
              constexpr int kRows = sizeof sums / sizeof sums[0], kVectors = sizeof sums[0] / sizeof(Vector);
#pragma GCC unroll 16
              for (int r = 0; r < kRows; ++r) {
                Scalar* to = out + (row + r) * width;
                const Vector factor = M::broadcast(factors[row + r]);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                  M::store(to + v * kLanes, M::load(to + v * kLanes) * factor + sums[r][v]);
                }
              }
            });
      }
    }
  }

  // What a row's probabilities add up to, exactly and as they weigh the values: rounded.
  struct Totals {
    Vector sum;
    Vector weight;
  };

  // Turns scores into items of operand A, in place.
  template <bool kDropout>
  LUKE_INLINE void exponentiate(Scalar* row, int64_t slots, Scalar shift, Totals& totals) {
    // Not score * factor - shift, which without fused multiply-adds rounds large scores once more.
    const Vector maximum = M::broadcast(shift), factor = M::broadcast(factor_);
    const int32_t threshold = threshold_;
    Item* items = reinterpret_cast<Item*>(row);
    Vector sum = totals.sum, weight = totals.weight;
    for (int64_t slot = 0; slot < slots; slot += 2 * kLanes) {
      Vector a = exp2<M::kDegree>((M::load(row + slot) - maximum) * factor), b = M::zero();
      const bool both = slot + kLanes < slots;
      if (both) b = exp2<M::kDegree>((M::load(row + slot + kLanes) - maximum) * factor);
      sum += a + b;
      if constexpr (M::kDepth == 2) weight = M::add_items(weight, a, b);
      if (kDropout) {
        a = M::kept(a, draws_ + slot, threshold);
        if (both) b = M::kept(b, draws_ + slot + kLanes, threshold);
      }
      M::store_items(items + slot, a, b);
    }
    totals = {sum, M::kDepth == 2 ? weight : sum};
  }

  void draw_row(const Head& head, const KeyBlocks<M>& blocks, int64_t row) {
    const int64_t kind = row >= head.tokens[0].size, rank = row - kind * head.tokens[0].size;
    threshold_ = draw_threshold(head.dropout);
    for (int64_t p = 0; p < blocks.num_panels; ++p) {
      const KeyPanel& panel = blocks.panels[p];
      draw_columns(head.dropout, kind, panel.kind, rank, panel.rank, panel.count, draws_ + panel.slot);
    }
  }

  void finish(const Head& head, Span block, int64_t state) {
    const int64_t count = block.end - block.begin;
    Scalar sum[kQueries], weight[kQueries];
    const auto add = [](Vector a, Vector b) __attribute__((always_inline)) { return a + b; };
    reduce_lanes<M>(sums_ + state * kLanes, count, sum, add);
    reduce_lanes<M>(weights_ + state * kLanes, count, weight, add);
    const Scalar kept = static_cast<Scalar>(1 / (1 - head.dropout.p));
    for_each_kind(head, block, [&](const Tokens& tokens, int64_t, int64_t rank, int64_t n, int64_t place) {
      Scalar* lse = static_cast<Scalar*>(tokens.lse) + rank;
      const Scalar* shift = shift_ + state;
      for (int64_t i = 0; i < n; ++i) {
        lse[i] = static_cast<Scalar>(shift[place + i] * scale_ + std::log(sum[place + i]));
        const Vector factor = M::broadcast(kept / weight[place + i]);
        const Scalar* from = out_ + (state + place + i) * width_;
        In* to = row_of_output<In>(tokens.out, rank + i);
        for (int64_t d = 0; d < width_; d += kLanes) {
          narrow_first<M>(M::load(from + d) * factor, to + d, head_dim_ - d);
        }
      }
    });
  }

  const int64_t head_dim_, depth_, width_, capacity_, pitch_;
  Word* const keys_;      // panel by panel
  Word* const values_;    // panel of columns by panel of columns
  Scalar* const scores_;  // (kQueries, pitch); then probabilities, as items
  Scalar* const maxima_;
  int32_t* const draws_;
  Scalar* const out_;
  Scalar* const shift_;  // the maxima, before scaling
  Scalar* const sums_;
  Scalar* const weights_;
  Word* const queries_;  // a block's, towards one kind of keys
  Ahead ahead_;
  double scale_ = 0;
  Scalar factor_ = 0;  // of scores, to base 2
  int32_t threshold_ = 0;
};

}  // namespace luke_kernels::LUKE_ISA
