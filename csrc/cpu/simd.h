// Vectors of the instruction set that this file is compiled for: AVX-512, AVX2, or what the compiler makes of 16 bytes.
// All lies in a namespace of that instruction set, so that the linker cannot put one's function in another's place.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "head.h"


namespace luke_kernels::LUKE_ISA {

// What holds of a vector of T however wide, by the compiler's vector extension.
template <typename T, int kBytes>
struct Generic {
  using Scalar = T;
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vector __attribute__((vector_size(kBytes)));
  typedef Integer Integers __attribute__((vector_size(kBytes)));
  static constexpr int kLanes = kBytes / sizeof(T);
  // Rows and vectors of the tile whose sums stay in registers: 12 of 16.
  static constexpr int kTileVectors = 2;
  static constexpr int kTileSums = 12;

  static LUKE_INLINE Vector zero() { return Vector{}; }
  static LUKE_INLINE Vector broadcast(T x) { return x - Vector{}; }
  static LUKE_INLINE Vector load(const T* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static LUKE_INLINE void store(T* to, Vector v) { std::memcpy(to, &v, sizeof v); }
  static LUKE_INLINE Vector max(Vector a, Vector b) { return a > b ? a : b; }
  // a b + c, fused where the instruction set can.
  static LUKE_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
  // Lanes below n of a, the rest of b.
  static LUKE_INLINE Vector first(int64_t n, Vector a, Vector b) {
    Integers lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane < static_cast<Integer>(n) ? a : b;
  }
  // Keeps lanes whose draw is at least the threshold; the rest become 0.
  static LUKE_INLINE Vector kept(Vector v, const int32_t* draws, int32_t threshold) {
    Integers drawn;
    for (int i = 0; i < kLanes; ++i) drawn[i] = draws[i];
    return drawn >= static_cast<Integer>(threshold) ? v : zero();
  }
  static LUKE_INLINE Vector interleave_low(Vector a, Vector b) { return interleave(a, b, 0); }
  static LUKE_INLINE Vector interleave_high(Vector a, Vector b) { return interleave(a, b, kLanes / 2); }

  // For 2^x: x, brought to where the two below are exact and 2^x is zero, or infinite, all the same. NaN stays NaN.
  static LUKE_INLINE Vector bounded(Vector x) {
    const Vector lowest = broadcast(T(-2 * kBias)), highest = broadcast(T(kBias + 1));
    x = x < lowest ? lowest : x;
    return x > highest ? highest : x;
  }
  // Returns x less a whole number, in [0, 1].
  static LUKE_INLINE Vector fraction(Vector x) {
    constexpr T kShift = T(3) * (int64_t{1} << (kMantissa - 1));  // leaves no bit for a fraction
    return x - ((x - T(0.5) + kShift) - kShift);
  }
  // Returns y 2^(x - f), of a fraction f of x.
  static LUKE_INLINE Vector scale(Vector y, Vector x, Vector f) {
    // In two steps, whose factors are normal though the result is not.
    const Integers whole = __builtin_convertvector(x - f, Integers), half = whole >> 1;
    return y * (Vector)((half + kBias) << kMantissa) * (Vector)((whole - half + kBias) << kMantissa);
  }

  static LUKE_INLINE Vector widen(const T* from) { return load(from); }
  static LUKE_INLINE void narrow(Vector v, T* to) { store(to, v); }

 private:
  static constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52, kBias = sizeof(T) == 4 ? 127 : 1023;

  static LUKE_INLINE Vector interleave(Vector a, Vector b, int from) {
    Vector result;
    for (int i = 0; i < kLanes; i += 2) {
      result[i] = a[from + i / 2];
      result[i + 1] = b[from + i / 2];
    }
    return result;
  }
};

// float32, widened from and narrowed to what the tensors hold.
template <int kBytes>
struct GenericFloats : Generic<float, kBytes> {
  using Base = Generic<float, kBytes>;
  using typename Base::Vector;
  using Base::kLanes;
  using Base::narrow;
  using Base::widen;

  static LUKE_INLINE Vector widen(const bfloat16* from) {
    Vector v;
    for (int i = 0; i < kLanes; ++i) v[i] = to_float(from[i]);
    return v;
  }
  static LUKE_INLINE Vector widen(const float16* from) {
    Vector v;
    for (int i = 0; i < kLanes; ++i) v[i] = to_float(from[i]);
    return v;
  }
  static LUKE_INLINE void narrow(Vector v, bfloat16* to) {
    for (int i = 0; i < kLanes; ++i) to[i] = to_bfloat16(v[i]);
  }
  static LUKE_INLINE void narrow(Vector v, float16* to) {
    for (int i = 0; i < kLanes; ++i) to[i] = to_float16(v[i]);
  }
};

#if defined(__AVX512F__)

struct Floats : GenericFloats<64> {
  static constexpr int kTileVectors = 4;
  static constexpr int kTileSums = 24;  // of 32 registers

