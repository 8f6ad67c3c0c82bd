// Where a block of threads finds its work, and dropout's draws.
#pragma once

#include "../attention.h"
#include "machine.h"

namespace luke_kernels::cuda {

// What a launch hands its kernel.
struct Arguments {
  AttentionParams op;
  float factor;      // scores times this are in base 2
  float scale;
  float keep_scale;  // 1 / (1 - dropout_p)
  uint32_t threshold;
  int64_t blocks;    // of rows, or of keys, of a sequence and head; a grid's are fewer than 2^31
  int chunks;        // of 16 bytes, of a row
};

LUKE_BOTH constexpr int64_t blocks_of(int64_t length, int size) { return (length + size - 1) / size; }

// The sequence, head and block of a block of threads. Neighbours share keys and values.
struct Program {
  int sequence, head, block;

  LUKE_DEVICE explicit Program(const Arguments& args) {
    const int blocks = static_cast<int>(args.blocks), heads = static_cast<int>(args.op.num_heads);
    block = block_index() % blocks;
    head = block_index() / blocks % heads;
    sequence = block_index() / blocks / heads;
  }
};

// The tokens of one kind of a sequence, kept inside buffer and grid.
struct Place {
  int64_t offset;
  int length;

  LUKE_DEVICE Place(const Segments& segments, int sequence) {
    offset = segments.offsets ? segments.offsets[sequence] : sequence * segments.max_length;
    offset = offset < 0 ? 0 : offset;
    const int64_t left = segments.num_tokens - offset;
    int64_t given = segments.lengths ? segments.lengths[sequence] : segments.max_length;
    given = given < segments.max_length ? given : segments.max_length;
    given = given < left ? given : left;
    length = given < 0 ? 0 : static_cast<int>(given);
  }
};

LUKE_DEVICE const char* address(const void* data, int64_t element, int bytes) {
  return static_cast<const char*>(data) + element * bytes;
}

// A block of rows of a sequence, words and then entities, from `start` on.
struct MixedRows {
  Place words, entities;
  int start;

  LUKE_DEVICE int length() const { return words.length + entities.length; }
  LUKE_DEVICE bool exists(int i) const { return start + i < length(); }
  LUKE_DEVICE Kind kind(int i) const { return start + i < words.length ? kWord : kEntity; }
  LUKE_DEVICE int rank(int i) const { return start + i - (kind(i) == kWord ? 0 : words.length); }
  LUKE_DEVICE int64_t token(int i) const { return (kind(i) == kWord ? words : entities).offset + rank(i); }

  // Where row i lies in a buffer of its kind.
  LUKE_DEVICE const char* in(const Buffer& words_buffer, const Buffer& entities_buffer, int i, int64_t slot, int head,
                             int bytes) const {
    const Buffer& buffer = kind(i) == kWord ? words_buffer : entities_buffer;
    return address(buffer.data, token(i) * buffer.token_stride + slot * buffer.slot_stride + head * buffer.head_stride,
                   bytes);
  }
};

// Philox-4x32-10: turns a counter into four draws.
LUKE_DEVICE void philox(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
  LUKE_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(c[0], 0xD2511F53u), low0 = c[0] * 0xD2511F53u;
    const uint32_t high1 = multiply_high(c[2], 0xCD9E8D57u), low1 = c[2] * 0xCD9E8D57u;
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// What a program draws, by the rule of luke_kernels/ops/dropout.py.
struct Draws {
  uint32_t key[2], stream, last, threshold;

  LUKE_DEVICE Draws(const Arguments& args, const Program& program) {
    const uint64_t seed = args.op.device_seed[0];
    key[0] = static_cast<uint32_t>(seed);
    key[1] = static_cast<uint32_t>(seed >> 32);
    stream = static_cast<uint32_t>(program.head + args.op.num_heads * program.sequence);
    last = static_cast<uint32_t>(args.op.device_seed[1]);
    threshold = args.threshold;
  }

  // Which of columns 4 group to 4 group + 3 of a row are kept: bits 0 to 3.
  LUKE_DEVICE uint32_t kept(uint32_t group, uint32_t row, Kind row_kind, Kind column_kind) const {
    uint32_t c[4] = {group, row, stream, last ^ (row_kind == kEntity ? 1u << 31 : 0) ^ (column_kind == kEntity ? 1u << 30 : 0)};
    philox(c, key[0], key[1]);
    uint32_t bits = 0;
    LUKE_UNROLL
    for (int i = 0; i < 4; ++i) bits |= c[i] >= threshold ? 1u << i : 0;
    return bits;
  }
};

}  // namespace luke_kernels::cuda
