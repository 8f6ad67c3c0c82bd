// Rows of two matrices as a stream of blocks through shared memory: those of a sequence's words, then its entities'.
#pragma once

#include "sequence.h"
#include "tiles.h"

namespace luke_kernels::cuda {

// kRows rows of each matrix at a time, copied one block ahead; where kStatistics, also two floats a row.
template <DType T, int kHeadDim, int kRows, int kThreads, bool kWarpgroups, bool kStatistics = false>
struct Stream {
  static constexpr int kTileBytes = Tile<T, kHeadDim, kRows>::kBytes;
  static constexpr int kBlockBytes = 2 * kTileBytes;
  // Behind both blocks: the first float of all rows of a block, then the second.
  static constexpr int kStatisticsBytes = kStatistics ? 2 * kRows * 4 : 0;
  static constexpr int kBytes = 2 * (kBlockBytes + kStatisticsBytes);

  struct Block {
    Shared first, second, statistics;
  };

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
  LUKE_DEVICE int blocks(Kind kind) const { return static_cast<int>(blocks_of(length(kind), kRows)); }

  LUKE_DEVICE Block block(int i) const {
    const Shared first = memory + i % 2 * kBlockBytes;
    return {first, first + kTileBytes, memory + 2 * kBlockBytes + i % 2 * kStatisticsBytes};
  }

  // Begins to copy block `next`, where there is one, and ends a group of copies.
  LUKE_DEVICE void copy_next() {
    const bool entity = next >= blocks(kWord);
    const Source source = entity ? sources[kEntity] : sources[kWord];
    const int start = (next - (entity ? blocks(kWord) : 0)) * kRows;
    if (start < source.length) {
      const Block to = block(next);
      LUKE_UNROLL
      for (int which = 0; which < 2; ++which) {
        const Shared tile = which == 0 ? to.first : to.second;
        copy_rows<T, kHeadDim, kRows, kThreads>(tile, chunks, source.matrices[0], [&](int i) {
          return start + i < source.length ? source.matrices[which] + (start + i) * source.strides[which] : nullptr;
        });
      }
      if constexpr (kStatistics) {
        for (int i = thread_index(); i < 2 * kRows; i += kThreads) {
          const bool exists = start + i % kRows < source.length;
          const float* from = source.statistics + (exists ? start + i % kRows + i / kRows * source.statistics_stride : 0);
          copy_async<4>(to.statistics + 4 * i, from, exists);
        }
      }
    }
    ++next;
    commit_copies();
  }

  // Waits for a block, begins to copy the one after it, and returns where the block lies.
  LUKE_DEVICE Block advance() {
    const Block landed = block(next - 1);
    wait_copies<0>();
    if constexpr (kWarpgroups) fence_copies();
    synchronize();
    copy_next();
    return landed;
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
