// Forward on the CPU: plain flash attention whose loop over keys has two segments, each with its own query.
#include "tile.h"

namespace luke_kernels {
namespace {

template <typename scalar_t>
void forward_block(const AttentionParams& params, const Block& block, int64_t head, Scratch<acc_t<scalar_t>> scratch) {
  using T = acc_t<scalar_t>;
  const Range& rows = block.range;
  const int64_t head_dim = params.head_dim, width = round_up(head_dim, kLanes);
  const T scale = static_cast<T>(params.scale);
  T *q = scratch.tile(), *kt = scratch.tile(), *v = scratch.tile(), *s = scratch.tile(), *out = scratch.tile();
  T* factors = params.dropout_p > 0 ? scratch.tile() : nullptr;
  T row_max[kBlock], row_sum[kBlock];
  std::fill_n(row_max, kBlock, -INFINITY);
  std::fill_n(row_sum, kBlock, T{0});
  std::fill_n(out, kBlock * width, T{0});

  for (Kind kind : {kWord, kEntity}) {
    const Range keys = sequence(params, kind, block.b);
    if (keys.size == 0) continue;
    load_rows<scalar_t>(params.projections, rows, params.query_slot(kind), head, head_dim, head_dim, q);
    for (int64_t start = 0; start < keys.size; start += kBlock) {
      const Range columns = block_of(keys, start);
      load_columns<scalar_t>(params.projections, columns, params.key_slot(), head, head_dim, kt);
      load_rows<scalar_t>(params.projections, columns, params.value_slot(), head, head_dim, width, v);
      // Absent columns score q . 0 = 0 and keep it: they add 0 * 0 to the output.
      multiply(kBlock, head_dim, q, kt, s);
      if (factors) dropout_factors(params, block.b, head, rows, columns, factors);
      for (int64_t i = 0; i < rows.size; ++i) {
        T* row = s + i * kBlock;
        T new_max = row_max[i];
        for (int64_t j = 0; j < columns.size; ++j) new_max = std::max(new_max, row[j] *= scale);
        // Scores may all be -inf so far.
        const T shift = new_max == -INFINITY ? T{0} : new_max;
        const T rescale = std::exp(row_max[i] - shift);
        T sum = 0;
        for (int64_t j = 0; j < columns.size; ++j) sum += row[j] = std::exp(row[j] - shift);
        if (factors) {
          for (int64_t j = 0; j < columns.size; ++j) row[j] *= factors[i * kBlock + j];
        }
        for (int64_t d = 0; d < width; ++d) out[i * width + d] *= rescale;
        row_sum[i] = row_sum[i] * rescale + sum;
        row_max[i] = new_max;
      }
      multiply_add(width, kBlock, s, v, out);
    }
  }

  T* lse = at<T>(params.lse, rows, 0, head);
  for (int64_t i = 0; i < rows.size; ++i) {
    lse[i] = row_max[i] + std::log(row_sum[i]);
    const T inverse = 1 / row_sum[i];
    for (int64_t d = 0; d < width; ++d) out[i * width + d] *= inverse;
  }
  store_rows<scalar_t>(out, width, params.out, rows, 0, head, head_dim);
}

}  // namespace

void attention_forward_cpu(const AttentionParams& params, void* scratch) {
  dispatch(params.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    for_each_block(params, [&](const Block& block, int64_t head, int thread) {
      forward_block<scalar_t>(params, block, head, {params, scratch, thread});
    });
  });
}

}  // namespace luke_kernels
