// The operation on the CPU: which thread runs which part of which head, and fills the rows that no sequence holds. No
// result depends on the number of threads.
#include "../attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace luke_kernels {
namespace {

// Rows, or keys, that pay for packing the keys, or the queries, of their head once more.
constexpr int64_t kFewestRows = 192;

// Rows that a thread fills at a time: some 2 MB of gradients of 12 heads of 64 in float32.
constexpr int64_t kPieceRows = 192;

int64_t item_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

void* address(const Buffer& buffer, int64_t token, int64_t slot, int64_t head, int64_t item_size) {
  const int64_t element = token * buffer.token_stride + slot * buffer.slot_stride + head * buffer.head_stride;
  return static_cast<char*>(buffer.data) + element * item_size;
}

// Tokens [begin, begin + size) of one kind's buffers.
struct Range {
  Kind kind;
  int64_t begin;
  int64_t size;
};

// Lengths and offsets beyond the buffers are cut off: a wrong one may give wrong numbers, never a wild access.
Range sequence(const AttentionParams& params, Kind kind, int64_t b) {
  const Segments& segments = params.segments[kind];
  const int64_t offset = segments.offsets ? segments.offsets[b] : b * segments.max_length;
  const int64_t length = segments.lengths ? segments.lengths[b] : segments.max_length;
  const int64_t begin = std::clamp<int64_t>(offset, 0, segments.num_tokens);
  return {kind, begin, std::clamp<int64_t>(length, 0, std::min(segments.max_length, segments.num_tokens - begin))};
}

int64_t rows_of(const AttentionParams& params, int64_t b) {
  return sequence(params, kWord, b).size + sequence(params, kEntity, b).size;
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
    const int64_t joint = params.joint_begin(kind) + range.begin;
    const auto matrix = [&](const std::array<Buffer, kKinds>& buffers, int64_t slot) {
      const Buffer& buffer = buffers[kind];
      void* data = buffer.data ? address(buffer, range.begin, slot, h, item_size(params.dtype)) : nullptr;
      return Matrix{data, buffer.token_stride};
    };
    for (Kind key_kind : {kWord, kEntity}) {
      tokens.queries[key_kind] = matrix(params.projections, params.query_slot(key_kind));
      tokens.dqueries[key_kind] = matrix(params.dprojections, params.query_slot(key_kind));
    }
    tokens.keys = matrix(params.projections, params.key_slot());
    tokens.values = matrix(params.projections, params.value_slot());
    tokens.out = {address(params.out, joint, 0, h, item_size(params.dtype)), params.out.token_stride};
    tokens.lse = address(params.lse, joint, 0, h, params.dtype == DType::kFloat64 ? 8 : 4);
    tokens.dout = matrix(params.dout, 0);
    tokens.dkeys = matrix(params.dprojections, params.key_slot());
    tokens.dvalues = matrix(params.dprojections, params.value_slot());
  }
  return head;
}

// Sequences that hold a token, the longest first, so that the threads end together.
std::vector<int64_t> longest_first(const AttentionParams& params) {
  std::vector<int64_t> rows(params.batch_size), order(params.batch_size);
  for (int64_t b = 0; b < params.batch_size; ++b) rows[b] = rows_of(params, b);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rows[a] > rows[b]; });
  while (!order.empty() && rows[order.back()] == 0) order.pop_back();
  return order;
}

// In pairs of a row and a key.
double work_of(const AttentionParams& params, const std::vector<int64_t>& order) {
  double pairs = 0;
  for (int64_t b : order) pairs += static_cast<double>(rows_of(params, b)) * rows_of(params, b);
  return pairs * params.num_heads;
}

// Cuts `rows` into about `wanted` slices and calls f(slice).
template <class F>
void for_each_slice(int64_t rows, int64_t wanted, const F& f) {
  const int64_t slices = std::clamp<int64_t>(wanted, 1, (rows + kFewestRows - 1) / kFewestRows);
  const int64_t step = ((rows + slices - 1) / slices + 15) / 16 * 16;
  for (int64_t begin = 0; begin < rows; begin += step) f(Span{begin, std::min(begin + step, rows)});
}

// Tokens that no sequence holds, in pieces for the threads.
std::vector<Range> left_over(const AttentionParams& params) {
  std::vector<Range> pieces;
  for (Kind kind : {kWord, kEntity}) {
    std::vector<Range> held;
    for (int64_t b = 0; b < params.batch_size; ++b) held.push_back(sequence(params, kind, b));
    std::sort(held.begin(), held.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    held.push_back({kind, params.segments[kind].num_tokens, 0});
    int64_t end = 0;
    for (const Range& range : held) {
      for (int64_t begin = end; begin < range.begin; begin += kPieceRows) {
        pieces.push_back({kind, begin, std::min(kPieceRows, range.begin - begin)});
      }
      end = std::max(end, range.begin + range.size);
    }
  }
  return pieces;
}

void fill_with_zeros(const Buffer& buffer, int64_t begin, int64_t tokens, int64_t slots, const AttentionParams& params) {
  const int64_t size = item_size(params.dtype);
  for (int64_t token = begin; token < begin + tokens; ++token) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      for (int64_t h = 0; h < params.num_heads; ++h) {
        std::memset(address(buffer, token, slot, h, size), 0, params.head_dim * size);
      }
    }
  }
}

template <class T>
void fill_with_infinity(const Buffer& lse, int64_t begin, int64_t tokens, int64_t num_heads) {
  for (int64_t h = 0; h < num_heads; ++h) {
    std::fill_n(static_cast<T*>(address(lse, begin, 0, h, sizeof(T))), tokens, std::numeric_limits<T>::infinity());
  }
}

