// Backward: probabilities recomputed from lse, one block of keys after the other, so that each product of scores serves
// the gradients of queries, keys and values.
//
// Everything is transposed: keys are the rows of P^T and dS^T, queries their columns. So both are operand A, as they
// lie, of dV = P^T dO and dK = dS^T Q; and dS^T is operand B of dQ^T = K^T dS^T.
#pragma once

#include "blocks.h"
#include "draws.h"

namespace luke_kernels::LUKE_ISA {

template <class M, typename In>
class Backward {
  using Word = typename M::Word;
  using Item = typename M::Item;
  using Scalar = typename M::Scalar;
  using Vector = typename M::Vector;
  static constexpr int64_t kLanes = M::kLanes;
  static constexpr int64_t kQueries = 128;  // a block: a multiple of kPanel
  static constexpr int64_t kGroup = M::kTiled ? 32 : 24;  // keys whose probabilities stay in the first cache

 public:
  // Takes its memory from `memory`, for heads of up to `rows` rows.
  Backward(int64_t head_dim, int64_t rows, Memory& memory)
      : head_dim_(head_dim),
        depth_((head_dim + M::kDepth - 1) / M::kDepth),
        stride_(padded_words<M>(head_dim)),
        width_(round_up(head_dim, kLanes)),
        capacity_(backward_capacity(head_dim)),
        pitch_(kQueries + kLanes),
        keys_(memory.take<Word>(capacity_ * stride_)),
        values_(memory.take<Word>(capacity_ * stride_)),
        keys_t_(memory.take<Word>(width_ * key_words())),
        dkeys_(memory.take<Scalar>(capacity_ * width_)),
        dvalues_(memory.take<Scalar>(capacity_ * width_)),
        queries_t_(memory.take<Word>(kQueries * depth_)),
        dout_t_(memory.take<Word>(kQueries * depth_)),
        queries_(memory.take<Word>(kQueries / M::kDepth * width_)),
        dout_(memory.take<Word>(kQueries / M::kDepth * width_)),
        probabilities_(memory.take<Scalar>((kGroup + 1) * pitch_)),
        differences_(memory.take<Scalar>((kGroup + 1) * pitch_)),
        draws_(memory.take<int32_t>((kGroup + 5) * pitch_)),
        differences_b_(memory.take<Word>(capacity_ / M::kDepth * kQueries)),
        lse_(memory.take<Scalar>(padded_rows(rows))),
        delta_(memory.take<Scalar>(padded_rows(rows))) {
    for (Scalar*& dqueries : dqueries_) dqueries = memory.take<Scalar>(padded_rows(rows) * width_);
  }

  // The gradients of `keys`, and of their values, from all rows; or those of the queries of `rows`, from all keys; or
  // all. The sums, and so the results, are the same however keys and rows are divided.
  void run(const Head& head, Span keys, Span rows, Gradients gradients) {
    const double magnitude = head.scale < 0 ? -head.scale : head.scale;
    scale_ = static_cast<Scalar>(magnitude < 1e-30 ? 1e-30 : magnitude);
    factor_ = static_cast<Scalar>(scale_ * 1.4426950408889634);
    kept_ = static_cast<Scalar>(1 / (1 - head.dropout.p));
    threshold_ = draw_threshold(head.dropout);
    gradients_ = gradients;
    prepare(head, rows);

    KeyBlocks<M> blocks(head, capacity_, keys);
    bool more = blocks.next();
    const bool first_is_last = !KeyBlocks<M>(blocks).next();
    for (bool first = true; more; first = false) {
      KeyBlocks<M> following = blocks;
      more = following.next();
      pack_keys(head, blocks);
      int64_t begin = 0;
      for_each_query_block(head, rows, [&](const QueryBlock& block) {
        Scalar* dqueries[2];
        for (int kind = 0; kind < 2; ++kind) {
          dqueries[kind] = dqueries_[head.shared_query ? 0 : kind] + (first_is_last ? 0 : begin * width_);
        }
        if (first && gradients_.queries) {
          for (Scalar* gradient : dqueries) fill_zero(gradient, kQueries * width_);
        }
        meet(head, blocks, block, begin, dqueries);
        if (gradients_.queries) {
          for (int kind = 0; kind < 2; ++kind) {
            const bool ends = head.shared_query ? kind == 0 && !more : ends_kind(head, blocks, kind, first);
            if (ends) store_queries(head, block, kind, dqueries[kind]);
          }
        }
        begin += kQueries;
      });
      if (gradients_.keys) store_keys(head, blocks);
      blocks = following;
    }
  }

