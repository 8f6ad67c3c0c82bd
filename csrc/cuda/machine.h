// What the kernels ask of the machine: a GPU's instructions, a function each. tests/cpp/emulator.h has the same functions
// for a CPU, lane by lane, and the kernels are compiled for both.
#pragma once

#ifdef LUKE_EMULATOR
#include "emulator.h"
#else

#include <cstdint>

#include "../dtype.h"

#define LUKE_DEVICE __device__ __forceinline__
#define LUKE_BOTH __host__ __device__ __forceinline__
#define LUKE_UNROLL _Pragma("unroll")
#define LUKE_LOOP _Pragma("unroll 1")
#define LUKE_PRAGMA(text) _Pragma(#text)
#define LUKE_UNROLL_BY(n) LUKE_PRAGMA(unroll n)

namespace luke_kernels::cuda {

// An address in shared memory, in bytes.
using Shared = uint32_t;

LUKE_DEVICE uint32_t thread_index() { return threadIdx.x; }
LUKE_DEVICE int block_index() { return blockIdx.x; }
LUKE_DEVICE void synchronize() { __syncthreads(); }

LUKE_DEVICE Shared shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return static_cast<Shared>(__cvta_generic_to_shared(memory));
}

// The value of the lane whose index differs in the bits of `mask`.
template <class V>
LUKE_DEVICE V exchange(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value of lane `source`.
LUKE_DEVICE float from_lane(float value, int source) { return __shfl_sync(0xffffffffu, value, source); }

// Copies kBytes, 4 or 16, from global memory into shared, or writes zeros where `exists` is false. Lands when waited for.
template <int kBytes>
LUKE_DEVICE void copy_async(Shared to, const void* from, bool exists) {
  const int bytes = exists ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  }
}

// Ends a group of copies.
LUKE_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the last kPending.
template <int kPending>
LUKE_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

struct Words {
  uint32_t w[4];
};

// Four matrices of 8 x 8 halves, whose rows of 16 bytes lie where lanes 8i to 8i + 7 say. Lane l gets the elements
// (l / 4, 2 (l % 4)) and next to it of each.
LUKE_DEVICE Words load_matrices(Shared row) {
  Words out;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.w[0]), "=r"(out.w[1]), "=r"(out.w[2]), "=r"(out.w[3])
               : "r"(row)
               : "memory");
  return out;
}

// The same, but lane l gets the elements (2 (l % 4), l / 4) and the one below.
LUKE_DEVICE Words load_matrices_transposed(Shared row) {
  Words out;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.w[0]), "=r"(out.w[1]), "=r"(out.w[2]), "=r"(out.w[3])
               : "r"(row)
               : "memory");
  return out;
}

// c (16 x 8) += a (16 x 16) b (16 x 8). With g = lane / 4 and t = lane % 4 a lane holds of c the elements (g, 2t),
// (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1); of a pairs at (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); of b pairs
// down from (2t, g) and (2t + 8, g).
template <DType T>
LUKE_DEVICE void multiply_add(float (&c)[4], const Words& a, uint32_t b0, uint32_t b1) {
  if constexpr (T == DType::kBFloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a.w[0]), "r"(a.w[1]), "r"(a.w[2]), "r"(a.w[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a.w[0]), "r"(a.w[1]), "r"(a.w[2]), "r"(a.w[3]), "r"(b0), "r"(b1));
  }
}

// Hopper's products of a warpgroup, four warps, each with 16 rows of its own. They run beside the threads: between
// warpgroup_begin and warpgroup_end nothing may touch the registers and tiles they use.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Makes this thread's copies, landed, visible to products of warpgroups; before a barrier.
LUKE_DEVICE void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Keeps the compiler from moving what sums and left factors are made of, or become, past this place.
template <int kM, int kN, int kA, int kB>
LUKE_DEVICE void pin(float (&c)[kM][kN][4], const Words (&a)[kA][kB]) {
  LUKE_UNROLL
  for (int i = 0; i < kM * kN * 4; ++i) asm volatile("" : "+f"(c[i / 4 / kN][i / 4 % kN][i % 4])::"memory");
  LUKE_UNROLL
  for (int i = 0; i < kA * kB * 4; ++i) asm volatile("" ::"r"(a[i / 4 / kB][i / 4 % kB].w[i % 4]) : "memory");
}

