// Products of small matrices whose sums stay in registers: everything here is made of them.
//
// C (rows, columns) = A (rows, depth) B (depth, columns). A word of A is broadcast, a vector of words of B is loaded:
// A lies row by row; B lies in panels of as many columns as a tile of sums has, row by row within a panel.
#pragma once

#include "tiles.h"
#include "words.h"

namespace luke_kernels::LUKE_ISA {

template <class M>
constexpr int kPanel = M::kTileVectors * M::kLanes;  // columns

// Sums kRows x kVectors vectors over `depth` words and hands them to finish(sums).
template <class M, int kRows, int kVectors, class Finish>
LUKE_INLINE void tile(int64_t depth, const typename M::Word* a, int64_t a_stride, const typename M::Word* b,
                      int64_t b_stride, const Finish& finish) {
  using Vector = typename M::Vector;
  Vector sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = M::zero();
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = M::words(b + k * b_stride + v * M::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector x = M::spread(a + r * a_stride + k);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = M::dot(sums[r][v], x, row[v]);
    }
  }
  finish(sums);
}

// What may become of the sums of a tile: rows `stride` numbers apart.
template <class M, int kRows, int kVectors>
LUKE_INLINE void store_sums(const typename M::Vector (&sums)[kRows][kVectors], typename M::Scalar* to, int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) M::store(to + r * stride + v * M::kLanes, sums[r][v]);
  }
}

template <class M, int kRows, int kVectors>
LUKE_INLINE void add_sums(const typename M::Vector (&sums)[kRows][kVectors], typename M::Scalar* to, int64_t stride) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      typename M::Scalar* place = to + r * stride + v * M::kLanes;
      M::store(place, M::load(place) + sums[r][v]);
    }
  }
}

// Rows of a tile of so many vectors.
template <class M>
constexpr int64_t rows_of_tile(int64_t vectors) {
  return M::kTileSums / vectors < 12 ? M::kTileSums / vectors : 12;
}

// The columns of one panel for all rows. Calls finish(first row, sums).
template <class M, int kVectors, class Finish>
LUKE_INLINE void product_of_panel(int64_t rows, int64_t depth, const typename M::Word* a, int64_t a_stride,
                                  const typename M::Word* b, int64_t b_stride, const Finish& finish) {
#if defined(__AMX_BF16__)
  if constexpr (M::kTiled) return product_of_tiles<kVectors>(rows, depth, a, a_stride, b, b_stride, finish);
#endif
  constexpr int kRows = rows_of_tile<M>(kVectors);
  int64_t row = 0;
  const auto run = [&](auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    for (; row + kCount <= rows; row += kCount) {
      tile<M, kCount, kVectors>(depth, a + row * a_stride, a_stride, b, b_stride,
                                [&](auto& sums) __attribute__((always_inline)) { finish(row, sums); });
    }
  };
  run(std::integral_constant<int, kRows>{});
  run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

template <class M, class Finish>
LUKE_INLINE void product_of_vectors(int64_t vectors, int64_t rows, int64_t depth, const typename M::Word* a,
                                    int64_t a_stride, const typename M::Word* b, int64_t b_stride,
                                    const Finish& finish) {
  if constexpr (M::kTileVectors == 4) {
    if (vectors == 4) return product_of_panel<M, 4>(rows, depth, a, a_stride, b, b_stride, finish);
    if (vectors == 3) return product_of_panel<M, 3>(rows, depth, a, a_stride, b, b_stride, finish);
  }
  if (vectors == 2) return product_of_panel<M, 2>(rows, depth, a, a_stride, b, b_stride, finish);
  product_of_panel<M, 1>(rows, depth, a, a_stride, b, b_stride, finish);
}

}  // namespace luke_kernels::LUKE_ISA
