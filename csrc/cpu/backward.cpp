// Backward on the CPU: probabilities recomputed from lse, in two passes (dQ by rows, dK and dV by keys), so that each
// task owns what it writes.
#include "tile.h"

namespace luke_kernels {
namespace {

// delta[i] = dout[i] . out[i]: what the softmax subtracts from the gradient of each probability of row i.
template <typename scalar_t>
void row_deltas(const AttentionParams& params, const Range& rows, int64_t head, acc_t<scalar_t>* delta) {
  const scalar_t* dout = at<const scalar_t>(params.dout, rows, 0, head);
  const scalar_t* out = at<const scalar_t>(params.out, rows, 0, head);
  const int64_t dout_stride = params.dout[rows.kind].token_stride, out_stride = params.out[rows.kind].token_stride;
  for (int64_t i = 0; i < rows.size; ++i) {
    delta[i] = 0;
    for (int64_t d = 0; d < params.head_dim; ++d) {
      delta[i] += widen(dout[i * dout_stride + d]) * widen(out[i * out_stride + d]);
    }
  }
}

template <typename scalar_t>
void backward_rows(const AttentionParams& params, const Block& block, int64_t head, Scratch<acc_t<scalar_t>> scratch) {
  using T = acc_t<scalar_t>;
  const Range& rows = block.range;
  const int64_t head_dim = params.head_dim, width = round_up(head_dim, kLanes);
  const T scale = static_cast<T>(params.scale);
  T *q = scratch.tile(), *dout = scratch.tile(), *k = scratch.tile(), *kt = scratch.tile(), *vt = scratch.tile();
  T *s = scratch.tile(), *dp = scratch.tile(), *dq = scratch.tile();
  T* factors = params.dropout_p > 0 ? scratch.tile() : nullptr;
  T delta[kBlock];
  row_deltas<scalar_t>(params, rows, head, delta);
  const T* lse = at<const T>(params.lse, rows, 0, head);
  load_rows<scalar_t>(params.dout, rows, 0, head, head_dim, head_dim, dout);
  std::fill_n(dq, kBlock * width, T{0});

  for (Kind kind : {kWord, kEntity}) {
    const Range keys = sequence(params, kind, block.b);
    load_rows<scalar_t>(params.projections, rows, params.query_slot(kind), head, head_dim, head_dim, q);
    for (int64_t start = 0; start < keys.size; start += kBlock) {
      const Range columns = block_of(keys, start);
      load_rows<scalar_t>(params.projections, columns, params.key_slot(), head, head_dim, width, k);
      load_columns<scalar_t>(params.projections, columns, params.key_slot(), head, head_dim, kt);
      load_columns<scalar_t>(params.projections, columns, params.value_slot(), head, head_dim, vt);
      // Absent columns score q . 0 = 0 and keep it: they add 0 * 0 to dq.
      multiply(kBlock, head_dim, q, kt, s);
      multiply(kBlock, head_dim, dout, vt, dp);
      if (factors) dropout_factors(params, block.b, head, rows, columns, factors);
      for (int64_t i = 0; i < rows.size; ++i) {
        for (int64_t j = 0; j < columns.size; ++j) {
          T& ds = s[i * kBlock + j];
          const T gradient = dp[i * kBlock + j] * (factors ? factors[i * kBlock + j] : 1);
          ds = std::exp(ds * scale - lse[i]) * (gradient - delta[i]) * scale;
        }
      }
      multiply_add(width, kBlock, s, k, dq);
    }
    // In a stack of 3 one query serves both kinds of keys, and its gradient is the sum.
    if (kind == kEntity || params.stack == 4) {
      store_rows<scalar_t>(dq, width, params.dprojections, rows, params.query_slot(kind), head, head_dim);
      std::fill_n(dq, kBlock * width, T{0});
    }
  }
}

template <typename scalar_t>
void backward_keys(const AttentionParams& params, const Block& block, int64_t head, Scratch<acc_t<scalar_t>> scratch) {
  using T = acc_t<scalar_t>;
  const Range& columns = block.range;
  const int64_t head_dim = params.head_dim, width = round_up(head_dim, kLanes);
  const int64_t query_slot = params.query_slot(columns.kind);
  const T scale = static_cast<T>(params.scale);
  T *k = scratch.tile(), *v = scratch.tile(), *q = scratch.tile(), *qt = scratch.tile(), *dout = scratch.tile();
  T *doutt = scratch.tile(), *p = scratch.tile(), *ds = scratch.tile(), *dk = scratch.tile(), *dv = scratch.tile();
  T* factors = params.dropout_p > 0 ? scratch.tile() : nullptr;
  T delta[kBlock];
  load_rows<scalar_t>(params.projections, columns, params.key_slot(), head, head_dim, head_dim, k);
  load_rows<scalar_t>(params.projections, columns, params.value_slot(), head, head_dim, head_dim, v);
  std::fill_n(dk, kBlock * width, T{0});
  std::fill_n(dv, kBlock * width, T{0});

  for (Kind kind : {kWord, kEntity}) {
    const Range queries = sequence(params, kind, block.b);
    for (int64_t start = 0; start < queries.size; start += kBlock) {
      const Range rows = block_of(queries, start);
      row_deltas<scalar_t>(params, rows, head, delta);
      const T* lse = at<const T>(params.lse, rows, 0, head);
      load_rows<scalar_t>(params.projections, rows, query_slot, head, head_dim, width, q);
      load_columns<scalar_t>(params.projections, rows, query_slot, head, head_dim, qt);
      load_rows<scalar_t>(params.dout, rows, 0, head, head_dim, width, dout);
      load_columns<scalar_t>(params.dout, rows, 0, head, head_dim, doutt);
      // Both tiles are transposed: keys are their rows. Absent columns hold 0 and keep it.
      multiply(kBlock, head_dim, k, qt, p);
      multiply(kBlock, head_dim, v, doutt, ds);
      if (factors) dropout_factors(params, block.b, head, rows, columns, factors);
      for (int64_t j = 0; j < columns.size; ++j) {
        for (int64_t i = 0; i < rows.size; ++i) {
          const int64_t ji = j * kBlock + i;
          const T factor = factors ? factors[i * kBlock + j] : 1;
          const T probability = std::exp(p[ji] * scale - lse[i]);
          ds[ji] = probability * (ds[ji] * factor - delta[i]) * scale;
          p[ji] = probability * factor;
        }
      }
      multiply_add(width, kBlock, p, dout, dv);
      multiply_add(width, kBlock, ds, q, dk);
    }
  }
  store_rows<scalar_t>(dk, width, params.dprojections, columns, params.key_slot(), head, head_dim);
  store_rows<scalar_t>(dv, width, params.dprojections, columns, params.value_slot(), head, head_dim);
}

}  // namespace

void attention_backward_cpu(const AttentionParams& params) {
  dispatch(params.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    for_each_block(params, [&](const Block& block, int64_t head) {
      backward_rows<scalar_t>(params, block, head, Scratch<acc_t<scalar_t>>(params));
      backward_keys<scalar_t>(params, block, head, Scratch<acc_t<scalar_t>>(params));
    });
  });
}

}  // namespace luke_kernels
