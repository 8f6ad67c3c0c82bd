// y = f(x W^T + b) + r of a block of rows: weights are packed once, in panels of as many columns as a tile has.
//
// A panel meets a block of rows a piece of its depth at a time: the piece stays in the first cache while the rows, which
// stay in the second, pass it. Bias, activation and residual are added while the last sums lie in registers.
#pragma once

#include "blocks.h"
#include "pack.h"

namespace luke_kernels::LUKE_ISA {

// x Phi(x): Phi(x) = erfc(-x / sqrt(2)) / 2, and erfc(z) = exp(-z^2) t P(t), t = 1 / (1 + z / 2), for z >= 0. P is of
// relative error 5e-8 up to where the result is zero, or, for bfloat16, of 1.6e-4.
template <class M>
LUKE_INLINE Floats::Vector gelu(Floats::Vector x) {
  using V = Floats;
  constexpr bool kCoarse = M::kDegree == kCoarseDegree;
  constexpr int kTerms = kCoarse ? 5 : 9;
  constexpr float kCoefficients[2][9] = {
      {0.282086432f, 0.282375276f, 0.24310407f, 0.202685416f, -0.0266216863f, 0.278060526f, -0.487193286f, 0.284571379f,
       -0.0590681396f},
      {0.280990928f, 0.300782889f, 0.140273482f, 0.431876004f, -0.153766558f}};
  const float* const coefficients = kCoefficients[kCoarse];
  const V::Vector size = V::max(x, V::zero() - x);
  const V::Vector t = M::reciprocal(V::multiply_add(size, V::broadcast(0.35355339f), V::broadcast(1)));
  V::Vector tail = V::broadcast(coefficients[kTerms - 1]);
#pragma GCC unroll 8
  for (int i = kTerms - 2; i >= 0; --i) tail = V::multiply_add(tail, t, V::broadcast(coefficients[i]));
  // x Phi(-|x|), of which the sign is that of x.
  tail = tail * t * V::broadcast(0.5f) * exp2<M::kDegree>(x * x * V::broadcast(-0.72134752f)) * x;
  return x > V::zero() ? x - tail : tail;
}

template <class M, typename In>
class LinearBlock {
  using Word = typename M::Word;
  using Vector = typename M::Vector;
  static constexpr int64_t kLanes = M::kLanes;
  // Of a panel's piece: half of a first cache of 32 KB; with AVX-512, whose panels are wide, two thirds of one of 48.
  // With AMX all of it, for to store sums and to load them again costs more than the second cache does; of three planes,
  // which are read twice, half.
  static constexpr int64_t kPieceBytes = M::kPlanes == 3 ? 24576 : M::kTiled ? 49152 : kLanes == 16 ? 32768 : 16384;
  static constexpr int64_t kPiece = kPieceBytes / (kPanel<M> * M::kPlanes * sizeof(Word));  // words of depth
  // Of a block of rows: half of a second cache of 512 KB, or of 2 MB where there is AMX.
  static constexpr int64_t kRowBytes = (M::kTiled ? 1024 : 256) * 1024;
  static constexpr int64_t kMaxRows = M::kTiled ? 512 : 96;
  // With AMX deep rows are cut, so that a block has many: panels of a group meet a slab of the depth, then the next.
  static constexpr int64_t kSlabBytes = 6144;
  static constexpr int64_t kGroup = 8;  // panels

 public:
  LinearBlock(const Linear& linear, Memory& memory)
      : linear_(linear),
        depth_(depth(linear.in_size)),
        stride_(row_words(linear.in_size)),
        sums_(memory.take<float>(max_rows(linear.in_size) * kPanel<M> * group(linear.in_size))) {}

  // Rows of a block: as many as stay in the second cache.
  static int64_t max_rows(int64_t in_size) {
    const int64_t words = M::kTiled ? slab(in_size) * M::kPlanes : row_words(in_size);
    const int64_t fit = kRowBytes / static_cast<int64_t>(sizeof(Word)) / words;
    return larger(kRowMultiple, smaller(fit, kMaxRows) / kRowMultiple * kRowMultiple);
  }

