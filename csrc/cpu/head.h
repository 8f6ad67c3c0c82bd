// One head of one sequence: all that a kernel of an instruction set sees. Plain data, so that the files compiled for
// one share no function with the rest of the library.
#pragma once

#include <cstdint>
#include <cstring>

namespace luke_kernels {

#define LUKE_INLINE inline __attribute__((always_inline))

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

LUKE_INLINE float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
LUKE_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

LUKE_INLINE float to_float(bfloat16 x) { return float_of_bits(uint32_t{x.bits} << 16); }
LUKE_INLINE bfloat16 to_bfloat16(float x) {
  const uint32_t bits = bits_of_float(x);
  // Round to nearest even; a NaN stays one.
  const uint32_t rounded = x != x ? 0x7FC00000 : bits + 0x7FFF + ((bits >> 16) & 1);
  return {static_cast<uint16_t>(rounded >> 16)};
}

LUKE_INLINE float to_float(float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7FFFu;
  if (rest >= 0x7C00) return float_of_bits(sign | 0x7F800000 | (rest & 0x3FF) << 13);
  // The exponent in float's place, then in its bias; subnormal numbers come out normal.
  return float_of_bits(sign | bits_of_float(float_of_bits(rest << 13) * 0x1p112f));
}
LUKE_INLINE float16 to_float16(float x) {
  const uint32_t bits = bits_of_float(x), rest = bits & 0x7FFFFFFF;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (rest > 0x7F800000) return {static_cast<uint16_t>(sign | 0x7E00)};
  if (rest >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};
  if (rest < 0x38800000) {
    // Subnormal: adding a half shifts the last bit to its place, rounded to nearest even.
    return {static_cast<uint16_t>(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3F000000))};
  }
  return {static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13)};
}

// (tokens, head_dim), of unit stride in head_dim.
struct Matrix {
  void* data;
  int64_t stride;  // from token to token, in elements
};

// The tokens of one kind.
struct Tokens {
  int64_t size;
  Matrix queries[2];  // towards words, towards entities
  Matrix keys;
  Matrix values;
  Matrix out;
  void* lse;  // (size), float, or double for doubles
  // Backward only.
  Matrix dout;
  Matrix dqueries[2];
  Matrix dkeys;
  Matrix dvalues;
};

struct Dropout {
  double p;
  uint64_t seed;
  uint64_t offset;
  uint32_t stream;  // head + num_heads * sequence
};

struct Head {
  Tokens tokens[2];  // words, entities
  int64_t head_dim;
  bool shared_query;  // one query serves keys of both kinds, and its gradient is the sum
  double scale;
  Dropout dropout;
};

// A range of a head's rows, or keys: words first, entities after them.
struct Span {
  int64_t begin;
  int64_t end;
};

// What one thread computes at a time.
struct Part {
  Head head;
  Span rows;
};

LUKE_INLINE Span all_rows(const Head& head) { return {0, head.tokens[0].size + head.tokens[1].size}; }

// What a part of the backward computes.
struct Gradients {
  bool queries;
  bool keys;  // and values
};

// A linear layer: out = f(x W^T + b) + r, all of one dtype.
struct Linear {
  Matrix x;
  Matrix residual;  // null data: none
  Matrix out;
  const void* packed;
  const void* bias;  // or null
  int64_t in_size;
  int64_t out_size;
  bool gelu;
};

// Rows of `size` numbers, normalised: out = (x - mean) / sqrt(variance + eps) weight + bias.
struct Norm {
  Matrix x;
  Matrix out;
  const void* weight;
  const void* bias;
  int64_t size;
  float eps;
};

// How the work on a layer is cut, and what it takes.
struct LinearSizes {
  int64_t packed_bytes;   // of the weights
  int64_t scratch_bytes;  // of a thread
  int64_t row_bytes;      // of a packed row; 0: rows are read as they lie
  int64_t rows;           // of a block, at most
  int64_t row_multiple;   // of which the rows of every block but the last are a multiple
  int64_t panels;         // of columns
};

}  // namespace luke_kernels