 private:
  // Columns of P^T and dS^T: queries of one kind.
  struct QueryBlock {
    int64_t kind;
    int64_t rank;
    int64_t count;
  };

  static int64_t backward_capacity(int64_t head_dim) {
    const int64_t keys = (M::kDepth == 2 ? 36864 : 24576) / round_up(head_dim, kLanes);
    return round_up(keys < 192 ? 192 : keys > 768 ? 768 : keys, kPanel<M>) + 2 * kPanel<M>;
  }
  // Each kind may end with a block that is not full.
  static int64_t padded_rows(int64_t rows) { return round_up(rows, kQueries) + kQueries; }
  int64_t key_words() const { return (capacity_ + kLanes) / M::kDepth; }

  static LUKE_INLINE void fill_zero(Scalar* to, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) M::store(to + i, M::zero());
  }

  template <class F>
  LUKE_INLINE void for_each_query_block(const Head& head, Span rows, const F& f) {
    for_each_kind(head, rows, [&](const Tokens&, int64_t kind, int64_t rank, int64_t count, int64_t) {
      for (int64_t i = 0; i < count; i += kQueries) f(QueryBlock{kind, rank + i, smaller(kQueries, count - i)});
    });
  }

  // Whether the gradient of the queries towards a kind of keys is whole after these. A kind without keys gives zero.
  static bool ends_kind(const Head& head, const KeyBlocks<M>& blocks, int kind, bool first) {
    const int64_t size = head.tokens[kind].size;
    return size == 0 ? first : blocks.ranks[kind].end == size;
  }

  // lse in units of scores, and delta = dout . out, block by block of queries: what the softmax subtracts from the
  // gradient of each probability of a row. Absent queries have probability zero.
  void prepare(const Head& head, Span rows) {
    // Columns that do not exist are computed too.
    fill_zero(probabilities_, (kGroup + 1) * pitch_);
    fill_zero(differences_, (kGroup + 1) * pitch_);
    int64_t begin = 0;
    for_each_query_block(head, rows, [&](const QueryBlock& block) {
      const Tokens& tokens = head.tokens[block.kind];
      const Scalar* lse = static_cast<const Scalar*>(tokens.lse) + block.rank;
      for (int64_t i = 0; i < kQueries; ++i) lse_[begin + i] = i < block.count ? lse[i] / scale_ : Scalar(INFINITY);
      for (int64_t i = 0; i < kQueries; i += kLanes) {
        Scalar lanes[kLanes * kLanes];
        for (int64_t j = 0; j < kLanes; ++j) {
          Vector sum = M::zero();
          if (i + j < block.count) {
            const In* dout = row_of<In>(tokens.dout, block.rank + i + j);
            const In* out = row_of<In>(tokens.out, block.rank + i + j);
            for (int64_t d = 0; d < head_dim_; d += kLanes) {
              sum += widen_first<M>(dout + d, head_dim_ - d) * widen_first<M>(out + d, head_dim_ - d);
            }
          }
          M::store(lanes + j * kLanes, sum);
        }
        reduce_lanes<M>(lanes, kLanes, delta_ + begin + i,
                        [](Vector a, Vector b) __attribute__((always_inline)) { return a + b; });
      }
      begin += kQueries;
    });
  }

