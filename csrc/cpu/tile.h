// What the CPU kernels are made of: tiles of 64 tokens in scratch memory, in the accumulator's type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "../attention.h"
#include "../philox.h"
#include "head.h"
#include "parallel.h"

namespace luke_kernels {

constexpr int64_t kBlock = 64;  // tokens a tile
constexpr int64_t kLanes = 16;  // columns are padded to a multiple of this: a cache line of floats
constexpr int64_t kRows = 8;    // rows whose sums the product keeps in registers
constexpr int64_t kTiles = 11;  // the most tiles a kernel holds (dK/dV with dropout)

template <typename scalar_t>
struct Accumulator {
  using type = scalar_t;
};
template <>
struct Accumulator<bfloat16> {
  using type = float;
};
template <>
struct Accumulator<float16> {
  using type = float;
};
template <typename scalar_t>
using acc_t = typename Accumulator<scalar_t>::type;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return to_float(x); }
inline float widen(float16 x) { return to_float(x); }

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, bfloat16* to) { *to = to_bfloat16(x); }
inline void narrow(float x, float16* to) { *to = to_float16(x); }

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Tokens [begin, begin + size) of one kind's buffers; rank is the place of the first within its sequence.
struct Range {
  Kind kind;
  int64_t begin;
  int64_t size;
  int64_t rank;
};

// Lengths and offsets beyond the buffers are cut off: a wrong one may give wrong numbers, never a wild access.
inline Range sequence(const AttentionParams& params, Kind kind, int64_t b) {
  const Segments& segments = params.segments[kind];
  const int64_t begin = std::clamp<int64_t>(segments.offsets[b], 0, segments.num_tokens);
  const int64_t longest = std::min(segments.max_length, segments.num_tokens - begin);
  return {kind, begin, std::clamp<int64_t>(segments.lengths[b], 0, longest), 0};
}

inline Range block_of(const Range& all, int64_t start) {
  return {all.kind, all.begin + start, std::min(kBlock, all.size - start), start};
}

// The blocks of all sequences, words and entities: the units of work of a head.
struct Block {
  int64_t b;
  Range range;
};
inline std::vector<Block> blocks_of(const AttentionParams& params) {
  std::vector<Block> blocks;
  for (int64_t b = 0; b < params.batch_size; ++b) {
    for (Kind kind : {kWord, kEntity}) {
      const Range all = sequence(params, kind, b);
      for (int64_t start = 0; start < all.size; start += kBlock) blocks.push_back({b, block_of(all, start)});
    }
  }
  return blocks;
}

// A head of one slot of a buffer, from a range's first token on.
template <typename scalar_t>
scalar_t* at(const std::array<Buffer, kKinds>& buffers, const Range& range, int64_t slot, int64_t head) {
  const Buffer& buffer = buffers[range.kind];
  return static_cast<scalar_t*>(buffer.data) + range.begin * buffer.token_stride + slot * buffer.slot_stride +
         head * buffer.head_stride;
}

// Hands out a thread's tiles, each kBlock x max(kBlock, padded head_dim).
template <typename T>
class Scratch {
 public:
  explicit Scratch(const AttentionParams& params)
      : size_(tile_size(params)), next_(static_cast<T*>(thread_scratch(sizeof(T) * kTiles * size_))) {}
  T* tile() { return std::exchange(next_, next_ + size_); }

  static int64_t tile_size(const AttentionParams& params) {
    return kBlock * std::max(kBlock, round_up(params.head_dim, kLanes));
  }

 private:
  int64_t size_;
  T* next_;
};

// Copies a head of `range`, (size, head_dim), into a tile of kBlock rows of `width`; zero beyond.
template <typename scalar_t>
void load_rows(const std::array<Buffer, kKinds>& buffers, const Range& range, int64_t slot, int64_t head,
               int64_t head_dim, int64_t width, acc_t<scalar_t>* tile) {
  const scalar_t* data = at<const scalar_t>(buffers, range, slot, head);
  const int64_t stride = buffers[range.kind].token_stride;
  std::fill_n(tile, kBlock * width, acc_t<scalar_t>{0});
  for (int64_t i = 0; i < range.size; ++i) {
    for (int64_t d = 0; d < head_dim; ++d) tile[i * width + d] = widen(data[i * stride + d]);
  }
}

// The same, transposed: a tile of head_dim rows of kBlock.
template <typename scalar_t>
void load_columns(const std::array<Buffer, kKinds>& buffers, const Range& range, int64_t slot, int64_t head,
                  int64_t head_dim, acc_t<scalar_t>* tile) {
  const scalar_t* data = at<const scalar_t>(buffers, range, slot, head);
  const int64_t stride = buffers[range.kind].token_stride;
  std::fill_n(tile, kBlock * head_dim, acc_t<scalar_t>{0});
  for (int64_t i = 0; i < range.size; ++i) {
    for (int64_t d = 0; d < head_dim; ++d) tile[d * kBlock + i] = widen(data[i * stride + d]);
  }
}

template <typename scalar_t>
void store_rows(const acc_t<scalar_t>* tile, int64_t width, const std::array<Buffer, kKinds>& buffers,
                const Range& range, int64_t slot, int64_t head, int64_t head_dim) {
  scalar_t* data = at<scalar_t>(buffers, range, slot, head);
  const int64_t stride = buffers[range.kind].token_stride;
  for (int64_t i = 0; i < range.size; ++i) {
    for (int64_t d = 0; d < head_dim; ++d) narrow(tile[i * width + d], data + i * stride + d);
  }
}

// C (kBlock, n) += A (kBlock, k) B (k, n), row-major without gaps; n a multiple of kLanes.
void multiply_add(int64_t n, int64_t k, const float* a, const float* b, float* c);
void multiply_add(int64_t n, int64_t k, const double* a, const double* b, double* c);

// C (kBlock, n) = A (kBlock, k) B (k, n).
template <typename T>
void multiply(int64_t n, int64_t k, const T* a, const T* b, T* c) {
  std::fill_n(c, kBlock * n, T{0});
  multiply_add(n, k, a, b, c);
}

// Factors of the probabilities of a tile, (rows, columns): 1 / (1 - p) where kept, else 0.
template <typename T>
void dropout_factors(const AttentionParams& params, int64_t b, int64_t head, const Range& rows, const Range& columns,
                     T* tile) {
  const DropoutMask mask(params.seed, params.offset, params.dropout_p,
                         static_cast<uint32_t>(head + params.num_heads * b), rows.kind == kEntity,
                         columns.kind == kEntity);
  const T kept = static_cast<T>(1.0 / (1.0 - params.dropout_p));
  for (int64_t i = 0; i < rows.size; ++i) {
    mask.for_each(static_cast<uint32_t>(rows.rank + i), static_cast<uint32_t>(columns.rank), columns.size,
                  [&](int64_t j, bool keep) { tile[i * kBlock + j] = keep ? kept : T{0}; });
  }
}

// Runs task(block, head) for every block and head; each writes its own rows, so threads change no result.
template <typename Task>
void for_each_block(const AttentionParams& params, const Task& task) {
  const std::vector<Block> blocks = blocks_of(params);
  const int64_t heads = params.num_heads;
  parallel_for(params.num_threads, static_cast<int64_t>(blocks.size()) * heads, 1,
               [&](int64_t index) { task(blocks[index / heads], index % heads); });
}

// Calls f(scalar_t{}) with the type of the tensors.
template <typename F>
auto dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(bfloat16{});
    case DType::kFloat16:
      return f(float16{});
    default:
      return f(float{});
  }
}

}  // namespace luke_kernels
