// How fast this machine multiplies and adds: what products are measured against.
#pragma once

#include "product.h"

namespace luke_kernels::LUKE_ISA {

// Hides from the compiler what a vector holds.
#if defined(__x86_64__)
#define LUKE_OPAQUE(vector) asm volatile("" : "+x"(vector))
#elif defined(__aarch64__)
#define LUKE_OPAQUE(vector) asm volatile("" : "+w"(vector))
#else
#define LUKE_OPAQUE(vector) asm volatile("" : "+m"(vector))
#endif

// Does nothing but what a product does, on registers: as many independent sums as a tile has. Returns the operations.
template <class M>
int64_t run_multiply_adds(int64_t rounds) {
  typename M::Vector sums[M::kTileSums], a = M::zero(), b = M::zero();
  for (auto& sum : sums) sum = M::zero();
  for (int64_t round = 0; round < rounds; ++round) {
    LUKE_OPAQUE(a);
    LUKE_OPAQUE(b);
#pragma GCC unroll 24
    for (int i = 0; i < M::kTileSums; ++i) sums[i] = M::dot(sums[i], a, b);
  }
  for (auto& sum : sums) LUKE_OPAQUE(sum);
  return rounds * M::kTileSums * M::kLanes * M::kDepth * 2;
}

#if defined(__AMX_BF16__)

template <>
inline int64_t run_multiply_adds<Tiles>(int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) {
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 4, 7>();
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }
  return rounds * 4 * kTileRows * kTileRows * kTileWords * Tiles::kDepth * 2;
}

#endif

}  // namespace luke_kernels::LUKE_ISA
