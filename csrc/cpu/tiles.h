// Products by AMX: the CPU multiplies tiles of 16 rows by 64 bytes whole.
#pragma once

#include "words.h"

#if defined(__AMX_BF16__)

namespace luke_kernels::LUKE_ISA {

// The words, panels and sums of `Pairs`.
struct Tiles : Pairs {
  static constexpr int kTileVectors = 2;
  static constexpr int kTileSums = 16;
  static constexpr bool kTiled = true;

  static LUKE_INLINE void load_planes(const bfloat16* from, int64_t n, Vector (&planes)[kPlanes]) {
    planes[0] = load_pairs(from, n);
  }
};

// Numbers of float32 as sums of three bfloat16, which have its 24 bits between them: a plane of words each. Of the nine
// products of two numbers the three below 2^-24 of the largest are left out. An infinity makes NaN.
struct SplitTiles : Tiles {
  static constexpr int kDegree = kFineDegree;
  static constexpr int kPlanes = 3;

  static LUKE_INLINE Vector reciprocal(Vector x) { return broadcast(1) / x; }

  // Words of the first n numbers at `from`, zero beyond, plane by plane.
  static LUKE_INLINE void load_planes(const float* from, int64_t n, Vector (&planes)[kPlanes]) {
    Vector a = load_first(from, n), b = load_first(from + kLanes, n - kLanes);
#pragma GCC unroll 3
    for (int plane = 0; plane < kPlanes; ++plane) {
      const __m512i words = (__m512i)_mm512_cvtne2ps_pbh(b, a);
      planes[plane] = _mm512_castsi512_ps(words);
      // What is left.
      a -= _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(words)), 16));
      b -= _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1)), 16));
    }
  }

 private:
  static LUKE_INLINE Vector load_first(const float* from, int64_t n) {
    const __mmask16 exist = n >= kLanes ? 0xFFFF : n <= 0 ? 0 : (1 << n) - 1;
    return _mm512_maskz_loadu_ps(exist, from);
  }
};

// While it lives, all eight tiles of this thread have 16 rows of 64 bytes.
class FullTiles {
 public:
  FullTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const shapes;
    static_assert(sizeof shapes == 64);
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~FullTiles() { asm volatile("tilerelease"); }
  FullTiles(const FullTiles&) = delete;
  FullTiles& operator=(const FullTiles&) = delete;
};

// GCC's own functions do not say that they read memory.
template <int kTile>
LUKE_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
LUKE_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
LUKE_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kSums, int kA, int kB>
LUKE_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}

constexpr int64_t kTileRows = 16, kTileWords = 16;

// Clears, loads or stores the sums of one or two tiles of rows by one or two of columns: 16 lines of `kSumsLine` numbers
// for each tile of rows.
constexpr int64_t kSumsLine = 2 * kTileRows;

template <int kRowTiles, int kColumnTiles>
LUKE_INLINE void clear_sums() {
  clear_tile<0>();
  if constexpr (kColumnTiles == 2) clear_tile<1>();
  if constexpr (kRowTiles == 2) clear_tile<2>();
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) clear_tile<3>();
}
template <int kRowTiles, int kColumnTiles>
LUKE_INLINE void load_sums(const float* sums) {
  constexpr int64_t kLine = kSumsLine * sizeof(float);
  load_tile<0>(sums, kLine);
  if constexpr (kColumnTiles == 2) load_tile<1>(sums + kTileRows, kLine);
  if constexpr (kRowTiles == 2) load_tile<2>(sums + kTileRows * kSumsLine, kLine);
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) load_tile<3>(sums + kTileRows * kSumsLine + kTileRows, kLine);
}
template <int kRowTiles, int kColumnTiles>
LUKE_INLINE void store_sums_of_tiles(float* sums) {
  constexpr int64_t kLine = kSumsLine * sizeof(float);
  store_tile<0>(sums, kLine);
  if constexpr (kColumnTiles == 2) store_tile<1>(sums + kTileRows, kLine);
  if constexpr (kRowTiles == 2) store_tile<2>(sums + kTileRows * kSumsLine, kLine);
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) store_tile<3>(sums + kTileRows * kSumsLine + kTileRows, kLine);
}

// Adds products over kTileWords words. Every sum is the same wherever its row and column lie in a tile.
template <int kRowTiles, int kColumnTiles>
LUKE_INLINE void multiply_step(const uint32_t* a, const uint32_t* second_a, int64_t a_stride, const uint32_t* b,
                               int64_t b_stride) {
  constexpr int64_t kBytes = sizeof(uint32_t);
  load_tile<6>(b, b_stride * kBytes);
  load_tile<4>(a, a_stride * kBytes);
  if constexpr (kColumnTiles == 2) load_tile<7>(b + kTileWords, b_stride * kBytes);
  multiply_tiles<0, 4, 6>();
  if constexpr (kRowTiles == 2) load_tile<5>(second_a, a_stride * kBytes);
  if constexpr (kColumnTiles == 2) multiply_tiles<1, 4, 7>();
  if constexpr (kRowTiles == 2) multiply_tiles<2, 5, 6>();
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) multiply_tiles<3, 5, 7>();
}