template <int kM, int kN, int kA, int kB>
LUKE_DEVICE void warpgroup_begin(float (&c)[kM][kN][4], const Words (&a)[kA][kB]) {
  pin(c, a);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

template <int kM, int kN, int kA, int kB>
LUKE_DEVICE void warpgroup_end(float (&c)[kM][kN][4], const Words (&a)[kA][kB]) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  pin(c, a);
}

// c (64 x 8 kN) += a (64 x 16) b (16 x 8 kN), a and c as in multiply_add, in each warp. `b` describes where the right factor
// lies: its columns in rows of a tile or, where kTransposed, in columns.
template <DType T, bool kTransposed, int kN>
LUKE_DEVICE void warpgroup_multiply_add(float (&c)[kN][4], const Words& a, uint64_t b) {
  static_assert(kN == 2 || kN == 4 || kN == 8);
#define LUKE_SUMS(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define LUKE_FACTORS "r"(a.w[0]), "r"(a.w[1]), "r"(a.w[2]), "r"(a.w[3]), "l"(b), "n"(kTransposed)
  if constexpr (T == DType::kBFloat16) {
    if constexpr (kN == 2) {
      asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1, 1, 1, %13;"
                   : LUKE_SUMS(0), LUKE_SUMS(1)
                   : LUKE_FACTORS);
    } else if constexpr (kN == 4) {
      asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, 1, 1, 1, %21;"
                   : LUKE_SUMS(0), LUKE_SUMS(1), LUKE_SUMS(2), LUKE_SUMS(3)
                   : LUKE_FACTORS);
    } else if constexpr (kN == 8) {
      asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
                   : LUKE_SUMS(0), LUKE_SUMS(1), LUKE_SUMS(2), LUKE_SUMS(3), LUKE_SUMS(4), LUKE_SUMS(5), LUKE_SUMS(6), LUKE_SUMS(7)
                   : LUKE_FACTORS);
    }
  } else {
    if constexpr (kN == 2) {
      asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1, 1, 1, %13;"
                   : LUKE_SUMS(0), LUKE_SUMS(1)
                   : LUKE_FACTORS);
    } else if constexpr (kN == 4) {
      asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, 1, 1, 1, %21;"
                   : LUKE_SUMS(0), LUKE_SUMS(1), LUKE_SUMS(2), LUKE_SUMS(3)
                   : LUKE_FACTORS);
    } else if constexpr (kN == 8) {
      asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
                   : LUKE_SUMS(0), LUKE_SUMS(1), LUKE_SUMS(2), LUKE_SUMS(3), LUKE_SUMS(4), LUKE_SUMS(5), LUKE_SUMS(6), LUKE_SUMS(7)
                   : LUKE_FACTORS);
    }
  }
#undef LUKE_SUMS
#undef LUKE_FACTORS
}

#else

LUKE_DEVICE void fence_copies() {}
template <class Sums, class Factors>
LUKE_DEVICE void warpgroup_begin(Sums&, const Factors&) {}
template <class Sums, class Factors>
LUKE_DEVICE void warpgroup_end(Sums&, const Factors&) {}
template <DType T, bool kTransposed, int kN>
LUKE_DEVICE void warpgroup_multiply_add(float (&)[kN][4], const Words&, uint64_t) {}

#endif

// Two floats rounded to halves, the first in the low bits.
template <DType T>
LUKE_DEVICE uint32_t pack(float low, float high) {
  uint32_t out;
  if constexpr (T == DType::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  }
  return out;
}

// A half, in the low bits, as a float.
template <DType T>
LUKE_DEVICE float unpack(uint32_t bits) {
  if constexpr (T == DType::kBFloat16) return __uint_as_float(bits << 16);
  float out;
  asm("{.reg .b16 half; mov.b32 {half, _}, %1; cvt.f32.f16 %0, half;}" : "=f"(out) : "r"(bits));
  return out;
}

struct Floats {
  float f[4];
};

LUKE_DEVICE Floats load_floats(Shared from) {
  Floats out;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(out.f[0]), "=f"(out.f[1]), "=f"(out.f[2]), "=f"(out.f[3])
               : "r"(from)
               : "memory");
  return out;
}

struct alignas(8) Pair {
  float f[2];
};

LUKE_DEVICE Pair load_pair(Shared from) {
  Pair out;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(out.f[0]), "=f"(out.f[1]) : "r"(from) : "memory");
  return out;
}

LUKE_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

LUKE_DEVICE float exp2_of(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

LUKE_DEVICE float log2_of(float x) { return log2f(x); }
LUKE_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
LUKE_DEVICE float infinity() { return __int_as_float(0x7f800000); }
LUKE_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

}  // namespace luke_kernels::cuda

#endif
