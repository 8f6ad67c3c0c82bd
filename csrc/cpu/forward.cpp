// Forward on the CPU: which thread runs which rows of which head.
#include <algorithm>
#include <numeric>

#include "isa.h"
#include "tile.h"

namespace luke_kernels {
namespace {

// Rows that pay for packing the keys of their head once more, where there are fewer heads than work for the threads.
constexpr int64_t kFewestRows = 192;

size_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

Matrix matrix_of(const AttentionParams& params, const std::array<Buffer, kKinds>& buffers, const Range& range,
                 int64_t slot, int64_t head) {
  const Buffer& buffer = buffers[range.kind];
  const int64_t first = range.begin * buffer.token_stride + slot * buffer.slot_stride + head * buffer.head_stride;
  return {static_cast<char*>(buffer.data) + first * static_cast<int64_t>(item_size(params.dtype)), buffer.token_stride};
}

Head head_of(const AttentionParams& params, int64_t b, int64_t h) {
  Head head{};
  head.head_dim = params.head_dim;
  head.shared_query = params.stack == 3;
  head.scale = params.scale;
  head.dropout = {params.dropout_p, params.seed, params.offset, static_cast<uint32_t>(h + params.num_heads * b)};
  for (Kind kind : {kWord, kEntity}) {
    const Range range = sequence(params, kind, b);
    Tokens& tokens = head.tokens[kind];
    tokens.size = range.size;
    for (Kind key_kind : {kWord, kEntity}) {
      tokens.queries[key_kind] = matrix_of(params, params.projections, range, params.query_slot(key_kind), h);
    }
    tokens.keys = matrix_of(params, params.projections, range, params.key_slot(), h);
    tokens.values = matrix_of(params, params.projections, range, params.value_slot(), h);
    tokens.out = matrix_of(params, params.out, range, 0, h);
    const Buffer& lse = params.lse[kind];
    const int64_t first = range.begin * lse.token_stride + h * lse.head_stride;
    tokens.lse = static_cast<char*>(lse.data) + first * (params.dtype == DType::kFloat64 ? 8 : 4);
  }
  return head;
}

}  // namespace

size_t backward_scratch_bytes(const AttentionParams& params);

size_t attention_scratch_bytes_cpu(const AttentionParams& params) {
  const size_t forward = kernels().forward_scratch_bytes(params.dtype, params.head_dim);
  return std::max(forward, backward_scratch_bytes(params)) * params.num_threads;
}

void attention_forward_cpu(const AttentionParams& params) {
  const Kernels& isa = kernels();
  const size_t scratch_bytes = isa.forward_scratch_bytes(params.dtype, params.head_dim);
  struct Task {
    int64_t b, head;
    Span rows;
  };
  std::vector<int64_t> rows(params.batch_size), order(params.batch_size);
  for (int64_t b = 0; b < params.batch_size; ++b) {
    rows[b] = sequence(params, kWord, b).size + sequence(params, kEntity, b).size;
  }
  // The longest first, so that the threads end together.
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rows[a] > rows[b]; });
  const int64_t heads = params.batch_size * params.num_heads;
  const int64_t wanted = params.num_threads == 1 || heads == 0 ? 1 : (4 * params.num_threads + heads - 1) / heads;
  std::vector<Task> tasks;
  for (int64_t b : order) {
    if (rows[b] == 0) continue;
    const int64_t slices = std::clamp<int64_t>(wanted, 1, (rows[b] + kFewestRows - 1) / kFewestRows);
    const int64_t step = (rows[b] + slices - 1) / slices;
    for (int64_t head = 0; head < params.num_heads; ++head) {
      for (int64_t begin = 0; begin < rows[b]; begin += step) {
        tasks.push_back({b, head, {begin, std::min(begin + step, rows[b])}});
      }
    }
  }
  const int64_t count = static_cast<int64_t>(tasks.size());
  // Neighbouring heads share pages of memory, and a thread fetches the next one ahead.
  const int64_t chunk = std::clamp<int64_t>(count / (8 * params.num_threads), 1, 4);
  parallel_for(params.num_threads, count, chunk, [&](int64_t index) {
    const Task& task = tasks[index];
    const Head head = head_of(params, task.b, task.head);
    Head next;
    const bool foreseen = (index + 1) % chunk != 0 && index + 1 < count;
    if (foreseen) next = head_of(params, tasks[index + 1].b, tasks[index + 1].head);
    isa.forward(params.dtype, head, task.rows, foreseen ? &next : nullptr, thread_scratch(scratch_bytes));
  });
}

}  // namespace luke_kernels
