// Dropout on tiles of sums: a lane draws for four columns at once, and lanes that share them tell one another.
#pragma once

#include "sequence.h"
#include "tiles.h"

namespace luke_kernels::cuda {

// Sets to zero, and the rest to itself times `factor`, the elements of rows whose first is row `first` of `rows` (plus 16 a
// tile) and of columns from `start` on, a multiple of 4.
template <int kTiles, int kN>
LUKE_DEVICE void drop_columns(const Draws& draws, const MixedRows& rows, int first, int start, Kind column_kind,
                              float (&c)[kTiles][kN][4], float factor) {
  // Of the two lanes that share four columns one draws for row g, the other for row g + 8.
  const int mine = lane() % 2;
  LUKE_UNROLL
  for (int m = 0; m < kTiles; ++m) {
    const int i = first + 16 * m + 8 * mine;
    const uint32_t row = rows.rank(i);
    const Kind row_kind = rows.kind(i);
    LUKE_UNROLL
    for (int n = 0; n < kN; ++n) {
      const uint32_t kept = draws.kept(start / 4 + 2 * n + lane() % 4 / 2, row, row_kind, column_kind);
      const uint32_t other = exchange(kept, 1);
      LUKE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t bits = (half == mine ? kept : other) >> 2 * mine;
        c[m][n][2 * half] = bits & 1 ? c[m][n][2 * half] * factor : 0;
        c[m][n][2 * half + 1] = bits & 2 ? c[m][n][2 * half + 1] * factor : 0;
      }
    }
  }
}

// Which elements are kept of tiles that are transposed, of columns from `first_column` on (plus 16 a tile) and rows from
// `first_row` on: bits 0 to 3 as the elements of c.
template <int kTiles, int kN>
LUKE_DEVICE void draw_rows(const Draws& draws, int first_column, Kind column_kind, int first_row, Kind row_kind,
                           uint32_t (&kept)[kTiles][kN]) {
  // Of the four lanes that share four columns each draws for one of: columns at g or g + 8, rows 2t or 2t + 1.
  const int mine = lane() / 4 % 4;
  LUKE_UNROLL
  for (int m = 0; m < kTiles; ++m) {
    const uint32_t group = (first_column + 16 * m + 8 * (mine / 2)) / 4 + lane() / 16;
    LUKE_UNROLL
    for (int n = 0; n < kN; ++n) {
      const uint32_t row = first_row + 8 * n + 2 * (lane() % 4) + mine % 2;
      uint32_t all = draws.kept(group, row, row_kind, column_kind) << 4 * mine;
      all |= exchange(all, 4);
      all |= exchange(all, 8);
      all >>= mine;
      kept[m][n] = (all & 1) | (all >> 4 & 1) << 1 | (all >> 8 & 1) << 2 | (all >> 12 & 1) << 3;
    }
  }
}

}  // namespace luke_kernels::cuda
