"""Entity-aware attention in Triton: forward, dQ, and dK with dV, each one launch, without atomics.

The query depends on the kind of the key alone (words and entities each have a slot of their own in every row's
stack). So the forward and dQ are flash attention whose loop over keys has two segments, each with its own query tile;
a block of keys reads one query slot, so dK and dV are flash attention whose loop over rows has two segments.

    program (block of sequence, head): a sequence's blocks of words come first, then its blocks of entities; those past
        the end return
    s = q k^T, p = 2^(scale log2(e) s - lse log2(e)), ds = p (dp - delta), delta = rowsum(dout * out)

Source: Dao 2023, "FlashAttention-2"; the two segments are of this package (ops/README.md).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from luke_kernels.ops import dropout
from luke_kernels.ops.layout import Layout, empty_gradients, empty_outputs

# (BLOCK_M rows, BLOCK_N keys, num_warps, num_stages) by kernel and padded head_dim. Chosen by compiling for sm_80, 90
# and 100 under Triton 3.6 and 3.9 (tests/ops/compile_triton.py bounds the spills): dK/dV of twice the tile spills 3 KB
# on sm_80 under 3.9. Not yet timed.
HALF_CONFIGS = {
    "fwd": {32: (128, 64, 4, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 2)},
    "bwd_dq": {32: (128, 64, 4, 3), 64: (128, 64, 8, 3), 128: (64, 64, 8, 2)},
    "bwd_dkdv": {32: (64, 128, 8, 2), 64: (32, 128, 8, 2), 128: (16, 128, 8, 2)},
}
# fp32 products run on the FMA units, whose operands live in registers; some of these spill up to 360 bytes.
FLOAT32_CONFIGS = {
    "fwd": {32: (64, 32, 4, 2), 64: (64, 32, 8, 2), 128: (32, 32, 8, 2)},
    "bwd_dq": {32: (64, 32, 4, 2), 64: (32, 32, 4, 2), 128: (32, 16, 4, 2)},
    "bwd_dkdv": {32: (32, 64, 4, 2), 64: (32, 32, 8, 2), 128: (16, 32, 8, 2)},
}
LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))
# Numbers of tokens change from batch to batch: specialising on them would compile again and again.
_VARYING = ["num_words", "num_entities", "max_words", "max_entities", "threshold"]


def config(kernel: str, dtype: torch.dtype, block_d: int) -> dict[str, int]:
    """Return the tile and launch configuration of "fwd", "bwd_dq" or "bwd_dkdv"."""
    table = FLOAT32_CONFIGS if dtype == torch.float32 else HALF_CONFIGS
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), table[kernel][block_d], strict=True))


@triton.jit
def _own_block(max_words, max_entities, BLOCK: tl.constexpr):
    """Return (the program's sequence, whether its block holds entities, the block's first row among its kind)."""
    word_blocks = tl.cdiv(max_words, BLOCK)
    blocks = word_blocks + tl.cdiv(max_entities, BLOCK)
    block = tl.program_id(0) % blocks
    is_entity = block >= word_blocks
    return tl.program_id(0) // blocks, is_entity, (block - tl.where(is_entity, word_blocks, 0)) * BLOCK


@triton.jit
def _place(offsets, lengths, sequence, num_tokens, max_length):
    """Return (offset, length) of a sequence, kept inside the buffer and the grid."""
    offset = tl.maximum(tl.load(offsets + sequence), 0)
    length = tl.minimum(tl.load(lengths + sequence), max_length)
    return offset.to(tl.int64), tl.minimum(length, num_tokens - offset)


@triton.jit
def _tile(ptr, stride, start, length, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Point at rows [start, start + BLOCK) of a matrix (length, HEAD_DIM); return (pointers, which of them exist)."""
    offs_t, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = ptr + tl.cast(start, tl.int64) * stride + offs_t[:, None].to(tl.int64) * stride + offs_d[None, :]
    mask = start + offs_t[:, None] < length
    if BLOCK_D != HEAD_DIM:
        mask &= offs_d[None, :] < HEAD_DIM
    return pointers, mask


