// The kernels of each instruction set, compiled from kernels.cpp once each.
#pragma once

#include "../dtype.h"
#include "head.h"

namespace luke_kernels {

// All work on one head, in `scratch` of as many bytes, aligned to 64.
struct Kernels {
  int64_t (*forward_scratch_bytes)(DType dtype, int64_t head_dim);
  // Output and lse of a part. Meanwhile what `next`, if not null, begins with is fetched.
  void (*forward)(DType dtype, const Part& part, const Part* next, void* scratch);

  int64_t (*backward_scratch_bytes)(DType dtype, int64_t head_dim, int64_t rows);
  // The gradients of `keys`, and their values, from all rows; or of the queries of `rows`, from all keys; or of all.
  void (*backward)(DType dtype, const Head& head, Span keys, Span rows, Gradients gradients, void* scratch);

  // Of the layer only the sizes count, and how x lies.
  LinearSizes (*linear_sizes)(DType dtype, const Linear& linear);
  void (*linear_pack)(DType dtype, const Matrix& weight, int64_t in_size, int64_t out_size, void* packed);
  // Packs some rows of a block, from a multiple of LinearSizes::row_multiple on.
  void (*linear_pack_rows)(DType dtype, const Linear& linear, Span block, Span rows, void* packed);
  // A block of rows by some panels; `packed` is null where rows are not packed.
  void (*linear)(DType dtype, const Linear& linear, Span rows, Span panels, const void* packed, void* scratch);

  void (*layer_norm)(DType dtype, const Norm& norm, Span rows);

  // Only multiplies and adds, as the products of tensors of `dtype` do; returns how many operations it did.
  int64_t (*multiply_add)(DType dtype, int64_t rounds);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_amx;

}  // namespace luke_kernels
