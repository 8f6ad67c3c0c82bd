// Tiles of rows in shared memory, and products of them: on tensor cores for halves, in fused multiply-adds for float32.
//
// A warp computes tiles of 16 x 8 sums, whose elements lie in its lanes as `multiply_add` says: with g = lane / 4 and
// t = lane % 4, rows g and g + 8, columns 2t and 2t + 1. float32 keeps the same places, so the kernels are the same.
#pragma once

#include "machine.h"

namespace luke_kernels::cuda {

constexpr uint32_t kWarpSize = 32;

template <DType T>
constexpr int kElementBytes = T == DType::kFloat32 ? 4 : 2;

LUKE_DEVICE uint32_t lane() { return thread_index() % kWarpSize; }
// The columns of this lane in tile n of a row of tiles: i is 0 or 1.
LUKE_DEVICE int lane_column(int n, int i) { return static_cast<int>(8 * n + 2 * (lane() % 4) + i); }
LUKE_DEVICE uint32_t warp() { return thread_index() / kWarpSize; }

// Where a chunk of 16 bytes lies in a tile of kRows rows of kHeadDim elements. Rows longer than a line of 128 bytes, all
// banks, are cut to panels of that width, one behind the other. The chunks of a row are permuted by the row, so that equal
// chunks of eight rows in succession lie in different banks. Products of warpgroups take tiles of halves just so (PTX ISA,
// "Shared Memory Matrix Layout").
template <DType T, int kHeadDim, int kRows>
struct Tile {
  static constexpr int kChunks = kHeadDim * kElementBytes<T> / 16;
  static constexpr int kPanelChunks = kChunks < 8 ? kChunks : 8;
  static constexpr int kLineBytes = kPanelChunks * 16, kPanelBytes = kRows * kLineBytes;
  static constexpr int kBytes = kChunks / kPanelChunks * kPanelBytes;

  LUKE_BOTH static uint32_t place(uint32_t row, uint32_t chunk) {
    constexpr uint32_t kRowsPerLine = 8 / kPanelChunks;
    const uint32_t panel = kChunks == kPanelChunks ? 0 : chunk / kPanelChunks * kPanelBytes;
    const uint32_t of_panel = kChunks == kPanelChunks ? chunk : chunk % kPanelChunks;
    return panel + row * kLineBytes + (of_panel ^ row / kRowsPerLine % kPanelChunks) * 16;
  }

  // Describes part of the tile to products of warpgroups, from elements on that have a place of their own in the first of
  // eight rows. Tiles lie at multiples of eight lines.
  LUKE_BOTH static uint64_t descriptor(Shared at) {
    constexpr uint64_t kSwizzle = kLineBytes == 128 ? 1 : 2;  // of 128 or 64 bytes
    constexpr uint64_t kUnused = 1, kEightLines = 8 * kLineBytes / 16;
    return kSwizzle << 62 | kEightLines << 32 | kUnused << 16 | at / 16 % (1 << 14);
  }
};

// Begins to copy kRows rows into a tile, by all threads. row(i) is the address of row i, or null: zeros. Chunks from
// `chunks` on are zeros too.
template <DType T, int kHeadDim, int kRows, int kThreads, class Row>
LUKE_DEVICE void copy_rows(Shared tile, int chunks, const void* anywhere, Row row) {
  using Places = Tile<T, kHeadDim, kRows>;
  constexpr int kStep = kThreads / Places::kChunks;
  static_assert(kThreads % Places::kChunks == 0 && kRows % kStep == 0);
  const int chunk = thread_index() % Places::kChunks;
  LUKE_UNROLL
  for (int pass = 0; pass < kRows / kStep; ++pass) {
    const int i = thread_index() / Places::kChunks + pass * kStep;
    const char* from = row(i);
    const bool exists = from != nullptr && chunk < chunks;
    copy_async<16>(tile + Places::place(i, chunk), exists ? from + chunk * 16 : anywhere, exists);
  }
}

// The rows of a warp as the left factor of products: kTiles x 16 of them. Halves are loaded to registers, kResident of
// them for as long as the rows are in use, the others for each product.
template <DType T, int kTiles, int kHeadDim, int kTileRows, bool kResident = true>
struct Rows {
  using Places = Tile<T, kHeadDim, kTileRows>;
  static constexpr bool kInRegisters = kResident;
  Words a[kResident ? kTiles : 1][kResident ? kHeadDim / 16 : 1];
  Shared tile;
  int first_row;

