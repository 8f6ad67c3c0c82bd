#include "tile.h"

#include <pthread.h>

#ifdef _OPENMP
#include <omp.h>
#endif

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

// GNU OpenMP's threads do not survive a fork: a parallel region in the child would wait for them for ever.
bool in_forked_child = false;
[[maybe_unused]] const int fork_watch = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

}  // namespace

LUKE_MULTIVERSION void multiply_add(int64_t n, int64_t k, const float* a, const float* b, float* c) {
  multiply_add_body(n, k, a, b, c);
}

LUKE_MULTIVERSION void multiply_add(int64_t n, int64_t k, const double* a, const double* b, double* c) {
  multiply_add_body(n, k, a, b, c);
}

void parallel_for(int num_threads, int64_t tasks, void (*task)(int64_t, int, void*), void* context) {
#ifdef _OPENMP
  if (num_threads > 1 && !in_forked_child) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
    for (int64_t index = 0; index < tasks; ++index) task(index, omp_get_thread_num(), context);
    return;
  }
#endif
  for (int64_t index = 0; index < tasks; ++index) task(index, 0, context);
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

size_t attention_scratch_bytes_cpu(const AttentionParams& params) {
  return dispatch(params.dtype, [&](auto scalar) {
    using T = acc_t<decltype(scalar)>;
    return sizeof(T) * kTiles * Scratch<T>::tile_size(params) * params.num_threads;
  });
}

}  // namespace luke_kernels
