#include "tile.h"

// One source, the best instruction set of the machine at run time, where the compiler and libc can (GNU ifuncs).
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define LUKE_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LUKE_MULTIVERSION
#endif

namespace luke_kernels {

namespace {

// A cache line of T: the compiler maps it to the registers of each instruction set.
template <typename T>
struct Line {
  typedef T type __attribute__((vector_size(64), aligned(64), may_alias));
};

template <typename T>
inline __attribute__((always_inline)) void multiply_add_body(int64_t n, int64_t k, const T* a, const T* b, T* c) {
  using Vector = typename Line<T>::type;
  constexpr int64_t kVector = 64 / sizeof(T);
  for (int64_t i = 0; i < kBlock; i += kRows) {
    for (int64_t j = 0; j < n; j += kVector) {
      Vector sum[kRows];
      for (int64_t r = 0; r < kRows; ++r) sum[r] = *reinterpret_cast<const Vector*>(c + (i + r) * n + j);
      for (int64_t p = 0; p < k; ++p) {
        const Vector row = *reinterpret_cast<const Vector*>(b + p * n + j);
        for (int64_t r = 0; r < kRows; ++r) sum[r] += a[(i + r) * k + p] * row;
      }
      for (int64_t r = 0; r < kRows; ++r) *reinterpret_cast<Vector*>(c + (i + r) * n + j) = sum[r];
    }
  }
}

}  // namespace

LUKE_MULTIVERSION void multiply_add(int64_t n, int64_t k, const float* a, const float* b, float* c) {
  multiply_add_body(n, k, a, b, c);
}

LUKE_MULTIVERSION void multiply_add(int64_t n, int64_t k, const double* a, const double* b, double* c) {
  multiply_add_body(n, k, a, b, c);
}

size_t backward_scratch_bytes(const AttentionParams& params) {
  return dispatch(params.dtype, [&](auto scalar) {
    using T = acc_t<decltype(scalar)>;
    return sizeof(T) * kTiles * Scratch<T>::tile_size(params);
  });
}

}  // namespace luke_kernels