  // Blocks are of so many rows, or a multiple.
  static constexpr int64_t kRowMultiple = M::kTiled ? 32 : rows_of_tile<M>(M::kTileVectors);

  static int64_t num_panels(int64_t out_size) { return (out_size + kPanel<M> - 1) / kPanel<M>; }

  // Words of a packed row.
  static int64_t row_words(int64_t in_size) {
    return M::kTiled ? M::kPlanes * depth(in_size) : padded_words<M>(in_size);
  }

  static int64_t packed_words(int64_t in_size, int64_t out_size) {
    return num_panels(out_size) * panel_words(in_size);
  }

  static void pack(const Matrix& weight, int64_t in_size, int64_t out_size, void* packed) {
    for (int64_t p = 0; p < num_panels(out_size); ++p) {
      const int64_t first = p * kPanel<M>, count = smaller(kPanel<M>, out_size - first);
      Word* const to = static_cast<Word*>(packed) + p * panel_words(in_size);
#if defined(__AMX_BF16__)
      if constexpr (M::kTiled) {
        // Piece by piece of the depth, plane by plane.
        for (int64_t k = 0; k < depth(in_size); k += kPiece) {
          const int64_t size = smaller(kPiece, depth(in_size) - k), words = smaller(size, in_words(in_size) - k);
          for (int plane = 0; plane < M::kPlanes; ++plane) {
            pack_columns_of<M>(count, words, to + (k * M::kPlanes + plane * size) * kPanel<M>, kPanel<M>,
                               [&](int64_t i, int64_t w) {
                                 const int64_t number = (k + w) * M::kDepth;
                                 const In* from = row_of<In>(weight, first + i) + number;
                                 Vector planes[M::kPlanes];
                                 M::load_planes(from, in_size - number, planes);
                                 return planes[plane];
                               });
          }
        }
        continue;
      }
#endif
      pack_columns<M, In>(weight, first, count, in_size, to, kPanel<M>);
    }
  }

  // Whether rows are read as they lie, without being packed.
  static bool are_words(const Linear& linear) {
    const Matrix& x = linear.x;
    return !M::kTiled && std::is_same_v<In, typename M::Item> && linear.in_size % M::kDepth == 0 &&
           x.stride % M::kDepth == 0 && reinterpret_cast<uintptr_t>(x.data) % sizeof(Word) == 0;
  }

  // Packs some rows of a block, from a multiple of kRowMultiple on, to their places in what is packed of the block.
  static void pack_rows_of(const Linear& linear, Span block, Span rows, void* packed) {
    Word* const to = static_cast<Word*>(packed);
    const int64_t stride = row_words(linear.in_size), count = rows.end - rows.begin, place = rows.begin - block.begin;
#if defined(__AMX_BF16__)
    if constexpr (M::kTiled) {
      // Piece by piece of the depth, tile by tile of rows, step by step, plane by plane.
      constexpr int64_t kTile = kTileRows * kTileWords;
      const int64_t tiles = (block.end - block.begin + kTileRows - 1) / kTileRows, words = depth(linear.in_size);
      for (int64_t k = 0; k < words; k += kTileWords) {
        const int64_t piece = k / kPiece * kPiece, size = smaller(kPiece, words - piece);
        const int64_t number = k * M::kDepth;
        for (int64_t i = 0; i < count; i += kTileRows) {
          const int64_t step = (piece * tiles + (place + i) / kTileRows * size + k - piece) / kTileWords;
          for (int64_t r = 0; r < kTileRows; ++r) {
            // Rows that do not exist are some that do.
            const In* from = row_of<In>(linear.x, rows.begin + smaller(i + r, count - 1)) + number;
            Vector planes[M::kPlanes];
            M::load_planes(from, linear.in_size - number, planes);
            for (int plane = 0; plane < M::kPlanes; ++plane) {
              store_words<M>(to + (step * M::kPlanes + plane) * kTile + r * kTileWords, planes[plane]);
            }
          }
        }
      }
      return;
    }
#endif
    static_cast<void>(block);
    pack_rows<M, In>(linear.x, rows.begin, count, linear.in_size, to + place * stride, stride);
  }

