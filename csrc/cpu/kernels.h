// The kernels of each instruction set, compiled from kernels.cpp once each.
#pragma once

#include "../dtype.h"
#include "head.h"

namespace luke_kernels {

// One head's rows [begin, end). `scratch` holds scratch_bytes(dtype, head_dim), aligned to 64. `next` is the head this
// thread is likely to run next, or null: its rows are fetched ahead.
struct Kernels {
  int64_t (*forward_scratch_bytes)(DType dtype, int64_t head_dim);
  void (*forward)(DType dtype, const Head& head, Span rows, const Head* next, void* scratch);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

}  // namespace luke_kernels