  LUKE_DEVICE void load(Shared from, int row) {
    tile = from;
    first_row = row;
    if constexpr (kResident) {
      LUKE_UNROLL
      for (int m = 0; m < kTiles; ++m) {
        LUKE_UNROLL
        for (int k = 0; k < kHeadDim / 16; ++k) a[m][k] = read(m, k);
      }
    }
  }

  LUKE_DEVICE Words read(int m, int k) const {
    const int row = first_row + 16 * m + lane() % 16;
    return load_matrices(tile + Places::place(row, 2 * k + lane() / 16));
  }

  LUKE_DEVICE Words fragment(int m, int k) const {
    if constexpr (kResident) return a[m][k];
    return read(m, k);
  }

  // Sums of products with the same elements of other rows, of rows g and g + 8.
  LUKE_DEVICE void dot(const Rows& other, float (&sums)[kTiles][2]) const {
    LUKE_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      sums[m][0] = sums[m][1] = 0;
      LUKE_UNROLL
      for (int k = 0; k < kHeadDim / 16; ++k) {
        const Words mine = fragment(m, k), theirs = other.fragment(m, k);
        LUKE_UNROLL
        for (int i = 0; i < 4; ++i) {
          float& sum = sums[m][i % 2];
          const uint32_t x = mine.w[i], y = theirs.w[i];
          sum = fused_multiply_add(unpack<T>(x), unpack<T>(y), sum);
          sum = fused_multiply_add(unpack<T>(x >> 16), unpack<T>(y >> 16), sum);
        }
      }
    }
  }
};

// float32 is read a chunk at a time.
template <int kTiles, int kHeadDim, int kTileRows, bool kResident>
struct Rows<DType::kFloat32, kTiles, kHeadDim, kTileRows, kResident> {
  static constexpr bool kInRegisters = false;
  Shared tile;
  int first_row;

  LUKE_DEVICE void load(Shared from, int row) {
    tile = from;
    first_row = row;
  }

  LUKE_DEVICE Floats chunk(int m, int half, int k) const {
    const int row = first_row + 16 * m + 8 * half + lane() / 4;
    return load_floats(tile + Tile<DType::kFloat32, kHeadDim, kTileRows>::place(row, k));
  }

  LUKE_DEVICE void dot(const Rows& other, float (&sums)[kTiles][2]) const {
    LUKE_UNROLL
    for (int m = 0; m < kTiles; ++m) {
      LUKE_UNROLL
      for (int half = 0; half < 2; ++half) {
        sums[m][half] = 0;
        LUKE_UNROLL
        for (int k = 0; k < kHeadDim / 16; ++k) {
          const Floats x = chunk(m, half, 4 * k + lane() % 4), y = other.chunk(m, half, 4 * k + lane() % 4);
          LUKE_UNROLL
          for (int i = 0; i < 4; ++i) sums[m][half] = fused_multiply_add(x.f[i], y.f[i], sums[m][half]);
        }
      }
    }
  }
};

// Sums of the four lanes that share rows.
template <int kTiles>
LUKE_DEVICE void add_up_rows(float (&sums)[kTiles][2]) {
  LUKE_UNROLL
  for (int m = 0; m < kTiles; ++m) {
    LUKE_UNROLL
    for (int half = 0; half < 2; ++half) {
      sums[m][half] += exchange(sums[m][half], 1);
      sums[m][half] += exchange(sums[m][half], 2);
    }
  }
}

