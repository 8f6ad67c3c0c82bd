// Dropout's draws, Philox-4x32-10, some counters at a time. The rule stands in luke_kernels/ops/dropout.py.
#pragma once

#include "product.h"

namespace luke_kernels::LUKE_ISA {

// 32-bit numbers in lanes of 64 bits, whose products are whole.
#if defined(__AVX512F__)
constexpr int kCounters = 8;
#elif defined(__AVX2__)
constexpr int kCounters = 4;
#else
constexpr int kCounters = 2;
#endif
typedef uint64_t Counters __attribute__((vector_size(8 * kCounters)));

// Multiplies the low halves.
LUKE_INLINE Counters multiply_low(Counters a, uint32_t b) {
#if defined(__AVX512F__)
  return (Counters)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Counters)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFF) * b;
#endif
}

// Turns counters into draws; the high halves of lanes mean nothing, before and after.
LUKE_INLINE void philox(Counters (&c)[4], uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Counters product0 = multiply_low(c[0], 0xD2511F53), product1 = multiply_low(c[2], 0xCD9E8D57);
    c[0] = (product1 >> 32) ^ c[1] ^ k0;
    c[1] = product1;
    c[2] = (product0 >> 32) ^ c[3] ^ k1;
    c[3] = product0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
}

// Draws and thresholds have their highest bit turned, so that signed numbers compare as unsigned ones would.
LUKE_INLINE int32_t draw_threshold(const Dropout& dropout) {
  return static_cast<int32_t>(static_cast<uint32_t>(dropout.p * 4294967296.0) ^ 0x80000000u);
}

LUKE_INLINE uint32_t last_counter(const Dropout& dropout, int64_t row_kind, int64_t column_kind) {
  return static_cast<uint32_t>(dropout.offset) ^ static_cast<uint32_t>(row_kind) << 31 ^
         static_cast<uint32_t>(column_kind) << 30;
}

LUKE_INLINE Counters counters(uint64_t first, uint64_t step) {
  Counters c;
  for (int i = 0; i < kCounters; ++i) c[i] = first + i * step;
  return c;
}

// Draws for columns [column, column + count) of a row; column is a multiple of 4. Up to 4 kCounters - 1 more are written.
LUKE_INLINE void draw_columns(const Dropout& dropout, int64_t row_kind, int64_t column_kind, int64_t row, int64_t column,
                              int64_t count, int32_t* draws) {
  for (int64_t j = 0; j < count; j += 4 * kCounters) {
    Counters c[4] = {counters((column + j) / 4, 1), counters(row, 0), counters(dropout.stream, 0),
                     counters(last_counter(dropout, row_kind, column_kind), 0)};
    philox(c, dropout.seed);
    for (int i = 0; i < kCounters; ++i) {
      for (int word = 0; word < 4; ++word) draws[j + 4 * i + word] = static_cast<int32_t>(c[word][i] ^ 0x80000000u);
    }
  }
}

// Draws for columns [column, column + 4), a line of `stride` each, and rows [row, row + count); column is a multiple of
// 4. Up to kCounters - 1 more a line are written.
LUKE_INLINE void draw_rows(const Dropout& dropout, int64_t row_kind, int64_t column_kind, int64_t row, int64_t count,
                           int64_t column, int32_t* draws, int64_t stride) {
  for (int64_t i = 0; i < count; i += kCounters) {
    Counters c[4] = {counters(column / 4, 0), counters(row + i, 1), counters(dropout.stream, 0),
                     counters(last_counter(dropout, row_kind, column_kind), 0)};
    philox(c, dropout.seed);
    for (int word = 0; word < 4; ++word) {
      for (int j = 0; j < kCounters; ++j) {
        draws[word * stride + i + j] = static_cast<int32_t>(c[word][j] ^ 0x80000000u);
      }
    }
  }
}

}  // namespace luke_kernels::LUKE_ISA
