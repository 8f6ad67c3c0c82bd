// Chooses the kernels of a call by dtype and head_dim. They are compiled apart from one another, for the build's sake.
#include <stdexcept>
#include <string>

#include "../attention.h"

namespace luke_kernels {

namespace cuda {

template <DType T, int kHeadDim>
void run_forward(const AttentionParams& params);
template <DType T, int kHeadDim>
void run_backward(const AttentionParams& params);

}  // namespace cuda

namespace {

template <DType T>
void run(const AttentionParams& params, bool forward) {
  if (params.head_dim <= 32) {
    forward ? cuda::run_forward<T, 32>(params) : cuda::run_backward<T, 32>(params);
  } else if (params.head_dim <= 64) {
    forward ? cuda::run_forward<T, 64>(params) : cuda::run_backward<T, 64>(params);
  } else if (params.head_dim <= 128) {
    forward ? cuda::run_forward<T, 128>(params) : cuda::run_backward<T, 128>(params);
  } else {
    throw std::invalid_argument("head_dim must be at most 128, got " + std::to_string(params.head_dim));
  }
}

void run(const AttentionParams& params, bool forward) {
  if (params.batch_size == 0 || params.segments[kWord].num_tokens + params.segments[kEntity].num_tokens == 0) return;
  switch (params.dtype) {
    case DType::kFloat32:
      return run<DType::kFloat32>(params, forward);
    case DType::kBFloat16:
      return run<DType::kBFloat16>(params, forward);
    case DType::kFloat16:
      return run<DType::kFloat16>(params, forward);
    default:
      throw std::invalid_argument("dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace

void attention_forward_cuda(const AttentionParams& params) { run(params, true); }
void attention_backward_cuda(const AttentionParams& params) { run(params, false); }

}  // namespace luke_kernels