// c += left right^T: the columns of c are the first 8 kN of the kRightRows rows of the tile `right`.
template <DType T, int kHeadDim, int kRightRows, bool kWarpgroups, int kM, int kN, int kLeftRows, bool kResident>
LUKE_DEVICE void multiply_by_rows(float (&c)[kM][kN][4], const Rows<T, kM, kHeadDim, kLeftRows, kResident>& left,
                                  Shared right) {
  using Places = Tile<T, kHeadDim, kRightRows>;
  if constexpr (kWarpgroups) {
    Words a[kHeadDim / 16][kM];
    LUKE_UNROLL
    for (int k = 0; k < kHeadDim / 16; ++k) {
      LUKE_UNROLL
      for (int m = 0; m < kM; ++m) a[k][m] = left.fragment(m, k);
    }
    warpgroup_begin(c, a);
    LUKE_UNROLL
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const uint64_t b = Places::descriptor(right + k / 4 * Places::kPanelBytes + k % 4 * 32);
      LUKE_UNROLL
      for (int m = 0; m < kM; ++m) warpgroup_multiply_add<T, false>(c[m], a[k][m], b);
    }
    warpgroup_end(c, a);
  } else if constexpr (T == DType::kFloat32) {
    LUKE_LOOP
    for (int k = 0; k < kHeadDim / 4; ++k) {
      Floats a[kM][2];
      LUKE_UNROLL
      for (int m = 0; m < kM; ++m) {
        a[m][0] = left.chunk(m, 0, k);
        a[m][1] = left.chunk(m, 1, k);
      }
      LUKE_UNROLL
      for (int n = 0; n < kN; ++n) {
        LUKE_UNROLL
        for (int column = 0; column < 2; ++column) {
          const Floats b = load_floats(right + Places::place(8 * n + 2 * (lane() % 4) + column, k));
          LUKE_UNROLL
          for (int m = 0; m < kM; ++m) {
            LUKE_UNROLL
            for (int half = 0; half < 2; ++half) {
              float& sum = c[m][n][2 * half + column];
              LUKE_UNROLL
              for (int i = 0; i < 4; ++i) sum = fused_multiply_add(a[m][half].f[i], b.f[i], sum);
            }
          }
        }
      }
    }
  } else {
    static_assert(kN % 2 == 0);
    // Registers can be indexed in unrolled loops only; where they hold no rows, fewer addresses at a time spare some.
    [[maybe_unused]] constexpr int kUnrolled = kResident ? kHeadDim / 16 : 2;
    LUKE_UNROLL_BY(kUnrolled)
    for (int k = 0; k < kHeadDim / 16; ++k) {
      Words a[kM];
      LUKE_UNROLL
      for (int m = 0; m < kM; ++m) a[m] = left.fragment(m, k);
      LUKE_UNROLL
      for (int n = 0; n < kN; n += 2) {
        const int row = 8 * n + lane() / 16 * 8 + lane() % 8;
        const Words b = load_matrices(right + Places::place(row, 2 * k + lane() / 8 % 2));
        LUKE_UNROLL
        for (int m = 0; m < kM; ++m) {
          multiply_add<T>(c[m][n], a[m], b.w[0], b.w[1]);
          multiply_add<T>(c[m][n + 1], a[m], b.w[2], b.w[3]);
        }
      }
    }
  }
}

