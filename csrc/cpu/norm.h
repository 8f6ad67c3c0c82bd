// Layer normalisation of rows: y = (x - mean) / sqrt(variance + eps) w + b.
#pragma once

#include <cmath>

#include "pack.h"

namespace luke_kernels::LUKE_ISA {

// The sum of what f returns of each vector, from number i of the row on.
template <typename F>
LUKE_INLINE float sum_of_row(int64_t size, const F& f) {
  using V = Floats;
  constexpr int kSums = 4;
  V::Vector sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * V::kLanes <= size; i += kSums * V::kLanes) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) sums[s] += f(i + s * V::kLanes);
  }
  for (; i < size; i += V::kLanes) sums[0] += f(i);
  const V::Vector all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0;
  for (int lane = 0; lane < V::kLanes; ++lane) sum += all[lane];
  return sum;
}

template <typename In>
void normalise(const Norm& norm, Span rows) {
  using M = Single<Floats>;
  using Vector = M::Vector;
  const int64_t size = norm.size;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const In* const x = row_of<In>(norm.x, row);
    In* const y = row_of_output<In>(norm.out, row);
    const auto numbers = [&](const void* from, int64_t i) __attribute__((always_inline)) {
      return widen_first<M>(static_cast<const In*>(from) + i, size - i);
    };
    const Vector mean = M::broadcast(
        sum_of_row(size, [&](int64_t i) __attribute__((always_inline)) { return numbers(x, i); }) / size);
    const float variance = sum_of_row(size, [&](int64_t i) __attribute__((always_inline)) {
      const Vector away = M::first(size - i, numbers(x, i) - mean, M::zero());
      return away * away;
    }) / size;
    const Vector scale = M::broadcast(1 / std::sqrt(variance + norm.eps));
    for (int64_t i = 0; i < size; i += M::kLanes) {
      const Vector weighted = (numbers(x, i) - mean) * scale * numbers(norm.weight, i) + numbers(norm.bias, i);
      narrow_first<M>(weighted, y + i, size - i);
    }
  }
}

}  // namespace luke_kernels::LUKE_ISA
