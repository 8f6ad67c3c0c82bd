// y = f(x W^T + b) + r of a block of rows: weights are packed once, in panels of as many columns as a tile has.
//
// A panel meets a block of rows a piece of its depth at a time: the piece stays in the first cache while the rows, which
// stay in the second, pass it. Bias, activation and residual are added while the last sums lie in registers.
#pragma once

#include "blocks.h"
#include "pack.h"

namespace luke_kernels::LUKE_ISA {

// x Phi(x), exactly but for rounding: Phi(x) = erfc(-x / sqrt(2)) / 2, and erfc(z) = exp(-z^2) P(1 / (1 + z / 2)) for
// z >= 0, P of relative error 4.3e-8 up to where the result is zero.
LUKE_INLINE Floats::Vector gelu(Floats::Vector x) {
  using V = Floats;
  constexpr float kCoefficients[9] = {0.282086432f,   0.282375276f, 0.24310407f,   0.202685416f, -0.0266216863f,
                                      0.278060526f, -0.487193286f, 0.284571379f, -0.0590681396f};
  const V::Vector size = V::max(x, V::zero() - x);
  const V::Vector t = V::broadcast(1) / V::multiply_add(size, V::broadcast(0.35355339f), V::broadcast(1));
  V::Vector tail = V::broadcast(kCoefficients[8]);
#pragma GCC unroll 8
  for (int i = 7; i >= 0; --i) tail = V::multiply_add(tail, t, V::broadcast(kCoefficients[i]));
  // x Phi(-|x|), of which the sign is that of x.
  tail = tail * t * V::broadcast(0.5f) * exp2<kFineDegree>(x * x * V::broadcast(-0.72134752f)) * x;
  return x > V::zero() ? x - tail : tail;
}

template <class M, typename In>
class LinearBlock {
  using Word = typename M::Word;
  using Vector = typename M::Vector;
  static constexpr int64_t kLanes = M::kLanes;
  // Of a panel's piece: half of a first cache of 32 KB; with AVX-512, whose panels are wide, two thirds of one of 48.
  static constexpr int64_t kPieceBytes = kLanes == 16 ? 32768 : 16384;
  static constexpr int64_t kPiece = kPieceBytes / (kPanel<M> * sizeof(Word));  // words of depth
  // Of a block of rows: half of a second cache of 512 KB.
  static constexpr int64_t kRowBytes = 256 * 1024;

 public:
  LinearBlock(const Linear& linear, Memory& memory)
      : linear_(linear),
        depth_((linear.in_size + M::kDepth - 1) / M::kDepth),
        stride_(padded_words<M>(linear.in_size)),
        sums_(memory.take<float>(kMaxRows * kPanel<M>)),
        rows_(memory.take<Word>(max_rows(linear.in_size) * stride_)) {}

  // Rows of a block: as many as stay in the second cache.
  static int64_t max_rows(int64_t in_size) {
    const int64_t tile_rows = rows_of_tile<M>(M::kTileVectors);
    const int64_t fit = kRowBytes / static_cast<int64_t>(sizeof(Word)) / padded_words<M>(in_size);
    return larger(tile_rows, smaller(fit, kMaxRows) / tile_rows * tile_rows);
  }

  static int64_t num_panels(int64_t out_size) { return (out_size + kPanel<M> - 1) / kPanel<M>; }

  static int64_t packed_words(int64_t in_size, int64_t out_size) {
    return num_panels(out_size) * kPanel<M> * ((in_size + M::kDepth - 1) / M::kDepth);
  }

  static void pack(const Matrix& weight, int64_t in_size, int64_t out_size, void* packed) {
    const int64_t depth = (in_size + M::kDepth - 1) / M::kDepth;
    for (int64_t p = 0; p < num_panels(out_size); ++p) {
      const int64_t count = smaller(kPanel<M>, out_size - p * kPanel<M>);
      Word* const to = static_cast<Word*>(packed) + p * kPanel<M> * depth;
      pack_columns<M, In>(weight, p * kPanel<M>, count, in_size, to, kPanel<M>);
    }
  }

  void run(Span rows, Span panels) {
    Matrix x = linear_.x;
    const Word* a;
    int64_t a_stride;
    if (are_words(x)) {
      a = reinterpret_cast<const Word*>(row_of<In>(x, rows.begin));
      a_stride = x.stride / M::kDepth;
    } else {
      pack_rows<M, In>(x, rows.begin, rows.end - rows.begin, linear_.in_size, rows_, stride_);
      a = rows_;
      a_stride = stride_;
    }
    for (int64_t p = panels.begin; p < panels.end; ++p) run_panel(rows, p, a, a_stride);
  }

 private:
  static constexpr int64_t kMaxRows = 96;

  bool are_words(const Matrix& x) const {
    return std::is_same_v<In, typename M::Item> && linear_.in_size % M::kDepth == 0 && x.stride % M::kDepth == 0 &&
           reinterpret_cast<uintptr_t>(x.data) % sizeof(Word) == 0;
  }

  void run_panel(Span rows, int64_t p, const Word* a, int64_t a_stride) {
    const int64_t count = rows.end - rows.begin, column = p * kPanel<M>;
    const int64_t columns = smaller(kPanel<M>, linear_.out_size - column), vectors = (columns + kLanes - 1) / kLanes;
    const Word* const panel = static_cast<const Word*>(linear_.packed) + p * kPanel<M> * depth_;
    float* const partial = sums_;
    for (int64_t k = 0; k < depth_; k += kPiece) {
      const int64_t depth = smaller(kPiece, depth_ - k);
      const bool first = k == 0, last = k + depth == depth_;
      const auto product = [&](const auto& finish) __attribute__((always_inline)) {
        product_of_vectors<M>(vectors, count, depth, a + k, a_stride, panel + k * kPanel<M>, kPanel<M>, finish);
      };
      if (last) {
        product([&](int64_t row, auto& sums) __attribute__((always_inline)) {
          finish(rows.begin + row, column, columns, sums, first ? nullptr : partial + row * kPanel<M>);
        });
      } else if (first) {
        product([=](int64_t row, auto& sums) __attribute__((always_inline)) {
          store_sums<M>(sums, partial + row * kPanel<M>, kPanel<M>);
        });
      } else {
        product([=](int64_t row, auto& sums) __attribute__((always_inline)) {
          add_sums<M>(sums, partial + row * kPanel<M>, kPanel<M>);
        });
      }
    }
  }

  template <int kRows, int kVectors>
  LUKE_INLINE void finish(int64_t row, int64_t column, int64_t columns, Vector (&sums)[kRows][kVectors],
                          const float* partial) {
    Vector bias[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const In* from = static_cast<const In*>(linear_.bias) + column + v * kLanes;
      bias[v] = linear_.bias ? widen_first<M>(from, columns - v * kLanes) : M::zero();
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      In* const out = row_of_output<In>(linear_.out, row + r) + column;
      const In* const residual = linear_.residual.data ? row_of<In>(linear_.residual, row + r) + column : nullptr;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Vector y = sums[r][v] + bias[v];
        if (partial) y += M::load(partial + r * kPanel<M> + v * kLanes);
        if (linear_.gelu) y = gelu(y);
        if (residual) y += widen_first<M>(residual + v * kLanes, columns - v * kLanes);
        narrow_first<M>(y, out + v * kLanes, columns - v * kLanes);
      }
    }
  }

  const Linear& linear_;
  int64_t depth_, stride_;
  float* sums_;
  Word* rows_;
};

}  // namespace luke_kernels::LUKE_ISA