  // A block of rows, packed unless they are read as they lie, by some panels.
  void run(Span rows, Span panels, const void* packed) {
    const Word* a = static_cast<const Word*>(packed);
    int64_t a_stride = stride_;
    if (!a) {
      a = reinterpret_cast<const Word*>(row_of<In>(linear_.x, rows.begin));
      a_stride = linear_.x.stride / M::kDepth;
    }
#if defined(__AMX_BF16__)
    if constexpr (M::kTiled) return run_groups(rows, panels, a);
#endif
    for (int64_t p = panels.begin; p < panels.end; ++p) run_panel(rows, p, a, a_stride);
  }

 private:
  static int64_t in_words(int64_t in_size) { return (in_size + M::kDepth - 1) / M::kDepth; }

  // Words that are multiplied, of rows and of columns.
  static int64_t depth(int64_t in_size) {
#if defined(__AMX_BF16__)
    if constexpr (M::kTiled) return round_up(in_words(in_size), kTileWords);
#endif
    return in_words(in_size);
  }

  // Words of a slab, a multiple of those of a piece unless it is the only one; and how many panels meet it in turn.
  static int64_t slab(int64_t in_size) {
    constexpr int64_t kMost = kSlabBytes / (M::kPlanes * sizeof(Word));
    const int64_t words = depth(in_size), slabs = (words + kMost - 1) / kMost;
    return slabs <= 1 ? words : round_up((words + slabs - 1) / slabs, kPiece);
  }
  static int64_t group(int64_t in_size) { return M::kTiled && slab(in_size) < depth(in_size) ? kGroup : 1; }

  static int64_t panel_words(int64_t in_size) { return M::kPlanes * kPanel<M> * depth(in_size); }

  const Word* panel(int64_t p) const {
    return static_cast<const Word*>(linear_.packed) + p * panel_words(linear_.in_size);
  }

  void run_panel(Span rows, int64_t p, const Word* a, int64_t a_stride) {
    const int64_t count = rows.end - rows.begin, column = p * kPanel<M>;
    const int64_t columns = smaller(kPanel<M>, linear_.out_size - column), vectors = (columns + kLanes - 1) / kLanes;
    const Word* const b = panel(p);
    float* const partial = sums_;
    for (int64_t k = 0; k < depth_; k += kPiece) {
      const int64_t depth = smaller(kPiece, depth_ - k);
      const bool first = k == 0, last = k + depth == depth_;
      const auto product = [&](const auto& finish) __attribute__((always_inline)) {
        product_of_vectors<M>(vectors, count, depth, a + k, a_stride, b + k * kPanel<M>, kPanel<M>, finish);
      };
      if (last) {
        product([&](int64_t row, auto& sums) __attribute__((always_inline)) {
          finish(rows.begin + row, column, columns, sums, first ? nullptr : partial + row * kPanel<M>);
        });
      } else if (first) {
        product([=](int64_t row, auto& sums) __attribute__((always_inline)) {
          store_sums<M>(sums, partial + row * kPanel<M>, kPanel<M>);
        });
      } else {
        product([=](int64_t row, auto& sums) __attribute__((always_inline)) {
          add_sums<M>(sums, partial + row * kPanel<M>, kPanel<M>);
        });
      }
    }
  }

#if defined(__AMX_BF16__)

  void run_groups(Span rows, Span panels, const Word* a) {
    const int64_t size = group(linear_.in_size), words = slab(linear_.in_size);
    for (int64_t g = panels.begin; g < panels.end; g += size) {
      for (int64_t k = 0; k < depth_; k += words) {
        for (int64_t p = g; p < smaller(g + size, panels.end); ++p) {
          float* const sums = sums_ + (p - g) * max_rows(linear_.in_size) * kPanel<M>;
          run_tiles(rows, p, {k, smaller(k + words, depth_)}, a, sums);
        }
      }
    }
  }