@triton.jit
def _load_tile(ptr, stride, start, length, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    # Zero, not whatever lies there: pads may hold NaN, and 0 * NaN is NaN.
    pointers, mask = _tile(ptr, stride, start, length, BLOCK, HEAD_DIM, BLOCK_D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store_tile(ptr, stride, start, length, value, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers, mask = _tile(ptr, stride, start, length, BLOCK, HEAD_DIM, BLOCK_D)
    tl.store(pointers, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _draws(seed, sequence, threshold, DROPOUT: tl.constexpr):
    """Return what all draws of the program share: (key, third and last word of the counter, threshold)."""
    key, last = tl.cast(0, tl.int64), tl.cast(0, tl.uint32)
    if DROPOUT:
        key, last = tl.load(seed), tl.load(seed + 1).to(tl.uint32)
    return key, tl.program_id(1) + tl.num_programs(1) * sequence, last, threshold


@triton.jit
def _kept(draws, row, column, row_is_entity, column_is_entity):
    """Draw which elements are kept, by the rule of ops/dropout.py; `row` and `column` broadcast."""
    key, head_of_sequence, last, threshold = draws
    kinds = tl.cast(row_is_entity, tl.uint32) << 31 | tl.cast(column_is_entity, tl.uint32) << 30
    draw0, draw1, draw2, draw3 = tl.philox(key, column // 4, row, head_of_sequence, last ^ kinds)
    lane = column % 4
    draw = tl.where(lane < 2, tl.where(lane == 0, draw0, draw1), tl.where(lane == 2, draw2, draw3))
    return draw >= threshold


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k, v, stride_t, length_n, scale, draws, offs_m, row_is_entity,
    KEYS_ARE_ENTITIES: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run a tile of queries over the keys of one kind, with an online softmax in base 2."""
    for start_n in range(0, length_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k_tile = _load_tile(k, stride_t, start_n, length_n, BLOCK_N, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        if start_n + BLOCK_N > length_n:
            s = tl.where(offs_n[None, :] < length_n, s, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
        # Scores may all be -inf so far.
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        p = tl.exp2(tl.fma(s, scale, -shift[:, None]))
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        if DROPOUT:
            kept = _kept(draws, offs_m[:, None], offs_n[None, :], row_is_entity, KEYS_ARE_ENTITIES)
            p = tl.where(kept, p, 0.0)
        v_tile = _load_tile(v, stride_t, start_n, length_n, BLOCK_N, HEAD_DIM, BLOCK_D)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=_VARYING)
def attention_fwd_kernel(
    words, entities, out, lse, word_offsets, word_lengths, entity_offsets, entity_lengths, seed,
    stride_wt, stride_ws, stride_wh, stride_et, stride_es, stride_eh,
    num_words, num_entities, max_words, max_entities, scale, keep_scale, threshold,
    NEGATE: tl.constexpr, STACK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, row_is_entity, start_m = _own_block(max_words, max_entities, BLOCK_M)
    word_offset, length_w = _place(word_offsets, word_lengths, sequence, num_words, max_words)
    entity_offset, length_e = _place(entity_offsets, entity_lengths, sequence, num_entities, max_entities)
    length_m = tl.where(row_is_entity, length_e, length_w)
    if start_m >= length_m:
        return
    head = tl.program_id(1).to(tl.int64)
    words += word_offset * stride_wt + head * stride_wh
    entities += entity_offset * stride_et + head * stride_eh
    rows = tl.where(row_is_entity, entities, words)
    stride_rt = tl.where(row_is_entity, stride_et, stride_wt)
    stride_rs = tl.where(row_is_entity, stride_es, stride_ws)
    draws = _draws(seed, sequence, threshold, DROPOUT)
    offs_m = start_m + tl.arange(0, BLOCK_M)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    q = _load_tile(rows, stride_rt, start_m, length_m, BLOCK_M, HEAD_DIM, BLOCK_D)
    if NEGATE:
        q = -q
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, words + (STACK - 2) * stride_ws, words + (STACK - 1) * stride_ws, stride_wt, length_w,
        scale, draws, offs_m, row_is_entity, False, BLOCK_N, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip
    q = _load_tile(rows + (STACK - 3) * stride_rs, stride_rt, start_m, length_m, BLOCK_M, HEAD_DIM, BLOCK_D)
    if NEGATE:
        q = -q
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, entities + (STACK - 2) * stride_es, entities + (STACK - 1) * stride_es, stride_et,
        length_e, scale, draws, offs_m, row_is_entity, True, BLOCK_N, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip

    token = tl.where(row_is_entity, num_words + entity_offset, word_offset)
    stride_ot = tl.num_programs(1) * HEAD_DIM
    value = acc * (keep_scale / row_sum)[:, None]
    _store_tile(
        out + token * stride_ot + head * HEAD_DIM, stride_ot, start_m, length_m, value, BLOCK_M, HEAD_DIM, BLOCK_D
    )
    lse += head * (num_words + num_entities) + token
    tl.store(lse + offs_m, (row_max + tl.log2(row_sum)) * LN2, mask=offs_m < length_m)


def forward(
    words: Tensor, entities: Tensor, layout: Layout, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(words, entities, layout.covers_rows)
    arguments, constants = _shared(words, entities, layout, dropout_p, seed)
    tile = config("fwd", words.dtype, constants["BLOCK_D"])
    # The running max is taken before scaling, which holds for positive factors: queries take the sign, and a scale of
    # zero, which would turn the -inf of masked scores into NaN, becomes a tiny one.
    factor = max(abs(scale), 1e-30) * math.log2(math.e)
    with torch.cuda.device_of(words):
        attention_fwd_kernel[_grid(layout, words, tile["BLOCK_M"])](
            words, entities, out, lse, **arguments, scale=factor, NEGATE=scale < 0, **constants, **tile
        )
    return out, lse


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _gather_dq(
    dq, q, k, v, stride_t, length_n, dout, row_lse, row_delta, scale, draws, keep_scale, offs_m,
    row_is_entity, KEYS_ARE_ENTITIES: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add up the gradient, but for the scale, of a tile of queries over the keys of one kind."""
    for start_n in range(0, length_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k_tile = _load_tile(k, stride_t, start_n, length_n, BLOCK_N, HEAD_DIM, BLOCK_D)
        v_tile = _load_tile(v, stride_t, start_n, length_n, BLOCK_N, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        log_p = tl.fma(s, scale * LOG2E, -row_lse[:, None])
        if start_n + BLOCK_N > length_n:
            # An absent key scores 0, which overflows where all true scores are far below.
            log_p = tl.where(offs_n[None, :] < length_n, log_p, -float("inf"))
        p = tl.exp2(log_p)
        dp = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)
        if DROPOUT:
            kept = _kept(draws, offs_m[:, None], offs_n[None, :], row_is_entity, KEYS_ARE_ENTITIES)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - row_delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=_VARYING)
def attention_bwd_dq_kernel(
    words, entities, out, lse, delta, dout_words, dout_entities, dwords, dentities,
    word_offsets, word_lengths, entity_offsets, entity_lengths, seed,
    stride_wt, stride_ws, stride_wh, stride_et, stride_es, stride_eh,
    stride_dout_wt, stride_dout_wh, stride_dout_et, stride_dout_eh,
    num_words, num_entities, max_words, max_entities, scale, keep_scale, threshold,
    STACK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the queries, and delta for the kernel of dK and dV."""
    sequence, row_is_entity, start_m = _own_block(max_words, max_entities, BLOCK_M)
    word_offset, length_w = _place(word_offsets, word_lengths, sequence, num_words, max_words)
    entity_offset, length_e = _place(entity_offsets, entity_lengths, sequence, num_entities, max_entities)
    length_m = tl.where(row_is_entity, length_e, length_w)
    if start_m >= length_m:
        return
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    words += word_offset * stride_wt + head * stride_wh
    entities += entity_offset * stride_et + head * stride_eh
    dout_words += word_offset * stride_dout_wt + head * stride_dout_wh
    dout_entities += entity_offset * stride_dout_et + head * stride_dout_eh
    offset = tl.where(row_is_entity, entity_offset, word_offset)
    rows = tl.where(row_is_entity, entities, words)
    stride_rt = tl.where(row_is_entity, stride_et, stride_wt)
    stride_rs = tl.where(row_is_entity, stride_es, stride_ws)
    dout_rows = tl.where(row_is_entity, dout_entities, dout_words)
    stride_dout = tl.where(row_is_entity, stride_dout_et, stride_dout_wt)
    # out (Tw + Te, H, D) and drows (T, STACK, H, D) are contiguous.
    token = tl.where(row_is_entity, num_words, 0) + offset
    stride_ot = num_heads * HEAD_DIM
    stride_dt = STACK * stride_ot
    drows = tl.where(row_is_entity, dentities, dwords) + offset * stride_dt + head * HEAD_DIM
    draws = _draws(seed, sequence, threshold, DROPOUT)
    offs_m = start_m + tl.arange(0, BLOCK_M)

    dout = _load_tile(dout_rows, stride_dout, start_m, length_m, BLOCK_M, HEAD_DIM, BLOCK_D)
    out_tile = _load_tile(
        out + token * stride_ot + head * HEAD_DIM, stride_ot, start_m, length_m, BLOCK_M, HEAD_DIM, BLOCK_D
    )
    row_delta = tl.sum(dout.to(tl.float32) * out_tile.to(tl.float32), 1)
    statistics = head * (num_words + num_entities) + token + offs_m
    tl.store(delta + statistics, row_delta, mask=offs_m < length_m)
    row_lse = tl.load(lse + statistics, mask=offs_m < length_m, other=float("inf")) * LOG2E

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    q = _load_tile(rows, stride_rt, start_m, length_m, BLOCK_M, HEAD_DIM, BLOCK_D)
    dq = _gather_dq(
        dq, q, words + (STACK - 2) * stride_ws, words + (STACK - 1) * stride_ws, stride_wt, length_w, dout, row_lse,
        row_delta, scale, draws, keep_scale, offs_m, row_is_entity, False, BLOCK_N, HEAD_DIM, BLOCK_D,
        DROPOUT, PRECISION,
    )  # fmt: skip
    if STACK == 4:
        _store_tile(drows, stride_dt, start_m, length_m, dq * scale, BLOCK_M, HEAD_DIM, BLOCK_D)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        q = _load_tile(rows + stride_rs, stride_rt, start_m, length_m, BLOCK_M, HEAD_DIM, BLOCK_D)
    dq = _gather_dq(
        dq, q, entities + (STACK - 2) * stride_es, entities + (STACK - 1) * stride_es, stride_et, length_e, dout,
        row_lse, row_delta, scale, draws, keep_scale, offs_m, row_is_entity, True, BLOCK_N, HEAD_DIM,
        BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip
    drows += (STACK - 3) * stride_ot
    _store_tile(drows, stride_dt, start_m, length_m, dq * scale, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _gather_dkdv(
    dk, dv, k, v, q, stride_q, dout, stride_dout, lse, delta, length_m, scale, draws, keep_scale, start_n, length_n,
    column_is_entity, ROWS_ARE_ENTITIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add up the gradients, but for their factors, of a tile of keys over the rows of one kind.

    Scores are computed transposed: transposing the result of a dot gives wrong gradients on sm_90 in Triton 3.4 to
    3.7.0. Absent rows need no mask: their lse of +inf makes p zero.
    """
    offs_n = start_n + tl.arange(0, BLOCK_N)
    for start_m in range(0, length_m, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q_tile = _load_tile(q, stride_q, start_m, length_m, BLOCK_M, HEAD_DIM, BLOCK_D)
        dout_tile = _load_tile(dout, stride_dout, start_m, length_m, BLOCK_M, HEAD_DIM, BLOCK_D)
        row_lse = tl.load(lse + offs_m, mask=offs_m < length_m, other=float("inf")) * LOG2E
        row_delta = tl.load(delta + offs_m, mask=offs_m < length_m, other=0.0)
        s_t = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)
        log_p_t = tl.fma(s_t, scale * LOG2E, -row_lse[None, :])
        if start_n + BLOCK_N > length_n:
            log_p_t = tl.where(offs_n[:, None] < length_n, log_p_t, -float("inf"))
        p_t = tl.exp2(log_p_t)
        dp_t = tl.dot(v, tl.trans(dout_tile), input_precision=PRECISION)
        kept_p_t = p_t
        if DROPOUT:
            kept = _kept(draws, offs_m[None, :], offs_n[:, None], ROWS_ARE_ENTITIES, column_is_entity)
            kept_p_t = tl.where(kept, p_t, 0.0)
            dp_t = tl.where(kept, dp_t * keep_scale, 0.0)
        dv = tl.dot(kept_p_t.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
        ds_t = p_t * (dp_t - row_delta[None, :])
        dk = tl.dot(ds_t.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=_VARYING)
def attention_bwd_dkdv_kernel(
    words, entities, lse, delta, dout_words, dout_entities, dwords, dentities,
    word_offsets, word_lengths, entity_offsets, entity_lengths, seed,
    stride_wt, stride_ws, stride_wh, stride_et, stride_es, stride_eh,
    stride_dout_wt, stride_dout_wh, stride_dout_et, stride_dout_eh,
    num_words, num_entities, max_words, max_entities, scale, keep_scale, threshold,
    STACK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, column_is_entity, start_n = _own_block(max_words, max_entities, BLOCK_N)
    word_offset, length_w = _place(word_offsets, word_lengths, sequence, num_words, max_words)
    entity_offset, length_e = _place(entity_offsets, entity_lengths, sequence, num_entities, max_entities)
    length_n = tl.where(column_is_entity, length_e, length_w)
    if start_n >= length_n:
        return
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    words += word_offset * stride_wt + head * stride_wh
    entities += entity_offset * stride_et + head * stride_eh
    dout_words += word_offset * stride_dout_wt + head * stride_dout_wh
    dout_entities += entity_offset * stride_dout_et + head * stride_dout_eh
    lse += head * (num_words + num_entities)
    delta += head * (num_words + num_entities)
    columns = tl.where(column_is_entity, entities, words)
    stride_ct = tl.where(column_is_entity, stride_et, stride_wt)
    stride_cs = tl.where(column_is_entity, stride_es, stride_ws)
    query_slot = tl.where(column_is_entity, STACK - 3, 0)
    draws = _draws(seed, sequence, threshold, DROPOUT)

    k = _load_tile(columns + (STACK - 2) * stride_cs, stride_ct, start_n, length_n, BLOCK_N, HEAD_DIM, BLOCK_D)
    v = _load_tile(columns + (STACK - 1) * stride_cs, stride_ct, start_n, length_n, BLOCK_N, HEAD_DIM, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dk, dv = _gather_dkdv(
        dk, dv, k, v, words + query_slot * stride_ws, stride_wt, dout_words, stride_dout_wt, lse + word_offset,
        delta + word_offset, length_w, scale, draws, keep_scale, start_n, length_n, column_is_entity, False, BLOCK_M,
        BLOCK_N, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip
    dk, dv = _gather_dkdv(
        dk, dv, k, v, entities + query_slot * stride_es, stride_et, dout_entities, stride_dout_et,
        lse + num_words + entity_offset, delta + num_words + entity_offset, length_e, scale, draws, keep_scale,
        start_n, length_n, column_is_entity, True, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip

    # dcolumns (T, STACK, H, D) is contiguous.
    stride_ds = num_heads * HEAD_DIM
    stride_dt = STACK * stride_ds
    offset = tl.where(column_is_entity, entity_offset, word_offset)
    dcolumns = tl.where(column_is_entity, dentities, dwords) + offset * stride_dt + head * HEAD_DIM
    dcolumns += (STACK - 2) * stride_ds
    _store_tile(dcolumns, stride_dt, start_n, length_n, dk * scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    _store_tile(dcolumns + stride_ds, stride_dt, start_n, length_n, dv * keep_scale, BLOCK_N, HEAD_DIM, BLOCK_D)


def backward(
    dout_words: Tensor,
    dout_entities: Tensor,
    out: Tensor,
    lse: Tensor,
    words: Tensor,
    entities: Tensor,
    layout: Layout,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dwords, dentities = empty_gradients(words, entities, layout.covers_rows)
    arguments, constants = _shared(words, entities, layout, dropout_p, seed)
    for kind, dout in (("w", dout_words), ("e", dout_entities)):
        arguments |= {f"stride_dout_{kind}t": dout.stride(0), f"stride_dout_{kind}h": dout.stride(1)}
    delta = torch.empty_like(lse)
    gradients = (lse, delta, dout_words, dout_entities, dwords, dentities)
    with torch.cuda.device_of(words):
        tile = config("bwd_dq", words.dtype, constants["BLOCK_D"])
        attention_bwd_dq_kernel[_grid(layout, words, tile["BLOCK_M"])](
            words, entities, out, *gradients, **arguments, scale=scale, **constants, **tile
        )
        tile = config("bwd_dkdv", words.dtype, constants["BLOCK_D"])
        attention_bwd_dkdv_kernel[_grid(layout, words, tile["BLOCK_N"])](
            words, entities, *gradients, **arguments, scale=scale, **constants, **tile
        )
    return dwords, dentities


# --- both ------------------------------------------------------------------------------------------------------------


def _grid(layout: Layout, words: Tensor, block: int) -> tuple[int, int]:
    # Sequences share the first axis: the others end at 65535.
    blocks = triton.cdiv(layout.max_words, block) + triton.cdiv(layout.max_entities, block)
    return blocks * layout.batch_size, words.shape[2]


def _shared(words: Tensor, entities: Tensor, layout: Layout, dropout_p: float, seed: Tensor | None) -> tuple:
    """Return the arguments and the compile-time constants that all kernels share."""
    stack, _, head_dim = words.shape[1:]
    made = layout.materialised(words.device)
    arguments = {name: getattr(made, name).contiguous() for name in layout._fields[:4]}
    for kind, buffer in (("w", words), ("e", entities)):
        arguments |= {f"stride_{kind}{axis}": stride for axis, stride in zip("tsh", buffer.stride()[:3], strict=True)}
    arguments |= {
        "seed": seed,
        "num_words": words.shape[0],
        "num_entities": entities.shape[0],
        "max_words": layout.max_words,
        "max_entities": layout.max_entities,
        "keep_scale": 1 / (1 - dropout_p),
        "threshold": dropout.threshold(dropout_p),
    }
    # The new name of allow_tf32: reading the old one raises once the new one was set.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    constants = {
        "STACK": stack,
        "HEAD_DIM": head_dim,
        # For 16 every tile of dK/dV compiles to stmatrix on sm_90, the mark of the fault named at _gather_dkdv.
        "BLOCK_D": max(32, triton.next_power_of_2(head_dim)),
        "DROPOUT": seed is not None,
        "PRECISION": "tf32" if tf32 else "ieee",
        # Triton 3.9 warns, and 3.10 leaves it off, where a caller does not choose.
        "enable_fp_fusion": True,
    }
    return arguments, constants
