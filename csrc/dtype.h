#pragma once

namespace luke_kernels {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace luke_kernels
