// Linear layers, y = f(x W^T + b) + r, and norms in inference, as the core sees them. No torch, no Python.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace luke_kernels {

// Bytes of the packed weights of a layer, (out_size, in_size), for the instruction set that runs.
size_t linear_packed_bytes_cpu(DType dtype, int64_t in_size, int64_t out_size);

// Packs weights whose rows lie `stride` elements apart.
void linear_pack_cpu(DType dtype, const void* weight, int64_t stride, int64_t in_size, int64_t out_size, void* packed);

// All of one dtype; strides from row to row, in elements.
struct LinearParams {
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t in_size = 0;
  int64_t out_size = 0;
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* packed = nullptr;
  const void* bias = nullptr;      // (out_size), or null
  const void* residual = nullptr;  // (rows, out_size), or null
  int64_t residual_stride = 0;
  void* out = nullptr;
  int64_t out_stride = 0;
  bool gelu = false;  // exact: x Phi(x)
  int num_threads = 1;
};

void linear_cpu(const LinearParams& params);

// All of one dtype, rows of `size` numbers; x and out may be the same.
struct NormParams {
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t size = 0;
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* weight = nullptr;
  const void* bias = nullptr;
  float eps = 0;
  void* out = nullptr;
  int64_t out_stride = 0;
  int num_threads = 1;
};

void layer_norm_cpu(const NormParams& params);

}  // namespace luke_kernels