  // Calls f(tokens, kind, rank, count, place) for the words and the entities of a block of keys, which lie from `place`
  // on among its rows.
  template <class F>
  LUKE_INLINE void for_each_key_kind(const Head& head, const KeyBlocks<M>& blocks, const F& f) {
    int64_t place = 0;
    for (int kind = 0; kind < 2; ++kind) {
      const Span span = blocks.ranks[kind];
      const int64_t count = span.end - span.begin;
      if (count > 0) f(head.tokens[kind], kind, span.begin, count, place);
      place += round_up(count, kLanes);
    }
  }

  void pack_keys(const Head& head, const KeyBlocks<M>& blocks) {
    for_each_key_kind(head, blocks, [&](const Tokens& tokens, int, int64_t rank, int64_t count, int64_t place) {
      pack_rows<M, In>(tokens.keys, rank, count, head_dim_, keys_ + place * stride_, stride_);
      pack_rows<M, In>(tokens.values, rank, count, head_dim_, values_ + place * stride_, stride_);
      if (gradients_.queries) {
        pack_transposed<M, In>(tokens.keys, rank, count, head_dim_, keys_t_ + place / M::kDepth, key_words());
      }
      fill_zero(dkeys_ + place * width_, count * width_);
      fill_zero(dvalues_ + place * width_, count * width_);
    });
  }

  // A block of queries and a block of keys.
  void meet(const Head& head, const KeyBlocks<M>& blocks, const QueryBlock& block, int64_t begin,
            Scalar* const (&dqueries)[2]) {
    const int64_t slots = round_up(block.count, kLanes);
    const Tokens& rows = head.tokens[block.kind];
    pack_block_columns(rows.dout, block, dout_t_);
    if (gradients_.keys) pack_block_depths(rows.dout, block, dout_);
    for_each_key_kind(head, blocks, [&](const Tokens&, int kind, int64_t rank, int64_t count, int64_t place) {
      pack_block_columns(rows.queries[kind], block, queries_t_);
      if (head.scale < 0) M::negate(queries_t_, kQueries * depth_);
      if (gradients_.keys) pack_block_depths(rows.queries[kind], block, queries_);
      for (int64_t i = 0; i < count; i += kGroup) {
        const int64_t keys = smaller(kGroup, count - i), row = place + i;
        multiply(slots, keys, keys_ + row * stride_, queries_t_, probabilities_);
        multiply(slots, keys, values_ + row * stride_, dout_t_, differences_);
        Word* const differences_b = differences_b_ + row / M::kDepth * kPanel<M>;
        if (head.dropout.p > 0) {
          const int32_t* draws = draw(head, block, kind, rank + i, keys);
          differentiate<true>(keys, slots, lse_ + begin, delta_ + begin, draws, differences_b);
        } else {
          differentiate<false>(keys, slots, lse_ + begin, delta_ + begin, nullptr, differences_b);
        }
        if (gradients_.keys) {
          add_product(slots, keys, probabilities_, dout_, dvalues_ + row * width_);
          add_product(slots, keys, differences_, queries_, dkeys_ + row * width_);
        }
      }
      if (gradients_.queries) add_to_queries(slots, place, count, dqueries[kind]);
    });
  }

  // Draws of (keys, queries), in lines of `pitch_`. Keys are drawn four at a time, from a multiple of four on.
  const int32_t* draw(const Head& head, const QueryBlock& block, int64_t kind, int64_t rank, int64_t keys) {
    const int64_t before = rank % 4;
    for (int64_t i = 0; i < before + keys; i += 4) {
      draw_rows(head.dropout, block.kind, kind, block.rank, block.count, rank - before + i, draws_ + i * pitch_, pitch_);
    }
    return draws_ + before * pitch_;
  }

  void pack_block_columns(const Matrix& from, const QueryBlock& block, Word* to) {
    for (int64_t i = 0; i < block.count; i += kPanel<M>) {
      pack_columns<M, In>(from, block.rank + i, smaller(kPanel<M>, block.count - i), head_dim_, to + i * depth_,
                          kPanel<M>);
    }
  }

