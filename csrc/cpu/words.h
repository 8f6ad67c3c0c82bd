// What products are made of: the words of their operands, and how two are multiplied.
#pragma once

#include "simd.h"

namespace luke_kernels::LUKE_ISA {

LUKE_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
LUKE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LUKE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A word is one number.
template <typename V>
struct Single : V {
  using typename V::Scalar;
  using typename V::Vector;
  using Word = Scalar;
  using Item = Scalar;
  static constexpr int kDepth = 1;  // numbers in a word
  static constexpr int kDegree = kFineDegree;
  static constexpr bool kTiled = false;  // whether products are those of tiles.h
  static constexpr int kPlanes = 1;      // words that hold the same numbers, as in SplitTiles

  static LUKE_INLINE Vector words(const Word* from) { return V::load(from); }
  static LUKE_INLINE Vector spread(const Word* from) { return V::broadcast(*from); }
  static LUKE_INLINE Vector dot(Vector sum, Vector a, Vector b) { return a * b + sum; }
  static LUKE_INLINE Vector reciprocal(Vector x) { return V::broadcast(1) / x; }
  static LUKE_INLINE void negate(Word* words, int64_t n) {
    for (int64_t i = 0; i < n; i += V::kLanes) V::store(words + i, -V::load(words + i));
  }
  // Stores numbers in two vectors as items of A.
  static LUKE_INLINE void store_items(Item* to, Vector a, Vector b) {
    V::store(to, a);
    V::store(to + V::kLanes, b);
  }
  // Stores kDepth rows of numbers as a row of words of B.
  static LUKE_INLINE void store_depths(Word* to, const Vector (&rows)[kDepth]) { V::store(to, rows[0]); }
};

#if defined(__AVX512BF16__)

// A word is two bfloat16 of neighbouring depths, whose products are summed in float32.
struct Pairs : Floats {
  using Word = uint32_t;
  using Item = bfloat16;
  static constexpr int kDepth = 2;
  static constexpr int kDegree = kCoarseDegree;
  static constexpr bool kTiled = false;
  static constexpr int kPlanes = 1;

  static LUKE_INLINE Vector words(const Word* from) { return _mm512_loadu_ps(from); }
  static LUKE_INLINE Vector spread(const Word* from) { return _mm512_castsi512_ps(_mm512_set1_epi32(*from)); }
  static LUKE_INLINE Vector dot(Vector sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b));
  }
  static LUKE_INLINE Vector reciprocal(Vector x) { return _mm512_rcp14_ps(x); }  // to 2^-14
  static LUKE_INLINE void store_items(Item* to, Vector a, Vector b) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  // Adds up numbers as they are once they are items: rounded.
  static LUKE_INLINE Vector add_items(Vector sum, Vector a, Vector b) {
    const __m512i ones = _mm512_set1_epi32(0x3F803F80);
    return _mm512_dpbf16_ps(sum, _mm512_cvtne2ps_pbh(b, a), (__m512bh)ones);
  }
  static LUKE_INLINE void store_depths(Word* to, const Vector (&rows)[kDepth]) {
    const __m512i lanes = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(lanes, (__m512i)_mm512_cvtne2ps_pbh(rows[1], rows[0])));
  }
  static LUKE_INLINE void negate(Word* words, int64_t n) {
    for (int64_t i = 0; i < n; ++i) words[i] ^= 0x80008000;
  }
  // Words of the first n numbers of a row, zero beyond.
  static LUKE_INLINE Vector load_pairs(const bfloat16* from, int64_t n) {
    const __mmask32 exist = n >= 2 * kLanes ? 0xFFFFFFFF : n <= 0 ? 0 : (uint32_t{1} << n) - 1;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(exist, from));
  }
  // Words of the numbers of two rows, of which `first` and `second` exist.
  static LUKE_INLINE Vector zip(const bfloat16* a, int64_t first, const bfloat16* b, int64_t second) {
    const __m512i low = _mm512_cvtepu16_epi32(load_first(a, first)), high = _mm512_cvtepu16_epi32(load_first(b, second));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

 private:
  static LUKE_INLINE __m256i load_first(const bfloat16* from, int64_t n) {
    const __mmask16 exist = n >= kLanes ? 0xFFFF : n <= 0 ? 0 : (1 << n) - 1;
    return _mm256_maskz_loadu_epi16(exist, from);
  }
};

#endif

}  // namespace luke_kernels::LUKE_ISA
