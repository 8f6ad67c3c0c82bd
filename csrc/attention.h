// The operation, as the core sees it: plain pointers, strides in elements, sizes. No torch, no Python.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "dtype.h"

namespace luke_kernels {

// Index of a token's kind. Words come first wherever both are listed.
enum Kind { kWord = 0, kEntity = 1, kKinds = 2 };

// A flat buffer of tokens: element (token, slot, head, d) lies at
// data + token * token_stride + slot * slot_stride + head * head_stride + d.
struct Buffer {
  void* data = nullptr;
  int64_t token_stride = 0;
  int64_t slot_stride = 0;
  int64_t head_stride = 0;
};

// The sequences of one kind: sequence b holds tokens [offsets[b], offsets[b] + lengths[b]) of that kind's buffers.
struct Segments {
  const int32_t* offsets = nullptr;  // null: sequence b begins at b * max_length
  const int32_t* lengths = nullptr;  // null: each has max_length tokens
  int64_t num_tokens = 0;
  int64_t max_length = 0;
};

struct AttentionParams {
  DType dtype = DType::kFloat32;
  int64_t batch_size = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  int64_t stack = 4;  // 4: query to words, query to entities, key, value; 3: query, key, value
  std::array<Segments, kKinds> segments;

  std::array<Buffer, kKinds> projections;
  // All words, then all entities.
  Buffer out;
  Buffer lse;  // (head, token), in the accumulator's dtype: no slot, no d

  // Backward only.
  std::array<Buffer, kKinds> dout;
  std::array<Buffer, kKinds> dprojections;

  double scale = 1.0;
  double dropout_p = 0.0;
  uint64_t seed = 0;
  uint64_t offset = 0;
  int num_threads = 1;

  // CUDA only. The seed and offset lie on the device, so that a captured graph draws anew; statistics (2, head, token) are
  // what the backward's first kernel hands to its second.
  const int64_t* device_seed = nullptr;
  float* statistics = nullptr;
  int device = 0;
  void* stream = nullptr;

  constexpr int64_t joint_begin(Kind kind) const { return kind == kWord ? 0 : segments[kWord].num_tokens; }
  constexpr int64_t query_slot(Kind key_kind) const { return key_kind == kWord ? 0 : stack - 3; }
  constexpr int64_t key_slot() const { return stack - 2; }
  constexpr int64_t value_slot() const { return stack - 1; }
};

// Whether the CPU kernels run on more than one thread.
bool has_openmp();

// The instruction set whose kernels run: portable, avx2, avx512, avx512_bf16 or amx. The best of this machine's, or what
// LUKE_KERNELS_CPU_ISA names where the machine has it.
const char* cpu_isa();

// Throws std::invalid_argument where LUKE_KERNELS_CPU_ISA names no instruction set of this build and machine.
void set_cpu_isa(const char* name);

// Bytes of scratch memory the CPU kernels keep: for head_dim and num_threads and, in the backward, for the longest
// sequence.
size_t attention_scratch_bytes_cpu(const AttentionParams& params);

// Rows that no sequence holds get zeros, their lse infinity.
void attention_forward_cpu(const AttentionParams& params);
void attention_backward_cpu(const AttentionParams& params);

// The architectures that the CUDA kernels were built for, as in "sm_80, sm_90a+PTX".
const char* cuda_architectures();

// Why the CUDA kernels cannot run on a device of this machine; empty where they can.
std::string cuda_missing(int device);

// On params.stream of params.device. head_dim at most 128; rows of 16-byte multiples at addresses that are, too. Only rows
// in sequences are written. The backward needs `statistics` to write to.
void attention_forward_cuda(const AttentionParams& params);
void attention_backward_cuda(const AttentionParams& params);

// Multiplies and adds on `num_threads`, as the products of tensors of `dtype` do, and nothing else. Returns how many
// operations that were.
int64_t multiply_add_cpu(DType dtype, int num_threads, int64_t rounds);

}  // namespace luke_kernels