void fill_outputs(const AttentionParams& params, const Range& range) {
  const int64_t begin = params.joint_begin(range.kind) + range.begin;
  fill_with_zeros(params.out, begin, range.size, 1, params);
  const auto fill_lse = params.dtype == DType::kFloat64 ? fill_with_infinity<double> : fill_with_infinity<float>;
  fill_lse(params.lse, begin, range.size, params.num_heads);
}

int64_t longest(const AttentionParams& params) {
  int64_t rows = 0;
  for (int64_t b = 0; b < params.batch_size; ++b) rows = std::max(rows, rows_of(params, b));
  return rows;
}

}  // namespace

size_t attention_scratch_bytes_cpu(const AttentionParams& params) {
  const int64_t forward = kernels(params.dtype).forward_scratch_bytes(params.dtype, params.head_dim);
  const int64_t backward = kernels(params.dtype).backward_scratch_bytes(params.dtype, params.head_dim, longest(params));
  return static_cast<size_t>(std::max(forward, backward)) * params.num_threads;
}

int64_t multiply_add_cpu(DType dtype, int num_threads, int64_t rounds) {
  std::vector<int64_t> operations(num_threads);
  parallel_for(num_threads, num_threads,
               [&](int64_t index, int64_t) { operations[index] = kernels(dtype).multiply_add(dtype, rounds); });
  return std::accumulate(operations.begin(), operations.end(), int64_t{0});
}

void attention_forward_cpu(const AttentionParams& params) {
  const Kernels& isa = kernels(params.dtype);
  const size_t scratch_bytes = isa.forward_scratch_bytes(params.dtype, params.head_dim);
  struct Task {
    int64_t b, head;
    Span rows;
  };
  const std::vector<int64_t> order = longest_first(params);
  double left = work_of(params, order);
  std::vector<Task> tasks;
  for (int64_t b : order) {
    const int64_t rows = rows_of(params, b);
    for (int64_t head = 0; head < params.num_heads; ++head) {
      // The last heads in parts, so that the threads end together.
      const double share = static_cast<double>(rows) * rows * params.num_threads / left;
      const int64_t wanted = params.num_threads == 1 ? 1 : static_cast<int64_t>(std::ceil(2 * share));
      for_each_slice(rows, wanted, [&](Span slice) { tasks.push_back({b, head, slice}); });
      left -= static_cast<double>(rows) * rows;
    }
  }
  const int64_t tokens = params.segments[kWord].num_tokens + params.segments[kEntity].num_tokens;
  expect_huge_pages(params.out.data, tokens * params.out.token_stride * item_size(params.dtype));
  const std::vector<Range> pieces = left_over(params);
  const int64_t filled = static_cast<int64_t>(pieces.size()), count = filled + static_cast<int64_t>(tasks.size());
  const auto part_of = [&](int64_t index) {
    const Task& task = tasks[index - filled];
    return Part{head_of(params, task.b, task.head), task.rows};
  };
  parallel_for(params.num_threads, count, [&](int64_t index, int64_t next) {
    if (index < filled) return fill_outputs(params, pieces[index]);
    Part following;
    if (next < count) following = part_of(next);
    isa.forward(params.dtype, part_of(index), next < count ? &following : nullptr, thread_scratch(scratch_bytes));
  });
}

void attention_backward_cpu(const AttentionParams& params) {
  const Kernels& isa = kernels(params.dtype);
  const size_t scratch_bytes = isa.backward_scratch_bytes(params.dtype, params.head_dim, longest(params));
  struct Task {
    int64_t b, head;
    Span keys, rows;
    Gradients gradients;
  };
  const std::vector<int64_t> order = longest_first(params);
  const double work = work_of(params, order);
  std::vector<Task> tasks;
  for (int64_t b : order) {
    const int64_t rows = rows_of(params, b);
    const Span all = {0, rows};
    // A part of a head, which gives the gradients of queries or of keys only, recomputes what the other computes too: 7
    // products where the whole takes 5. That pays where threads would wait for a head.
    const double share = static_cast<double>(rows) * rows * params.num_threads / work;
    for (int64_t head = 0; head < params.num_heads; ++head) {
      if (params.num_threads == 1 || share < 1.4) {
        tasks.push_back({b, head, all, all, {true, true}});
        continue;
      }
      const int64_t wanted = static_cast<int64_t>(4 * share);
      for_each_slice(rows, wanted, [&](Span keys) { tasks.push_back({b, head, keys, all, {false, true}}); });
      for_each_slice(rows, wanted, [&](Span slice) { tasks.push_back({b, head, all, slice, {true, false}}); });
    }
  }
  for (Kind kind : {kWord, kEntity}) {
    const Buffer& buffer = params.dprojections[kind];
    const int64_t bytes = params.segments[kind].num_tokens * buffer.token_stride * item_size(params.dtype);
    expect_huge_pages(buffer.data, bytes);
  }
  const std::vector<Range> pieces = left_over(params);
  const int64_t filled = static_cast<int64_t>(pieces.size()), count = filled + static_cast<int64_t>(tasks.size());
  parallel_for(params.num_threads, count, [&](int64_t index, int64_t) {
    if (index < filled) {
      const Range& range = pieces[index];
      return fill_with_zeros(params.dprojections[range.kind], range.begin, range.size, params.stack, params);
    }
    const Task& task = tasks[index - filled];
    isa.backward(params.dtype, head_of(params, task.b, task.head), task.keys, task.rows, task.gradients,
                 thread_scratch(scratch_bytes));
  });
}

}  // namespace luke_kernels