// c += left right: `left` holds sums as products give them, its columns are the first 8 kK of the rows of `right`.
template <DType T, int kHeadDim, int kRightRows, bool kWarpgroups, int kM, int kK>
LUKE_DEVICE void multiply_by_columns(float (&c)[kM][kHeadDim / 8][4], const float (&left)[kM][kK][4], Shared right) {
  using Places = Tile<T, kHeadDim, kRightRows>;
  if constexpr (T == DType::kFloat32) {
    LUKE_UNROLL
    for (int k = 0; k < kK; ++k) {
      LUKE_LOOP
      for (int t = 0; t < 4; ++t) {
        LUKE_UNROLL
        for (int i = 0; i < 2; ++i) {
          float a[kM][2];
          LUKE_UNROLL
          for (int m = 0; m < kM; ++m) {
            LUKE_UNROLL
            for (int half = 0; half < 2; ++half) {
              a[m][half] = from_lane(left[m][k][2 * half + i], lane() / 4 * 4 + t);
            }
          }
          LUKE_UNROLL
          for (int n = 0; n < kHeadDim / 8; ++n) {
            const Pair b = load_pair(right + Places::place(8 * k + 2 * t + i, 2 * n + lane() % 4 / 2) + lane() % 2 * 8);
            LUKE_UNROLL
            for (int m = 0; m < kM; ++m) {
              LUKE_UNROLL
              for (int j = 0; j < 4; ++j) c[m][n][j] = fused_multiply_add(a[m][j / 2], b.f[j % 2], c[m][n][j]);
            }
          }
        }
      }
    }
  } else {
    static_assert(kK % 2 == 0);
    Words a[kK / 2][kM];
    LUKE_UNROLL
    for (int k = 0; k < kK / 2; ++k) {
      LUKE_UNROLL
      for (int m = 0; m < kM; ++m) {
        LUKE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float(&sums)[4] = left[m][2 * k + i / 2];
          a[k][m].w[i] = pack<T>(sums[i % 2 * 2], sums[i % 2 * 2 + 1]);
        }
      }
    }
    if constexpr (kWarpgroups) {
      warpgroup_begin(c, a);
      LUKE_UNROLL
      for (int k = 0; k < kK / 2; ++k) {
        constexpr int kN = kHeadDim < 64 ? kHeadDim / 8 : 8;  // of a panel
        LUKE_UNROLL
        for (int n = 0; n < kHeadDim / 8; n += kN) {
          const uint64_t b = Places::descriptor(right + n / kN * Places::kPanelBytes + 16 * k * Places::kLineBytes);
          LUKE_UNROLL
          for (int m = 0; m < kM; ++m) {
            warpgroup_multiply_add<T, true>(reinterpret_cast<float(&)[kN][4]>(c[m][n]), a[k][m], b);
          }
        }
      }
      warpgroup_end(c, a);
    } else {
      LUKE_UNROLL
      for (int k = 0; k < kK / 2; ++k) {
        LUKE_UNROLL
        for (int n = 0; n < kHeadDim / 8; n += 2) {
          const Words b = load_matrices_transposed(right + Places::place(16 * k + lane() % 16, n + lane() / 16));
          LUKE_UNROLL
          for (int m = 0; m < kM; ++m) {
            multiply_add<T>(c[m][n], a[k][m], b.w[0], b.w[1]);
            multiply_add<T>(c[m][n + 1], a[k][m], b.w[2], b.w[3]);
          }
        }
      }
    }
  }
}

template <int kM, int kN>
LUKE_DEVICE void clear(float (&c)[kM][kN][4]) {
  LUKE_UNROLL
  for (int m = 0; m < kM; ++m) {
    LUKE_UNROLL
    for (int n = 0; n < kN; ++n) {
      LUKE_UNROLL
      for (int i = 0; i < 4; ++i) c[m][n][i] = 0;
    }
  }
}

// Writes one row of each half of a tile of sums times `factor`, elements up to head_dim, a multiple of 4 (8 for halves).
template <DType T, int kN>
LUKE_DEVICE void store_row(void* row, int head_dim, const float (&c)[kN][4], int half, float factor) {
  LUKE_UNROLL
  for (int n = 0; n < kN; ++n) {
    const int column = lane_column(n, 0);
    const float low = c[n][2 * half] * factor, high = c[n][2 * half + 1] * factor;
    if (column < head_dim) {
      if constexpr (T == DType::kFloat32) {
        *reinterpret_cast<Pair*>(static_cast<float*>(row) + column) = Pair{{low, high}};
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(row) + column) = pack<T>(low, high);
      }
    }
  }
}

}  // namespace luke_kernels::cuda