// The same of planes: those of `a` lie one tile apart, those of `b` `b_plane` words. A tile is loaded anew where it has
// made room, so that sums may keep their four.
template <int kRowTiles, int kColumnTiles>
LUKE_INLINE void multiply_split_step(const uint32_t* a, const uint32_t* second_a, const uint32_t* b, int64_t b_stride,
                                     int64_t b_plane) {
  constexpr int64_t kBytes = sizeof(uint32_t);
  const auto load_a = [&](int plane) __attribute__((always_inline)) {
    load_tile<4>(a + plane * kTileRows * kTileWords, kTileWords * kBytes);
    if constexpr (kRowTiles == 2) load_tile<5>(second_a + plane * kTileRows * kTileWords, kTileWords * kBytes);
  };
  const auto load_b = [&](int plane) __attribute__((always_inline)) {
    load_tile<6>(b + plane * b_plane, b_stride * kBytes);
    if constexpr (kColumnTiles == 2) load_tile<7>(b + plane * b_plane + kTileWords, b_stride * kBytes);
  };
  const auto multiply = [&]() __attribute__((always_inline)) {
    multiply_tiles<0, 4, 6>();
    if constexpr (kColumnTiles == 2) multiply_tiles<1, 4, 7>();
    if constexpr (kRowTiles == 2) multiply_tiles<2, 5, 6>();
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) multiply_tiles<3, 5, 7>();
  };
  load_a(0);
  load_b(2);
  multiply();
  load_b(1);
  multiply();
  load_b(0);
  multiply();
  load_a(1);
  multiply();
  load_b(1);
  multiply();
  load_a(2);
  load_b(0);
  multiply();
}

// Hands sums of rows [row, end), which lie from `sums` on, to finish(row, sums).
template <int kVectors, class Finish>
LUKE_INLINE void finish_rows(int64_t row, int64_t end, const float* sums, const Finish& finish) {
  const auto run = [&](auto count) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    for (; row + kCount <= end; row += kCount, sums += kCount * kSumsLine) {
      Pairs::Vector block[kCount][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) block[r][v] = Pairs::load(sums + r * kSumsLine + v * kTileRows);
      }
      finish(row, block);
    }
  };
  run(std::integral_constant<int, 8>{});
  run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

// Copies what exists of a tile of rows: reading on might meet what is not ours, or NaN.
LUKE_INLINE void copy_tile(const uint32_t* from, int64_t stride, int64_t rows, int64_t words, uint32_t* to) {
  const __mmask16 exist = static_cast<__mmask16>((1 << words) - 1);
  for (int64_t r = 0; r < rows; ++r) {
    _mm512_store_si512(to + r * kTileWords, _mm512_maskz_loadu_epi32(exist, from + r * stride));
  }
}

// The sums of rows [first[0], + 16) and, of two tiles, [first[1], + 16). Of fewer rows than 16 there is one tile.
template <int kRowTiles, int kColumnTiles>
LUKE_INLINE void multiply_rows(const int64_t (&first)[2], int64_t rows, int64_t depth, const uint32_t* a,
                               int64_t a_stride, const uint32_t* b, int64_t b_stride, float* sums) {
  clear_sums<kRowTiles, kColumnTiles>();
  const int64_t whole = rows < kTileRows ? 0 : depth / kTileWords * kTileWords;
  for (int64_t k = 0; k < whole; k += kTileWords) {
    multiply_step<kRowTiles, kColumnTiles>(a + first[0] * a_stride + k, a + first[1] * a_stride + k, a_stride,
                                           b + k * b_stride, b_stride);
  }
  for (int64_t k = whole; k < depth; k += kTileWords) {
    alignas(64) uint32_t copies[2][kTileRows * kTileWords], columns[kTileWords * kSumsLine];
    const int64_t words = smaller(kTileWords, depth - k);
    for (int t = 0; t < kRowTiles; ++t) {
      copy_tile(a + first[t] * a_stride + k, a_stride, smaller(kTileRows, rows), words, copies[t]);
    }
    if (words == kTileWords) {
      multiply_step<kRowTiles, kColumnTiles>(copies[0], copies[1], kTileWords, b + k * b_stride, b_stride);
      continue;
    }
    for (int64_t w = 0; w < kTileWords; ++w) {
      for (int v = 0; v < kColumnTiles; ++v) {
        Pairs::Vector* const to = reinterpret_cast<Pairs::Vector*>(columns + w * kSumsLine + v * kTileWords);
        *to = w < words ? Pairs::words(b + (k + w) * b_stride + v * kTileWords) : Pairs::zero();
      }
    }
    multiply_step<kRowTiles, kColumnTiles>(copies[0], copies[1], kTileWords, columns, kSumsLine);
  }
  store_sums_of_tiles<kRowTiles, kColumnTiles>(sums);
}

// As product_of_panel. The last tile of rows begins 16 before their end, and what it repeats is not finished again.
template <int kVectors, class Finish>
LUKE_INLINE void product_of_tiles(int64_t rows, int64_t depth, const uint32_t* a, int64_t a_stride, const uint32_t* b,
                                  int64_t b_stride, const Finish& finish) {
  alignas(64) float sums[2 * kTileRows * kSumsLine];
  for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
    const bool two = rows - row > kTileRows;
    const int64_t last = larger(0, rows - kTileRows);
    const int64_t first[2] = {smaller(row, last), smaller(row + kTileRows, last)};
    if (two) {
      multiply_rows<2, kVectors>(first, rows, depth, a, a_stride, b, b_stride, sums);
    } else {
      multiply_rows<1, kVectors>(first, rows, depth, a, a_stride, b, b_stride, sums);
    }
    for (int t = 0; t < (two ? 2 : 1); ++t) {
      const int64_t begin = row + t * kTileRows;
      finish_rows<kVectors>(begin, smaller(begin + kTileRows, rows),
                            sums + (t * kTileRows + begin - first[t]) * kSumsLine, finish);
    }
  }
}

}  // namespace luke_kernels::LUKE_ISA

#endif
