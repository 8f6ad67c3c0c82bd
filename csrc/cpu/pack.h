// From the tensors into what products read: words, with zeros for the columns and depths that do not exist.
#pragma once

#include "product.h"

namespace luke_kernels::LUKE_ISA {

template <typename In>
LUKE_INLINE const In* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<const In*>(matrix.data) + row * matrix.stride;
}
template <typename In>
LUKE_INLINE In* row_of_output(const Matrix& matrix, int64_t row) {
  return static_cast<In*>(matrix.data) + row * matrix.stride;
}

// Loads a vector of words from the first n numbers at `from`, zero beyond.
template <class M, typename In>
LUKE_INLINE typename M::Vector load_words(const In* from, int64_t n) {
  constexpr int64_t kNumbers = M::kLanes * M::kDepth;
  In padded[kNumbers];
  if (n < kNumbers) {
    std::memset(padded, 0, sizeof padded);
    if (n > 0) std::memcpy(padded, from, n * sizeof(In));
    from = padded;
  }
  if constexpr (M::kDepth == 2) {
    return M::words(reinterpret_cast<const typename M::Word*>(from));
  } else {
    return M::widen(from);
  }
}

template <class M>
LUKE_INLINE void store_words(typename M::Word* to, typename M::Vector v) {
  std::memcpy(to, &v, sizeof v);
}

// Words of a row of `numbers`, as they are padded to full vectors.
template <class M>
LUKE_INLINE int64_t padded_words(int64_t numbers) {
  return round_up((numbers + M::kDepth - 1) / M::kDepth, M::kLanes);
}

// Packs rows as operand A: row after row of `stride` words.
template <class M, typename In>
LUKE_INLINE void pack_rows(const Matrix& from, int64_t begin, int64_t count, int64_t numbers, typename M::Word* to,
                           int64_t stride) {
  const int64_t words = padded_words<M>(numbers);
  for (int64_t i = 0; i < count; ++i) {
    const In* row = row_of<In>(from, begin + i);
    for (int64_t w = 0; w < words; w += M::kLanes) {
      store_words<M>(to + i * stride + w, load_words<M>(row + w * M::kDepth, numbers - w * M::kDepth));
    }
  }
}

// Turns kLanes vectors of words by rows into such by columns.
template <class M>
LUKE_INLINE void transpose(typename M::Vector (&v)[M::kLanes]) {
  typename M::Vector other[M::kLanes];
  constexpr int kHalf = M::kLanes / 2;
  int step = 1;
#pragma GCC unroll 2
  for (; 2 * step < M::kLanes; step *= 4) {
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      other[2 * i] = M::interleave_low(v[i], v[i + kHalf]);
      other[2 * i + 1] = M::interleave_high(v[i], v[i + kHalf]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      v[2 * i] = M::interleave_low(other[i], other[i + kHalf]);
      v[2 * i + 1] = M::interleave_high(other[i], other[i + kHalf]);
    }
  }
  if (step < M::kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      other[2 * i] = M::interleave_low(v[i], v[i + kHalf]);
      other[2 * i + 1] = M::interleave_high(v[i], v[i + kHalf]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < M::kLanes; ++i) v[i] = other[i];
  }
}

// Packs `count` rows of words, load(i, w) being a vector of those of row i from w on, as columns of operand B: word k of
// row i goes to to[k * stride + i]. Fills up to a multiple of kLanes.
template <class M, class Load>
LUKE_INLINE void pack_columns_of(int64_t count, int64_t words, typename M::Word* to, int64_t stride, const Load& load) {
  for (int64_t i = 0; i < count; i += M::kLanes) {
    for (int64_t w = 0; w < words; w += M::kLanes) {
      typename M::Vector v[M::kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < M::kLanes; ++j) v[j] = i + j < count ? load(i + j, w) : M::zero();
      transpose<M>(v);
      const int64_t columns = smaller(M::kLanes, words - w);
      for (int64_t k = 0; k < columns; ++k) store_words<M>(to + (w + k) * stride + i, v[k]);
    }
  }
}

