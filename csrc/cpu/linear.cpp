// Linear layers and norms on the CPU: which thread runs which rows and columns. No result depends on the number of threads.
#include "../linear.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace luke_kernels {
namespace {

// Tasks for each thread, so that the threads end together.
constexpr int64_t kTasks = 8;
// Numbers that a task normalises, about.
constexpr int64_t kNormNumbers = 1 << 14;
// Of packed rows, at most and about.
constexpr int64_t kPackedBytes = 8 << 20;

Matrix matrix(const void* data, int64_t stride) { return {const_cast<void*>(data), stride}; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Some rows, in blocks of equal size: packed first, if they must be, then multiplied.
void run(const Kernels& isa, DType dtype, const Linear& linear, const LinearSizes& sizes, Span rows, int num_threads) {
  const int64_t count = rows.end - rows.begin, blocks = ceil_div(count, sizes.rows);
  const int64_t size = ceil_div(ceil_div(count, blocks), sizes.row_multiple) * sizes.row_multiple;
  const auto block_of = [&](int64_t index) {
    return Span{rows.begin + index * size, std::min(rows.begin + (index + 1) * size, rows.end)};
  };
  const int64_t block_bytes = size * sizes.row_bytes;
  char* const packed = static_cast<char*>(sizes.row_bytes ? thread_scratch(blocks * block_bytes, Use::kShared) : nullptr);
  if (packed) {
    const int64_t pieces = ceil_div(size, sizes.row_multiple);
    parallel_for(num_threads, blocks * pieces, [&](int64_t index, int64_t) {
      const int64_t number = index / pieces;
      const Span block = block_of(number);
      const int64_t begin = block.begin + index % pieces * sizes.row_multiple;
      const Span piece = {begin, std::min(begin + sizes.row_multiple, block.end)};
      if (begin < block.end) isa.linear_pack_rows(dtype, linear, block, piece, packed + number * block_bytes);
    });
  }
  const int64_t wanted = num_threads == 1 ? 1 : kTasks * num_threads;
  const int64_t parts = std::clamp<int64_t>(wanted / blocks, 1, sizes.panels);
  parallel_for(num_threads, blocks * parts, [&](int64_t index, int64_t) {
    // Of one block all columns, one after the other.
    const int64_t number = index / parts, part = index % parts;
    const Span panels = {part * sizes.panels / parts, (part + 1) * sizes.panels / parts};
    isa.linear(dtype, linear, block_of(number), panels, packed ? packed + number * block_bytes : nullptr,
               thread_scratch(sizes.scratch_bytes));
  });
}

}  // namespace

size_t linear_packed_bytes_cpu(DType dtype, int64_t in_size, int64_t out_size) {
  Linear linear{};
  linear.in_size = in_size;
  linear.out_size = out_size;
  return linear_kernels(dtype).linear_sizes(dtype, linear).packed_bytes;
}

void linear_pack_cpu(DType dtype, const void* weight, int64_t stride, int64_t in_size, int64_t out_size, void* packed) {
  linear_kernels(dtype).linear_pack(dtype, matrix(weight, stride), in_size, out_size, packed);
}

void linear_cpu(const LinearParams& params) {
  const Linear linear = {matrix(params.x, params.x_stride),
                         matrix(params.residual, params.residual_stride),
                         {params.out, params.out_stride},
                         params.packed,
                         params.bias,
                         params.in_size,
                         params.out_size,
                         params.gelu};
  const Kernels& isa = linear_kernels(params.dtype);
  const LinearSizes sizes = isa.linear_sizes(params.dtype, linear);
  const int64_t blocks = sizes.row_bytes ? std::max<int64_t>(kPackedBytes / (sizes.rows * sizes.row_bytes), 1) : params.rows;
  for (int64_t begin = 0; begin < params.rows; begin += blocks * sizes.rows) {
    run(isa, params.dtype, linear, sizes, {begin, std::min(begin + blocks * sizes.rows, params.rows)},
        params.num_threads);
  }
}

void layer_norm_cpu(const NormParams& params) {
  const Norm norm = {matrix(params.x, params.x_stride),
                     {params.out, params.out_stride},
                     params.weight,
                     params.bias,
                     params.size,
                     params.eps};
  const Kernels& isa = kernels(params.dtype);
  const int64_t rows = std::max<int64_t>(kNormNumbers / std::max<int64_t>(params.size, 1), 1);
  parallel_for(params.num_threads, ceil_div(params.rows, rows), [&](int64_t index, int64_t) {
    isa.layer_norm(params.dtype, norm, {index * rows, std::min((index + 1) * rows, params.rows)});
  });
}

}  // namespace luke_kernels
