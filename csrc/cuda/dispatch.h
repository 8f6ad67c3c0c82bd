// From a call to the kernels that serve it. `launch<Kernel>(args, grid)` runs a kernel: on a GPU, or in the emulator.
#pragma once

#include "backward.h"
#include "forward.h"

namespace luke_kernels::cuda {

// What every kernel of a call needs. `factor` is made for the forward or the backward.
inline Arguments arguments(const AttentionParams& op, double factor) {
  Arguments args;
  args.op = op;
  args.scale = static_cast<float>(op.scale);
  args.factor = static_cast<float>(factor * 1.4426950408889634);
  args.keep_scale = static_cast<float>(1 / (1 - op.dropout_p));
  args.threshold = static_cast<uint32_t>(op.dropout_p * 4294967296.0);
  args.chunks = static_cast<int>(op.head_dim * (op.dtype == DType::kFloat32 ? 4 : 2) / 16);
  return args;
}

template <DType T, int kHeadDim, bool kDropout, bool kWarpgroups, class Launch>
void launch_forward(const AttentionParams& op, Launch launch) {
  using Kernel = Forward<T, kHeadDim, kDropout, kWarpgroups>;
  // A scale of zero would turn the -inf of absent keys into NaN; the sign is the kernel's affair.
  const double size = op.scale < 0 ? -op.scale : op.scale;
  Arguments args = arguments(op, size < 1e-30 ? 1e-30 : size);
  args.blocks = blocks_of(op.segments[kWord].max_length + op.segments[kEntity].max_length, Kernel::kRows);
  launch.template operator()<Kernel>(args);
}

template <DType T, int kHeadDim, bool kDropout, bool kWarpgroups, class Launch>
void launch_backward(const AttentionParams& op, Launch launch) {
  using ForQueries = QueryGradient<T, kHeadDim, kDropout, kWarpgroups>;
  using ForKeys = KeyGradient<T, kHeadDim, kDropout, kWarpgroups>;
  const int64_t words = op.segments[kWord].max_length, entities = op.segments[kEntity].max_length;
  Arguments args = arguments(op, op.scale);
  args.blocks = blocks_of(words + entities, ForQueries::kRows);
  launch.template operator()<ForQueries>(args);
  args.blocks = blocks_of(words, ForKeys::kColumns) + blocks_of(entities, ForKeys::kColumns);
  launch.template operator()<ForKeys>(args);
}

// `warpgroups`: whether the device has them, and their kernels are built.
template <DType T, int kHeadDim, class Launch>
void forward(const AttentionParams& op, bool warpgroups, Launch launch) {
  if constexpr (T != DType::kFloat32) {
    if (warpgroups) {
      return op.dropout_p > 0 ? launch_forward<T, kHeadDim, true, true>(op, launch)
                              : launch_forward<T, kHeadDim, false, true>(op, launch);
    }
  }
  op.dropout_p > 0 ? launch_forward<T, kHeadDim, true, false>(op, launch)
                   : launch_forward<T, kHeadDim, false, false>(op, launch);
}

template <DType T, int kHeadDim, class Launch>
void backward(const AttentionParams& op, bool warpgroups, Launch launch) {
  if constexpr (T != DType::kFloat32) {
    if (warpgroups) {
      return op.dropout_p > 0 ? launch_backward<T, kHeadDim, true, true>(op, launch)
                              : launch_backward<T, kHeadDim, false, true>(op, launch);
    }
  }
  op.dropout_p > 0 ? launch_backward<T, kHeadDim, true, false>(op, launch)
                   : launch_backward<T, kHeadDim, false, false>(op, launch);
}

}  // namespace luke_kernels::cuda