template <class M, typename In>
LUKE_INLINE void pack_columns(const Matrix& from, int64_t begin, int64_t count, int64_t numbers,
                              typename M::Word* to, int64_t stride) {
  pack_columns_of<M>(count, (numbers + M::kDepth - 1) / M::kDepth, to, stride,
                     [&](int64_t i, int64_t w) __attribute__((always_inline)) {
                       return load_words<M>(row_of<In>(from, begin + i) + w * M::kDepth, numbers - w * M::kDepth);
                     });
}

// Loads a row of words of which each holds one number of kDepth rows, from row i of `count` on: the first n numbers.
// Rows that do not exist are zero.
template <class M, typename In>
LUKE_INLINE typename M::Vector load_depths(const Matrix& from, int64_t begin, int64_t i, int64_t count, int64_t first,
                                           int64_t n) {
  const In* row = row_of<In>(from, begin + smaller(i, count - 1)) + first;
  if constexpr (M::kDepth == 2) {
    const In* next = row_of<In>(from, begin + smaller(i + 1, count - 1)) + first;
    return M::zip(row, i < count ? n : 0, next, i + 1 < count ? n : 0);
  } else {
    return load_words<M>(row, i < count ? n : 0);
  }
}

// Packs numbers [first, first + numbers) of rows as rows of operand B, kDepth of them to a row of `columns` words. Rows
// up to `padded`, a multiple of kDepth, are zero.
template <class M, typename In>
LUKE_INLINE void pack_depths(const Matrix& from, int64_t begin, int64_t count, int64_t padded, int64_t first,
                             int64_t numbers, typename M::Word* to, int64_t columns) {
  for (int64_t i = 0; i < padded; i += M::kDepth) {
    for (int64_t d = 0; d < columns; d += M::kLanes) {
      store_words<M>(to + i / M::kDepth * columns + d,
                     load_depths<M, In>(from, begin, i, count, first + d, numbers - d));
    }
  }
}

// Packs the columns of a matrix as rows of operand A: number d of rows [k * kDepth, (k + 1) * kDepth) makes the word
// to[d * stride + k]. Fills up to a multiple of kLanes.
template <class M, typename In>
LUKE_INLINE void pack_transposed(const Matrix& from, int64_t begin, int64_t count, int64_t numbers,
                                 typename M::Word* to, int64_t stride) {
  for (int64_t k = 0; k * M::kDepth < count; k += M::kLanes) {
    for (int64_t d = 0; d < numbers; d += M::kLanes) {
      typename M::Vector v[M::kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < M::kLanes; ++j) {
        v[j] = load_depths<M, In>(from, begin, (k + j) * M::kDepth, count, d, numbers - d);
      }
      transpose<M>(v);
#pragma GCC unroll 16
      for (int j = 0; j < M::kLanes; ++j) store_words<M>(to + (d + j) * stride + k, v[j]);
    }
  }
}

// Widens the first n numbers at `from`, zero beyond.
template <class M, typename In>
LUKE_INLINE typename M::Vector widen_first(const In* from, int64_t n) {
  if (n >= M::kLanes) return M::widen(from);
  In padded[M::kLanes] = {};
  std::memcpy(padded, from, n * sizeof(In));
  return M::widen(padded);
}

// Narrows the first n numbers of a vector to `to`.
template <class M, typename In>
LUKE_INLINE void narrow_first(typename M::Vector v, In* to, int64_t n) {
  if (n >= M::kLanes) return M::narrow(v, to);
  In padded[M::kLanes];
  M::narrow(v, padded);
  std::memcpy(to, padded, n * sizeof(In));
}

// Sums, or takes the maximum, of the lanes of each row: (rows, kLanes) -> (rows). Up to kLanes - 1 rows more are read
// and written.
template <class M, class Combine>
LUKE_INLINE void reduce_lanes(const typename M::Scalar* lanes, int64_t rows, typename M::Scalar* to,
                              const Combine& combine) {
  for (int64_t row = 0; row < rows; row += M::kLanes) {
    typename M::Vector v[M::kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < M::kLanes; ++i) v[i] = M::load(lanes + (row + i) * M::kLanes);
    transpose<M>(v);
#pragma GCC unroll 4
    for (int n = M::kLanes / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) v[i] = combine(v[i], v[i + n]);
    }
    M::store(to + row, v[0]);
  }
}

}  // namespace luke_kernels::LUKE_ISA
