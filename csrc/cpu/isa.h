#pragma once

#include "kernels.h"

namespace luke_kernels {

// The kernels for tensors of a dtype: the best of this machine, up to the cap.
const Kernels& kernels(DType dtype);
const Kernels& linear_kernels(DType dtype);

}  // namespace luke_kernels