  static LUKE_INLINE Vector broadcast(float x) { return _mm512_set1_ps(x); }
  static LUKE_INLINE Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static LUKE_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static LUKE_INLINE Vector first(int64_t n, Vector a, Vector b) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(n >= kLanes ? 0xFFFF : (1 << n) - 1), b, a);
  }
  static LUKE_INLINE Vector interleave_low(Vector a, Vector b) {
    const __m512i lanes = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(a, lanes, b);
  }
  static LUKE_INLINE Vector interleave_high(Vector a, Vector b) {
    const __m512i lanes = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_ps(a, lanes, b);
  }
  static LUKE_INLINE Vector bounded(Vector x) { return x; }
  static LUKE_INLINE Vector fraction(Vector x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF); }
  static LUKE_INLINE Vector scale(Vector y, Vector x, Vector) { return _mm512_scalef_ps(y, x); }  // of the floor of x

  using GenericFloats::narrow;
  using GenericFloats::widen;
  static LUKE_INLINE Vector widen(const bfloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static LUKE_INLINE Vector widen(const float16* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static LUKE_INLINE void narrow(Vector v, float16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static LUKE_INLINE void narrow(Vector v, bfloat16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bfloat16s(v));
  }

  static LUKE_INLINE __m256i to_bfloat16s(Vector v) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    // Round to nearest even; a NaN stays one.
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000)), 16));
#endif
  }
};

#elif defined(__AVX2__)

struct Floats : GenericFloats<32> {
  static LUKE_INLINE Vector broadcast(float x) { return _mm256_set1_ps(x); }
  static LUKE_INLINE Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
  static LUKE_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static LUKE_INLINE Vector interleave_low(Vector a, Vector b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
  }
  static LUKE_INLINE Vector interleave_high(Vector a, Vector b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
  }

  using GenericFloats::narrow;
  using GenericFloats::widen;
  static LUKE_INLINE Vector widen(const bfloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static LUKE_INLINE Vector widen(const float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static LUKE_INLINE void narrow(Vector v, float16* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static LUKE_INLINE void narrow(Vector v, bfloat16* to) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }
};

#else

using Floats = GenericFloats<16>;

#endif

// Of few lanes: float64 serves checks of gradients.
using Doubles = Generic<double, 16>;

// Of exp2 to 2 ulp, of which rounding takes more where multiply-adds are not fused; and to a tenth of bfloat16's
// rounding.
#if defined(__FMA__)
constexpr int kFineDegree = 5;
#else
constexpr int kFineDegree = 6;
#endif
constexpr int kCoarseDegree = 3;

// Returns 2^x; x may be -inf. Polynomials that are 1 at 0, of relative errors 0.9e-4, 1.2e-7 and 3.2e-9 on [0, 1].
template <int kDegree>
LUKE_INLINE Floats::Vector exp2(Floats::Vector x) {
  static_assert(kDegree == 3 || kDegree == 5 || kDegree == 6);
  constexpr int kPolynomial = kDegree == 3 ? 0 : kDegree - 4;
  constexpr float kCoefficients[3][6] = {
      {0.69511679f, 0.22764499f, 0.077067042f},
      {0.69315247f, 0.24015281f, 0.055835927f, 0.0089733787f, 0.0018852974f},
      {0.69314700f, 0.24022990f, 0.055482486f, 0.0096811694f, 0.0012414924f, 0.00021794658f}};
  x = Floats::bounded(x);
  const Floats::Vector f = Floats::fraction(x);
  const float* coefficients = kCoefficients[kPolynomial];
  Floats::Vector y = Floats::broadcast(coefficients[kDegree - 1]);
#pragma GCC unroll 6
  for (int i = kDegree - 2; i >= 0; --i) y = Floats::multiply_add(y, f, Floats::broadcast(coefficients[i]));
  return Floats::scale(Floats::multiply_add(y, f, Floats::broadcast(1)), x, f);
}

template <int kDegree>
LUKE_INLINE Doubles::Vector exp2(Doubles::Vector x) {
  for (int i = 0; i < Doubles::kLanes; ++i) x[i] = std::exp2(x[i]);
  return x;
}

}  // namespace luke_kernels::LUKE_ISA
