// Linear layers on the CPU: which thread runs which rows and columns. No result depends on the number of threads.
#include "../linear.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace luke_kernels {
namespace {

// Tasks for each thread, so that the threads end together.
constexpr int64_t kTasks = 8;

Matrix matrix(const void* data, int64_t stride) { return {const_cast<void*>(data), stride}; }

}  // namespace

size_t linear_packed_bytes_cpu(DType dtype, int64_t in_size, int64_t out_size) {
  return kernels().linear_sizes(dtype, in_size, out_size).packed_bytes;
}

void linear_pack_cpu(DType dtype, const void* weight, int64_t stride, int64_t in_size, int64_t out_size, void* packed) {
  kernels().linear_pack(dtype, matrix(weight, stride), in_size, out_size, packed);
}

void linear_cpu(const LinearParams& params) {
  const Kernels& isa = kernels();
  const LinearSizes sizes = isa.linear_sizes(params.dtype, params.in_size, params.out_size);
  const Linear linear = {matrix(params.x, params.x_stride),
                         matrix(params.residual, params.residual_stride),
                         {params.out, params.out_stride},
                         params.packed,
                         params.bias,
                         params.in_size,
                         params.out_size,
                         params.gelu};
  const int64_t blocks = (params.rows + sizes.rows - 1) / sizes.rows;
  const int64_t wanted = params.num_threads == 1 ? 1 : kTasks * params.num_threads;
  const int64_t parts = std::clamp<int64_t>(wanted / std::max<int64_t>(blocks, 1), 1, sizes.panels);
  parallel_for(params.num_threads, blocks * parts, [&](int64_t index, int64_t) {
    // Rows in equal blocks; of one block all columns, one after the other.
    const int64_t block = index / parts, part = index % parts;
    const Span rows = {block * params.rows / blocks, (block + 1) * params.rows / blocks};
    const Span panels = {part * sizes.panels / parts, (part + 1) * sizes.panels / parts};
    isa.linear(params.dtype, linear, rows, panels, thread_scratch(sizes.scratch_bytes));
  });
}

}  // namespace luke_kernels
