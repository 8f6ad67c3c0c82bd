// Rows of two matrices as a stream of blocks through shared memory: those of a sequence's words, then its entities'.
#pragma once

#include "sequence.h"
#include "tiles.h"

namespace luke_kernels::cuda {

// kRows rows of each matrix at a time, copied one block ahead; where kStatistics, also two floats a row.
template <DType T, int kHeadDim, int kRows, int kThreads, bool kStatistics = false>
struct Stream {
  static constexpr int kTileBytes = kRows * Tile<T, kHeadDim>::kRowBytes;
  // A block: the two tiles, then the first float of all rows, then the second.
  static constexpr int kBlockBytes = 2 * kTileBytes + (kStatistics ? 2 * kRows * 4 : 0);
  static constexpr int kBytes = 2 * kBlockBytes;

  struct Source {
    const char* matrices[2];
    int64_t strides[2];  // bytes from row to row
    int length;
    const float* statistics = nullptr;
    int64_t statistics_stride = 0;  // from the first float of a row to its second
  };

  Source sources[kKinds];
  Shared memory;
  int chunks;
  int next = 0;

  LUKE_DEVICE int length(int kind) const { return kind == kWord ? sources[kWord].length : sources[kEntity].length; }
  LUKE_DEVICE int blocks(Kind kind) const { return blocks_of(length(kind), kRows); }

  // Begins to copy block `next`, where there is one, and ends a group of copies.
  LUKE_DEVICE void copy_next() {
    const bool entity = next >= blocks(kWord);
    const Source source = entity ? sources[kEntity] : sources[kWord];
    const int start = (next - (entity ? blocks(kWord) : 0)) * kRows;
    if (start < source.length) {
      const Shared block = memory + next % 2 * kBlockBytes;
      LUKE_UNROLL
      for (int which = 0; which < 2; ++which) {
        copy_rows<T, kHeadDim, kRows, kThreads>(block + which * kTileBytes, chunks, source.matrices[0], [&](int i) {
          return start + i < source.length ? source.matrices[which] + (start + i) * source.strides[which] : nullptr;
        });
      }
      if constexpr (kStatistics) {
        for (int i = thread_index(); i < 2 * kRows; i += kThreads) {
          const bool exists = start + i % kRows < source.length;
          const float* from = source.statistics + (exists ? start + i % kRows + i / kRows * source.statistics_stride : 0);
          copy_async<4>(block + 2 * kTileBytes + 4 * i, from, exists);
        }
      }
    }
    ++next;
    commit_copies();
  }

  // Waits for a block, begins to copy the one after it, and returns where the block lies.
  LUKE_DEVICE Shared advance() {
    const Shared block = memory + (next - 1) % 2 * kBlockBytes;
    wait_copies<0>();
    synchronize();
    copy_next();
    return block;
  }
};

// Keys and values as the source of a stream.
template <class S, DType T>
LUKE_DEVICE typename S::Source keys_and_values(const AttentionParams& op, const Place& place, Kind kind, int head) {
  const Buffer& buffer = op.projections[kind];
  const int64_t first = place.offset * buffer.token_stride + head * buffer.head_stride;
  const int64_t stride = buffer.token_stride * kElementBytes<T>;
  return {{address(buffer.data, first + op.key_slot() * buffer.slot_stride, kElementBytes<T>),
           address(buffer.data, first + op.value_slot() * buffer.slot_stride, kElementBytes<T>)},
          {stride, stride},
          place.length};
}

}  // namespace luke_kernels::cuda