  // Two tiles of rows at a time. While the next two are multiplied, which takes no vector units, those are finished.
  void run_tiles(Span rows, int64_t p, Span slab, const Word* a, float* all_sums) {
    constexpr int64_t kRowsAStep = 2;
    const int64_t count = rows.end - rows.begin, column = p * kPanel<M>;
    const int64_t columns = smaller(kPanel<M>, linear_.out_size - column);
    const int64_t tiles = (count + kTileRows - 1) / kTileRows, pairs = (tiles + 1) / 2;
    // Of the next panel, which comes from far, so many lines with every step that all are fetched meanwhile.
    const char* next = reinterpret_cast<const char*>(panel(p + 1) + slab.begin * kPanel<M> * M::kPlanes);
    const int64_t panel_lines = 2 * kTileWords * M::kPlanes;  // a step
    const int64_t lines = column + columns == linear_.out_size ? 0 : (panel_lines + pairs - 1) / pairs;
    int64_t finished = 0;
    const auto finish_up_to = [&](int64_t end) __attribute__((always_inline)) {
      const float* const sums = all_sums + finished * kSumsLine;
      const auto finish_block = [&](int64_t row, auto& block) __attribute__((always_inline)) {
        finish(rows.begin + row, column, columns, block, nullptr);
      };
      columns > kLanes ? finish_rows<2>(finished, end, sums, finish_block)
                       : finish_rows<1>(finished, end, sums, finish_block);
      finished = end;
    };
    for (int64_t k = slab.begin; k < slab.end; k += kPiece) {
      const int64_t depth = smaller(kPiece, slab.end - k);
      const bool first = k == 0, last = k + depth == depth_;
      const Word* const b = panel(p) + k * kPanel<M> * M::kPlanes;
      const auto multiply = [&](auto row_tiles, int64_t row) __attribute__((always_inline)) {
        constexpr int kRowTiles = decltype(row_tiles)::value;
        float* const sums = all_sums + row * kSumsLine;
        const Word* const from = a + (k * kTileRows * tiles + row * depth) * M::kPlanes;
        const Word* const second = from + kTileRows * depth * M::kPlanes;
        first ? clear_sums<kRowTiles, 2>() : load_sums<kRowTiles, 2>(sums);
        for (int64_t i = 0; i < depth; i += kTileWords) {
          for (int64_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next, 0, 2);
          const int64_t place = i * kTileRows * M::kPlanes;
          if constexpr (M::kPlanes == 3) {
            multiply_split_step<kRowTiles, 2>(from + place, second + place, b + i * kPanel<M>, kPanel<M>,
                                              depth * kPanel<M>);
          } else {
            multiply_step<kRowTiles, 2>(from + place, second + place, kTileWords, b + i * kPanel<M>, kPanel<M>);
          }
          if (last && finished + kRowsAStep <= row) finish_up_to(finished + kRowsAStep);
        }
        store_sums_of_tiles<kRowTiles, 2>(sums);
      };
      int64_t row = 0;
      for (; row + kTileRows < count; row += 2 * kTileRows) multiply(std::integral_constant<int, 2>{}, row);
      if (row < count) multiply(std::integral_constant<int, 1>{}, row);
    }
    if (slab.end == depth_) finish_up_to(count);
  }

#endif

  template <int kRows, int kVectors>
  LUKE_INLINE void finish(int64_t row, int64_t column, int64_t columns, Vector (&sums)[kRows][kVectors],
                          const float* partial) {
    Vector bias[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const In* from = static_cast<const In*>(linear_.bias) + column + v * kLanes;
      bias[v] = linear_.bias ? widen_first<M>(from, columns - v * kLanes) : M::zero();
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      In* const out = row_of_output<In>(linear_.out, row + r) + column;
      const In* const residual = linear_.residual.data ? row_of<In>(linear_.residual, row + r) + column : nullptr;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Vector y = sums[r][v] + bias[v];
        if (partial) y += M::load(partial + r * kPanel<M> + v * kLanes);
        if (linear_.gelu) y = gelu<M>(y);
        if (residual) y += widen_first<M>(residual + v * kLanes, columns - v * kLanes);
        narrow_first<M>(y, out + v * kLanes, columns - v * kLanes);
      }
    }
  }

  const Linear& linear_;
  int64_t depth_, stride_;
  float* sums_;
};

}  // namespace luke_kernels::LUKE_ISA