  // Panels of columns, as the values of the forward.
  void pack_block_depths(const Matrix& from, const QueryBlock& block, Word* to) {
    for (int64_t d = 0; d < width_; d += kPanel<M>) {
      const int64_t columns = smaller(kPanel<M>, width_ - d);
      pack_depths<M, In>(from, block.rank, block.count, round_up(block.count, kLanes), d,
                         smaller(columns, head_dim_ - d), to + kQueries / M::kDepth * d, columns);
    }
  }

  // (keys, slots) = rows of keys times columns of queries.
  void multiply(int64_t slots, int64_t keys, const Word* a, const Word* b, Scalar* to) {
    const int64_t pitch = pitch_;
    for (int64_t i = 0; i < slots; i += kPanel<M>) {
      product_of_vectors<M>(smaller(kPanel<M>, slots - i) / kLanes, keys, depth_, a, stride_, b + i * depth_, kPanel<M>,
                            [=](int64_t row, auto& sums) __attribute__((always_inline)) {
                              store_sums<M>(sums, to + row * pitch + i, pitch);
                            });
    }
  }

  // Turns scores into probabilities, and gradients of probabilities into gradients of scores, in place: as items of
  // operand A. The latter also go to `differences_b`, as operand B. Columns from `slots` on may be written, and mean
  // nothing; so do rows of operand A from `keys` on.
  template <bool kDropout>
  LUKE_INLINE void differentiate(int64_t keys, int64_t slots, const Scalar* lse, const Scalar* delta,
                                 const int32_t* draws, Word* differences_b) {
    const Vector factor = M::broadcast(factor_), kept = M::broadcast(kept_);
    const int32_t threshold = threshold_;
    const int64_t panel_words = capacity_ / M::kDepth * kPanel<M>, pitch = pitch_;
    Scalar* const probabilities = probabilities_;
    Scalar* const differences = differences_;
    for (int64_t key = 0; key < keys; key += M::kDepth) {
      const bool alone = key + 1 == keys;
      for (int64_t slot = 0; slot < slots; slot += 2 * kLanes) {
        Vector pairs[2][M::kDepth];
#pragma GCC unroll 2
        for (int k = 0; k < M::kDepth; ++k) {
          const int64_t place = (key + k) * pitch + slot;
          Vector p[2], ds[2];
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            const int64_t at = place + v * kLanes, column = slot + v * kLanes;
            p[v] = exp2<M::kDegree>((M::load(probabilities + at) - M::load(lse + column)) * factor);
            Vector dp = M::load(differences + at);
            if (kDropout) dp = M::kept(dp * kept, draws + at, threshold);
            ds[v] = p[v] * (dp - M::load(delta + column));
            if (kDropout) p[v] = M::kept(p[v], draws + at, threshold);
            pairs[v][k] = ds[v];
          }
          M::store_items(reinterpret_cast<Item*>(probabilities + (key + k) * pitch) + slot, p[0], p[1]);
          M::store_items(reinterpret_cast<Item*>(differences + (key + k) * pitch) + slot, ds[0], ds[1]);
        }
        Word* to = differences_b + slot / kPanel<M> * panel_words + key / M::kDepth * kPanel<M> + slot % kPanel<M>;
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          if (M::kDepth == 2 && alone) pairs[v][M::kDepth - 1] = M::zero();
          M::store_depths(to + v * kLanes, pairs[v]);
        }
      }
    }
  }

  // to (keys, width) += rows of `items` (keys, slots) times depths of queries.
  void add_product(int64_t slots, int64_t keys, const Scalar* items, const Word* b, Scalar* to) {
    const int64_t width = width_;
    for (int64_t d = 0; d < width; d += kPanel<M>) {
      const int64_t columns = smaller(kPanel<M>, width - d);
      product_of_vectors<M>(columns / kLanes, keys, slots / M::kDepth, reinterpret_cast<const Word*>(items), pitch_,
                            b + kQueries / M::kDepth * d, columns,
                            [=](int64_t row, auto& sums) __attribute__((always_inline)) {
                              add_sums<M>(sums, to + row * width + d, width);
                            });
    }
  }

  // dQ^T += K^T dS^T: panel by panel of queries, (width, kPanel) each.
  void add_to_queries(int64_t slots, int64_t place, int64_t count, Scalar* dqueries) {
    for (int64_t i = 0; i < slots; i += kPanel<M>) {
      Scalar* const to = dqueries + i * width_;
      product_of_vectors<M>(smaller(kPanel<M>, slots - i) / kLanes, head_dim_, (count + M::kDepth - 1) / M::kDepth,
                            keys_t_ + place / M::kDepth, key_words(),
                            differences_b_ + (capacity_ * i + place * kPanel<M>) / M::kDepth, kPanel<M>,
                            [=](int64_t row, auto& sums) __attribute__((always_inline)) {
                              add_sums<M>(sums, to + row * kPanel<M>, kPanel<M>);
                            });
    }
  }

  void store_queries(const Head& head, const QueryBlock& block, int kind, const Scalar* dqueries) {
    const Matrix& to = head.tokens[block.kind].dqueries[kind];
    const Vector scale = M::broadcast(static_cast<Scalar>(head.scale));
    for (int64_t i = 0; i < block.count; i += kLanes) {
      const Scalar* panel = dqueries + i / kPanel<M> * kPanel<M> * width_ + i % kPanel<M>;
      for (int64_t d = 0; d < head_dim_; d += kLanes) {
        Vector v[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) v[j] = M::load(panel + (d + j) * kPanel<M>) * scale;
        transpose<M>(v);
        const int64_t count = smaller(kLanes, block.count - i);
        for (int64_t j = 0; j < count; ++j) {
          narrow_first<M>(v[j], row_of_output<In>(to, block.rank + i + j) + d, head_dim_ - d);
        }
      }
    }
  }

  void store_keys(const Head& head, const KeyBlocks<M>& blocks) {
    for_each_key_kind(head, blocks, [&](const Tokens& tokens, int, int64_t rank, int64_t count, int64_t place) {
      store_rows(dkeys_ + place * width_, static_cast<Scalar>(head.scale), tokens.dkeys, rank, count);
      store_rows(dvalues_ + place * width_, kept_, tokens.dvalues, rank, count);
    });
  }

  void store_rows(const Scalar* from, Scalar factor, const Matrix& to, int64_t rank, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      In* row = row_of_output<In>(to, rank + i);
      for (int64_t d = 0; d < head_dim_; d += kLanes) {
        narrow_first<M>(M::load(from + i * width_ + d) * M::broadcast(factor), row + d, head_dim_ - d);
      }
    }
  }

  const int64_t head_dim_, depth_, stride_, width_, capacity_, pitch_;
  Word* const keys_;    // row by row
  Word* const values_;
  Word* const keys_t_;  // (width, key_words)
  Scalar* const dkeys_;
  Scalar* const dvalues_;
  Word* const queries_t_;  // panel by panel of queries
  Word* const dout_t_;
  Word* const queries_;  // panel by panel of columns
  Word* const dout_;
  Scalar* const probabilities_;  // (kGroup, pitch): scores, then probabilities, as items
  Scalar* const differences_;    // gradients of probabilities, then of scores, as items
  int32_t* const draws_;
  Word* const differences_b_;
  Scalar* const lse_;
  Scalar* const delta_;
  Scalar* dqueries_[2];  // towards words, towards entities
  Scalar scale_ = 0;
  Scalar factor_ = 0;  // of scores, to base 2
  Scalar kept_ = 1;    // what dropout multiplies what it keeps by
  int32_t threshold_ = 0;
  Gradients gradients_ = {};
};

}  // namespace luke_kernels::LUKE_ISA
