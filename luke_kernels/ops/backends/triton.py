"""Entity-aware attention in Triton: forward, dQ, and dK with dV, each one launch, without atomics.

The query depends on the kind of the key alone (words and entities each have a slot of their own in every row's
stack). So the forward and dQ are flash attention whose loop over keys has two segments, each with its own query tile,
and a tile of rows may hold words and entities; a block of keys reads one query slot, so dK and dV are flash attention
whose loop over rows has two segments. Each segment is a loop over whole blocks, without masks, and one over the tail.

    program (sequence, head, block): blocks of rows run over the words, then the entities of a sequence; blocks of keys
        hold one kind, words first; those past the end return
    s = q k^T, p = 2^(scale log2(e) s - lse log2(e)), ds = p (dp - delta), delta = rowsum(dout * out)

Source: Dao 2023, "FlashAttention-2"; the two segments are of this package (ops/README.md).
"""

import functools
import math
import operator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.errors import TritonError

from luke_kernels.ops import backends, dropout
from luke_kernels.ops.layout import Layout, empty_gradients, empty_outputs
from luke_kernels.ops.tuned import TILE_FIELDS, Key, Tile, load

# (BLOCK_M rows, BLOCK_N keys, TAIL, num_warps, num_stages, maxnreg) by kernel and padded head_dim. Kernels loop over
# whole blocks of one side, and over what is left in blocks of TAIL. Those of 64 were timed on an H100: several small
# blocks a multiprocessor beat few large ones, so registers are capped where one more block fits (docs/backends.md).
HOPPER_CONFIGS: dict[str, dict[int, tuple]] = {
    "fwd": {32: (128, 64, 32, 4, 3, None), 64: (64, 64, 32, 4, 3, 128), 128: (64, 64, 32, 4, 3, None)},
    "bwd_dq": {32: (128, 64, 32, 4, 3, None), 64: (64, 32, 32, 4, 4, 128), 128: (64, 64, 32, 4, 2, None)},
    "bwd_dkdv": {32: (64, 128, 32, 4, 2, None), 64: (64, 64, 16, 4, 3, None), 128: (64, 128, 32, 8, 2, None)},
}
# Other GPUs, not timed: what compiles for them without spills in its loops.
HALF_CONFIGS: dict[str, dict[int, tuple]] = {
    "fwd": {32: (128, 64, 32, 4, 3, None), 64: (64, 64, 32, 4, 3, None), 128: (64, 64, 32, 4, 2, None)},
    "bwd_dq": {32: (64, 64, 32, 4, 3, None), 64: (64, 64, 32, 4, 2, None), 128: (64, 32, 32, 4, 2, None)},
    "bwd_dkdv": {32: (64, 64, 32, 4, 2, None), 64: (32, 64, 32, 4, 2, None), 128: (32, 64, 32, 8, 2, None)},
}
# With dropout, on any GPU, not timed: draws need registers of their own.
DROPOUT_CONFIGS: dict[str, dict[int, tuple]] = {
    "fwd": {32: (64, 64, 32, 4, 2, None), 64: (64, 32, 16, 4, 2, None), 128: (64, 32, 16, 4, 2, None)},
    "bwd_dq": {32: (64, 32, 32, 4, 2, None), 64: (64, 32, 16, 4, 2, None), 128: (64, 32, 16, 8, 2, None)},
    "bwd_dkdv": {32: (32, 64, 32, 4, 2, None), 64: (32, 64, 16, 4, 2, None), 128: (32, 64, 16, 8, 2, None)},
}
# fp32 products run on the FMA units, whose operands live in registers.
FLOAT32_CONFIGS: dict[str, dict[int, tuple]] = {
    "fwd": {32: (64, 32, 32, 4, 2, None), 64: (64, 32, 32, 8, 2, None), 128: (32, 16, 16, 8, 2, None)},
    "bwd_dq": {32: (64, 32, 32, 4, 2, None), 64: (32, 32, 32, 4, 2, None), 128: (32, 16, 16, 8, 2, None)},
    "bwd_dkdv": {32: (32, 64, 32, 4, 2, None), 64: (32, 32, 32, 4, 2, None), 128: (16, 32, 16, 8, 2, None)},
}
LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))
# Numbers of tokens change from batch to batch: specialising on them would compile again and again.
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_VARYING = ["num_words", "num_entities", "num_heads", "max_words", "max_entities", "threshold"]


@functools.cache
def config(kernel: str, capability: int, dtype: torch.dtype, block_d: int, dropout: bool) -> Tile:
    """Return the tile and launch configuration of "fwd", "bwd_dq" or "bwd_dkdv" for sm_`capability`."""
    if dtype == torch.float32:
        table = FLOAT32_CONFIGS
    elif dropout:
        table = DROPOUT_CONFIGS
    else:
        table = HOPPER_CONFIGS if capability == 90 else HALF_CONFIGS
    return dict(zip(TILE_FIELDS, table[kernel][block_d], strict=True))


def built_in_tile(key: Key, device: torch.device) -> Tile:
    """Return the tile of a kernel on a GPU that was not tuned."""
    return config(key.kernel, _capability(device), getattr(torch, key.dtype), key.block_d, key.dropout)


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type == "cpu":  # the interpreter
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def is_small(batch_size: int, num_tokens: int, num_heads: int, device: torch.device) -> bool:
    """Return whether blocks of 64 rows are no more than four a multiprocessor, about what it holds at a time."""
    return _cdiv(num_tokens, 64) * num_heads * batch_size <= 4 * _multiprocessors(device)


def _config(kernel: str, words: Tensor, layout: Layout, constants: dict[str, Any]) -> Tile:
    """Return the tile that tune() found for such a call, or the built-in one."""
    block_d, has_dropout = constants["BLOCK_D"], constants["DROPOUT"]
    if tuned := load(words.device):
        tokens = layout.max_words + layout.max_entities
        small = is_small(layout.batch_size, tokens, words.shape[2], words.device)
        key = Key(kernel, _DTYPE_NAMES[words.dtype], block_d, has_dropout, small)
        if key in tuned:
            return tuned[key]
    return config(kernel, _capability(words.device), words.dtype, block_d, has_dropout)


def _cdiv(numerator: int, denominator: int) -> int:
    # Triton's own is a function of kernels too, which costs as much as the rest of a call.
    return -(-numerator // denominator)


def padded_head_dim(head_dim: int) -> int:
    # For 16 every tile of dK/dV compiles to stmatrix on sm_90, the mark of the fault named at _gather_dkdv_blocks.
    return max(32, 1 << (head_dim - 1).bit_length())


def failures() -> tuple[type[BaseException], ...]:
    """Return what a tile may raise that does not compile or does not fit."""
    return (TritonError, RuntimeError)


@triton.jit
def _program(blocks, num_heads):
    """Return the program's (sequence, head, block). Neighbours share keys and values, then rows of memory."""
    head = tl.program_id(0) // blocks % num_heads
    return tl.program_id(0) // blocks // num_heads, head.to(tl.int64), tl.program_id(0) % blocks


@triton.jit
def _place(offsets, lengths, sequence, num_tokens, max_length):
    """Return (offset, length) of a sequence, kept inside the buffer and the grid."""
    # 64 bits: a wrong batch size must not come round to the front of the buffer.
    offset = sequence.to(tl.int64) * max_length
    if offsets is not None:
        offset = tl.maximum(tl.load(offsets + sequence), 0).to(tl.int64)
    length = max_length
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + sequence), max_length)
    return offset, tl.maximum(tl.minimum(length, num_tokens - offset), 0).to(tl.int32)


@triton.jit
def _rows(start_m, length_w, length_e, BLOCK_M: tl.constexpr):
    """Return (rank among its kind, is it an entity, does it exist) of each row of a block; words come first."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    is_entity = offs_m >= length_w
    return tl.where(is_entity, offs_m - length_w, offs_m), is_entity, offs_m < length_w + length_e


@triton.jit
def _row_pointers(words, entities, stride_wt, stride_et, row, is_entity, BLOCK_D: tl.constexpr):
    """Point at a block of rows (BLOCK_M, BLOCK_D) that lie in two buffers."""
    row = row.to(tl.int64)
    return tl.where(is_entity, entities + row * stride_et, words + row * stride_wt)[:, None] + tl.arange(0, BLOCK_D)


@triton.jit
def _mask(exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = exists[:, None]
    if BLOCK_D != HEAD_DIM:
        mask &= (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def _load_tile(
    ptr, stride, start, length,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load rows [start, start + BLOCK) of a matrix (length, HEAD_DIM); all exist unless MASKED."""
    offs_t, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    pointers = ptr + tl.cast(start, tl.int64) * stride + offs_t[:, None].to(tl.int64) * stride + offs_d[None, :]
    # Zero, not whatever lies there: pads may hold NaN, and 0 * NaN is NaN.
    if MASKED:
        return tl.load(pointers, mask=_mask(start + offs_t < length, HEAD_DIM, BLOCK_D), other=0.0)
    if BLOCK_D != HEAD_DIM:
        return tl.load(pointers, mask=offs_d[None, :] < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@triton.jit
def _draws(seed, sequence, head, num_heads, threshold, DROPOUT: tl.constexpr):
    """Return what all draws of the program share: (key, third and last word of the counter, threshold)."""
    key, last = tl.cast(0, tl.int64), tl.cast(0, tl.uint32)
    if DROPOUT:
        key, last = tl.load(seed), tl.load(seed + 1).to(tl.uint32)
    return key, head.to(tl.int32) + num_heads * sequence, last, threshold


@triton.jit
def _kept_fours(draws, group, row, row_is_entity, column_is_entity):
    """Draw which elements are kept, by the rule of ops/dropout.py: (..., 2, 2) of the four columns of each group."""
    key, head_of_sequence, last, threshold = draws
    kinds = tl.cast(row_is_entity, tl.uint32) << 31 | tl.cast(column_is_entity, tl.uint32) << 30
    draw0, draw1, draw2, draw3 = tl.philox(key, group, row, head_of_sequence, last ^ kinds)
    first, second = tl.join(draw0 >= threshold, draw2 >= threshold), tl.join(draw1 >= threshold, draw3 >= threshold)
    return tl.join(first, second)


@triton.jit
def _kept(draws, row, row_is_entity, start_n, column_is_entity, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Draw which are kept of columns from start_n on, a multiple of 4: (BLOCK_M, BLOCK_N)."""
    group = start_n // 4 + tl.arange(0, BLOCK_N // 4)
    fours = _kept_fours(draws, group[None, :], row[:, None], row_is_entity[:, None], column_is_entity)
    return tl.reshape(fours, (BLOCK_M, BLOCK_N))


@triton.jit
def _kept_transposed(
    draws, row, ROWS_ARE_ENTITIES: tl.constexpr, start_n, column_is_entity, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Draw as _kept, transposed: (BLOCK_N, BLOCK_M)."""
    group = start_n // 4 + tl.arange(0, BLOCK_N // 4)
    fours = _kept_fours(draws, group[:, None], row[None, :], ROWS_ARE_ENTITIES, column_is_entity)
    return tl.reshape(tl.permute(fours, (0, 2, 3, 1)), (BLOCK_N, BLOCK_M))


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _attend_blocks(
    acc, row_sum, row_max, q, k, v, stride_t, begin, length_n, scale, draws, row, row_is_entity,
    KEYS_ARE_ENTITIES: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run a tile of queries over keys [begin, length_n) with an online softmax in base 2."""
    for start_n in range(begin, length_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k_tile = _load_tile(k, stride_t, start_n, length_n, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        if MASKED:
            s = tl.where(offs_n[None, :] < length_n, s, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
        # Scores may all be -inf so far.
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        p = tl.exp2(tl.fma(s, scale, -shift[:, None]))
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        if DROPOUT:
            kept = _kept(draws, row, row_is_entity, start_n, KEYS_ARE_ENTITIES, q.shape[0], BLOCK_N)
            p = tl.where(kept, p, 0.0)
        v_tile = _load_tile(v, stride_t, start_n, length_n, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision=PRECISION)
    return acc, row_sum, row_max


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k, v, stride_t, length_n, scale, draws, row, row_is_entity,
    KEYS_ARE_ENTITIES: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run a tile of queries over the keys of one kind."""
    whole = length_n // BLOCK_N * BLOCK_N
    acc, row_sum, row_max = _attend_blocks(
        acc, row_sum, row_max, q, k, v, stride_t, 0, whole, scale, draws, row, row_is_entity,
        KEYS_ARE_ENTITIES, False, BLOCK_N, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip
    return _attend_blocks(
        acc, row_sum, row_max, q, k, v, stride_t, whole, length_n, scale, draws, row, row_is_entity,
        KEYS_ARE_ENTITIES, True, TAIL, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def attention_fwd_kernel(
    words, entities, out, lse, word_offsets, word_lengths, entity_offsets, entity_lengths, seed,
    stride_wt, stride_ws, stride_wh, stride_et, stride_es, stride_eh,
    num_words, num_entities, num_heads, max_words, max_entities, scale, keep_scale, threshold,
    NEGATE: tl.constexpr, STACK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TAIL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Three slots may be more than 2^31 elements.
    stride_ws, stride_es = tl.cast(stride_ws, tl.int64), tl.cast(stride_es, tl.int64)
    sequence, head, block = _program(tl.cdiv(max_words + max_entities, BLOCK_M), num_heads)
    word_offset, length_w = _place(word_offsets, word_lengths, sequence, num_words, max_words)
    entity_offset, length_e = _place(entity_offsets, entity_lengths, sequence, num_entities, max_entities)
    start_m = block * BLOCK_M
    if start_m >= length_w + length_e:
        return
    words += word_offset * stride_wt + head * stride_wh
    entities += entity_offset * stride_et + head * stride_eh
    row, row_is_entity, exists = _rows(start_m, length_w, length_e, BLOCK_M)
    mask = _mask(exists, HEAD_DIM, BLOCK_D)
    draws = _draws(seed, sequence, head, num_heads, threshold, DROPOUT)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    q = tl.load(_row_pointers(words, entities, stride_wt, stride_et, row, row_is_entity, BLOCK_D), mask, 0.0)
    if NEGATE:
        q = -q
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, words + (STACK - 2) * stride_ws, words + (STACK - 1) * stride_ws, stride_wt, length_w,
        scale, draws, row, row_is_entity, False, BLOCK_N, TAIL, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip
    q = tl.load(
        _row_pointers(
            words + (STACK - 3) * stride_ws, entities + (STACK - 3) * stride_es, stride_wt, stride_et, row,
            row_is_entity, BLOCK_D,
        ),
        mask, 0.0,
    )  # fmt: skip
    if NEGATE:
        q = -q
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, entities + (STACK - 2) * stride_es, entities + (STACK - 1) * stride_es, stride_et,
        length_e, scale, draws, row, row_is_entity, True, BLOCK_N, TAIL, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip

    token = tl.where(row_is_entity, num_words + entity_offset, word_offset) + row
    # out (Tw + Te, H, D) is contiguous.
    pointers = out + ((token * num_heads + head) * HEAD_DIM)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    tl.store(pointers, (acc * (keep_scale / row_sum)[:, None]).to(out.dtype.element_ty), mask)
    tl.store(lse + head * (num_words + num_entities) + token, (row_max + tl.log2(row_sum)) * LN2, exists)


def forward(
    words: Tensor, entities: Tensor, layout: Layout, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(words, entities, layout.covers_rows)
    constants = _constants(words, seed)
    constants = constants | {"NEGATE": scale < 0} | _config("fwd", words, layout, constants)
    blocks = _cdiv(layout.max_words + layout.max_entities, constants["BLOCK_M"])
    # The running max is taken before scaling, which holds for positive factors: queries take the sign, and a scale of
    # zero, which would turn the -inf of masked scores into NaN, becomes a tiny one.
    factor = max(abs(scale), 1e-30) * math.log2(math.e)
    _launch(
        attention_fwd_kernel,
        blocks * words.shape[2] * layout.batch_size,
        (words, entities, out, lse, *layout[:4], seed),
        (*words.stride()[:3], *entities.stride()[:3]),
        _numbers(words, entities, layout, factor, dropout_p),
        constants,
    )
    return out, lse


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _gather_dq_blocks(
    dq, q, k, v, stride_t, begin, length_n, dout, minus_lse, row_delta, scale, draws, keep_scale, row, row_is_entity,
    KEYS_ARE_ENTITIES: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add up the gradient, but for the scale, of a tile of queries over keys [begin, length_n)."""
    for start_n in range(begin, length_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k_tile = _load_tile(k, stride_t, start_n, length_n, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
        v_tile = _load_tile(v, stride_t, start_n, length_n, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        log_p = tl.fma(s, scale * LOG2E, minus_lse[:, None])
        if MASKED:
            # An absent key scores 0, which overflows where all true scores are far below.
            log_p = tl.where(offs_n[None, :] < length_n, log_p, -float("inf"))
        p = tl.exp2(log_p)
        dp = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)
        if DROPOUT:
            kept = _kept(draws, row, row_is_entity, start_n, KEYS_ARE_ENTITIES, q.shape[0], BLOCK_N)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - row_delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _gather_dq(
    dq, q, k, v, stride_t, length_n, dout, minus_lse, row_delta, scale, draws, keep_scale, row, row_is_entity,
    KEYS_ARE_ENTITIES: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add up the gradient, but for the scale, of a tile of queries over the keys of one kind."""
    whole = length_n // BLOCK_N * BLOCK_N
    dq = _gather_dq_blocks(
        dq, q, k, v, stride_t, 0, whole, dout, minus_lse, row_delta, scale, draws, keep_scale, row, row_is_entity,
        KEYS_ARE_ENTITIES, False, BLOCK_N, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip
    return _gather_dq_blocks(
        dq, q, k, v, stride_t, whole, length_n, dout, minus_lse, row_delta, scale, draws, keep_scale, row,
        row_is_entity, KEYS_ARE_ENTITIES, True, TAIL, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def attention_bwd_dq_kernel(
    words, entities, out, lse, statistics, dout_words, dout_entities, dwords, dentities,
    word_offsets, word_lengths, entity_offsets, entity_lengths, seed,
    stride_wt, stride_ws, stride_wh, stride_et, stride_es, stride_eh,
    stride_dout_wt, stride_dout_wh, stride_dout_et, stride_dout_eh,
    num_words, num_entities, num_heads, max_words, max_entities, scale, keep_scale, threshold,
    STACK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the queries; and for the kernel of dK and dV, statistics (2, H, Tw + Te): lse in base 2
    and delta."""
    # Three slots may be more than 2^31 elements.
    stride_ws, stride_es = tl.cast(stride_ws, tl.int64), tl.cast(stride_es, tl.int64)
    sequence, head, block = _program(tl.cdiv(max_words + max_entities, BLOCK_M), num_heads)
    word_offset, length_w = _place(word_offsets, word_lengths, sequence, num_words, max_words)
    entity_offset, length_e = _place(entity_offsets, entity_lengths, sequence, num_entities, max_entities)
    start_m = block * BLOCK_M
    if start_m >= length_w + length_e:
        return
    words += word_offset * stride_wt + head * stride_wh
    entities += entity_offset * stride_et + head * stride_eh
    dout_words += word_offset * stride_dout_wt + head * stride_dout_wh
    dout_entities += entity_offset * stride_dout_et + head * stride_dout_eh
    row, row_is_entity, exists = _rows(start_m, length_w, length_e, BLOCK_M)
    mask = _mask(exists, HEAD_DIM, BLOCK_D)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    draws = _draws(seed, sequence, head, num_heads, threshold, DROPOUT)

    dout = tl.load(
        _row_pointers(dout_words, dout_entities, stride_dout_wt, stride_dout_et, row, row_is_entity, BLOCK_D), mask, 0.0
    )
    # out (Tw + Te, H, D) and dwords, dentities (T, STACK, H, D) are contiguous.
    token = tl.where(row_is_entity, num_words + entity_offset, word_offset) + row
    out_tile = tl.load(out + ((token * num_heads + head) * HEAD_DIM)[:, None] + offs_d, mask, 0.0)
    row_delta = tl.sum(dout.to(tl.float32) * out_tile.to(tl.float32), 1)
    num_tokens = num_words + num_entities
    minus_lse = tl.load(lse + head * num_tokens + token, exists, float("inf")) * -LOG2E
    tl.store(statistics + head * num_tokens + token, minus_lse, exists)
    tl.store(statistics + (num_heads + head) * num_tokens + token, row_delta, exists)
    slot = num_heads.to(tl.int64) * HEAD_DIM
    dwords += word_offset * STACK * slot + head * HEAD_DIM
    dentities += entity_offset * STACK * slot + head * HEAD_DIM

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    q = tl.load(_row_pointers(words, entities, stride_wt, stride_et, row, row_is_entity, BLOCK_D), mask, 0.0)
    dq = _gather_dq(
        dq, q, words + (STACK - 2) * stride_ws, words + (STACK - 1) * stride_ws, stride_wt, length_w, dout, minus_lse,
        row_delta, scale, draws, keep_scale, row, row_is_entity, False, BLOCK_N, TAIL, HEAD_DIM, BLOCK_D,
        DROPOUT, PRECISION,
    )  # fmt: skip
    if STACK == 4:
        pointers = _row_pointers(dwords, dentities, STACK * slot, STACK * slot, row, row_is_entity, BLOCK_D)
        tl.store(pointers, (dq * scale).to(dwords.dtype.element_ty), mask)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        pointers = _row_pointers(
            words + stride_ws, entities + stride_es, stride_wt, stride_et, row, row_is_entity, BLOCK_D
        )
        q = tl.load(pointers, mask, 0.0)
        dwords += slot
        dentities += slot
    dq = _gather_dq(
        dq, q, entities + (STACK - 2) * stride_es, entities + (STACK - 1) * stride_es, stride_et, length_e, dout,
        minus_lse, row_delta, scale, draws, keep_scale, row, row_is_entity, True, BLOCK_N, TAIL, HEAD_DIM, BLOCK_D,
        DROPOUT, PRECISION,
    )  # fmt: skip
    pointers = _row_pointers(dwords, dentities, STACK * slot, STACK * slot, row, row_is_entity, BLOCK_D)
    tl.store(pointers, (dq * scale).to(dwords.dtype.element_ty), mask)


@triton.jit
def _gather_dkdv_blocks(
    dk, dv, k, v, q, stride_q, dout, stride_dout, lse, delta, begin, length_m, scale, draws, keep_scale, start_n,
    column_is_entity, ROWS_ARE_ENTITIES: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add up the gradients, but for their factors, of a tile of keys over rows [begin, length_m).

    Scores are computed transposed: transposing the result of a dot gives wrong gradients on sm_90 in Triton 3.4 to
    3.7.0. Absent rows need no mask: their lse of +inf makes p zero.
    """
    for start_m in range(begin, length_m, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q_tile = _load_tile(q, stride_q, start_m, length_m, MASKED, BLOCK_M, HEAD_DIM, BLOCK_D)
        dout_tile = _load_tile(dout, stride_dout, start_m, length_m, MASKED, BLOCK_M, HEAD_DIM, BLOCK_D)
        if MASKED:
            minus_lse = tl.load(lse + offs_m, offs_m < length_m, -float("inf"))
            row_delta = tl.load(delta + offs_m, offs_m < length_m, 0.0)
        else:
            minus_lse = tl.load(lse + offs_m)
            row_delta = tl.load(delta + offs_m)
        s_t = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)
        p_t = tl.exp2(tl.fma(s_t, scale * LOG2E, minus_lse[None, :]))
        dp_t = tl.dot(v, tl.trans(dout_tile), input_precision=PRECISION)
        kept_p_t = p_t
        if DROPOUT:
            kept = _kept_transposed(draws, offs_m, ROWS_ARE_ENTITIES, start_n, column_is_entity, BLOCK_M, k.shape[0])
            kept_p_t = tl.where(kept, p_t, 0.0)
            dp_t = tl.where(kept, dp_t * keep_scale, 0.0)
        dv = tl.dot(kept_p_t.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
        ds_t = p_t * (dp_t - row_delta[None, :])
        dk = tl.dot(ds_t.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _gather_dkdv(
    dk, dv, k, v, q, stride_q, dout, stride_dout, lse, delta, length_m, scale, draws, keep_scale, start_n,
    column_is_entity, ROWS_ARE_ENTITIES: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add up the gradients, but for their factors, of a tile of keys over the rows of one kind."""
    whole = length_m // BLOCK_M * BLOCK_M
    dk, dv = _gather_dkdv_blocks(
        dk, dv, k, v, q, stride_q, dout, stride_dout, lse, delta, 0, whole, scale, draws, keep_scale, start_n,
        column_is_entity, ROWS_ARE_ENTITIES, False, BLOCK_M, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip
    return _gather_dkdv_blocks(
        dk, dv, k, v, q, stride_q, dout, stride_dout, lse, delta, whole, length_m, scale, draws, keep_scale, start_n,
        column_is_entity, ROWS_ARE_ENTITIES, True, TAIL, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def attention_bwd_dkdv_kernel(
    words, entities, statistics, dout_words, dout_entities, dwords, dentities,
    word_offsets, word_lengths, entity_offsets, entity_lengths, seed,
    stride_wt, stride_ws, stride_wh, stride_et, stride_es, stride_eh,
    stride_dout_wt, stride_dout_wh, stride_dout_et, stride_dout_eh,
    num_words, num_entities, num_heads, max_words, max_entities, scale, keep_scale, threshold,
    STACK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    stride_ws, stride_es = tl.cast(stride_ws, tl.int64), tl.cast(stride_es, tl.int64)
    word_blocks = tl.cdiv(max_words, BLOCK_N)
    sequence, head, block = _program(word_blocks + tl.cdiv(max_entities, BLOCK_N), num_heads)
    word_offset, length_w = _place(word_offsets, word_lengths, sequence, num_words, max_words)
    entity_offset, length_e = _place(entity_offsets, entity_lengths, sequence, num_entities, max_entities)
    column_is_entity = block >= word_blocks
    start_n = (block - tl.where(column_is_entity, word_blocks, 0)) * BLOCK_N
    length_n = tl.where(column_is_entity, length_e, length_w)
    if start_n >= length_n:
        return
    words += word_offset * stride_wt + head * stride_wh
    entities += entity_offset * stride_et + head * stride_eh
    dout_words += word_offset * stride_dout_wt + head * stride_dout_wh
    dout_entities += entity_offset * stride_dout_et + head * stride_dout_eh
    num_tokens = num_words + num_entities
    lse = statistics + head * num_tokens
    delta = lse + num_heads.to(tl.int64) * num_tokens
    columns = tl.where(column_is_entity, entities, words)
    stride_ct = tl.where(column_is_entity, stride_et, stride_wt)
    stride_cs = tl.where(column_is_entity, stride_es, stride_ws)
    query_slot = tl.where(column_is_entity, STACK - 3, 0)
    draws = _draws(seed, sequence, head, num_heads, threshold, DROPOUT)
    offs_n = start_n + tl.arange(0, BLOCK_N)

    # Past the end, the last key once more: its scores are in range, and what it gets is not stored.
    rows = tl.minimum(offs_n, length_n - 1).to(tl.int64)
    pointers = columns + (STACK - 2) * stride_cs + (rows * stride_ct)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    mask = _mask(offs_n >= 0, HEAD_DIM, BLOCK_D)
    k = tl.load(pointers, mask, 0.0)
    v = tl.load(pointers + stride_cs, mask, 0.0)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dk, dv = _gather_dkdv(
        dk, dv, k, v, words + query_slot * stride_ws, stride_wt, dout_words, stride_dout_wt, lse + word_offset,
        delta + word_offset, length_w, scale, draws, keep_scale, start_n, column_is_entity, False, BLOCK_M, TAIL,
        HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip
    dk, dv = _gather_dkdv(
        dk, dv, k, v, entities + query_slot * stride_es, stride_et, dout_entities, stride_dout_et,
        lse + num_words + entity_offset, delta + num_words + entity_offset, length_e, scale, draws, keep_scale, start_n,
        column_is_entity, True, BLOCK_M, TAIL, HEAD_DIM, BLOCK_D, DROPOUT, PRECISION,
    )  # fmt: skip

    # dcolumns (T, STACK, H, D) is contiguous.
    slot = num_heads.to(tl.int64) * HEAD_DIM
    offset = tl.where(column_is_entity, entity_offset, word_offset) + offs_n
    dcolumns = tl.where(column_is_entity, dentities, dwords) + head * HEAD_DIM + (STACK - 2) * slot
    pointers = dcolumns + (offset * STACK * slot)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    mask = _mask(offs_n < length_n, HEAD_DIM, BLOCK_D)
    tl.store(pointers, (dk * scale).to(dwords.dtype.element_ty), mask)
    tl.store(pointers + slot, (dv * keep_scale).to(dwords.dtype.element_ty), mask)


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
    constants = _constants(words, seed)
    tensors = (lse.new_empty((2, *lse.shape)), dout_words, dout_entities, dwords, dentities, *layout[:4], seed)
    strides = (*words.stride()[:3], *entities.stride()[:3], *dout_words.stride()[:2], *dout_entities.stride()[:2])
    numbers = _numbers(words, entities, layout, scale, dropout_p)
    heads_of_batch = words.shape[2] * layout.batch_size

    dq = constants | _config("bwd_dq", words, layout, constants)
    blocks = _cdiv(layout.max_words + layout.max_entities, dq["BLOCK_M"])
    tensors_dq = (words, entities, out, lse, *tensors)
    _launch(attention_bwd_dq_kernel, blocks * heads_of_batch, tensors_dq, strides, numbers, dq)

    dkdv = constants | _config("bwd_dkdv", words, layout, constants)
    blocks = _cdiv(layout.max_words, dkdv["BLOCK_N"]) + _cdiv(layout.max_entities, dkdv["BLOCK_N"])
    tensors_dkdv = (words, entities, *tensors)
    _launch(attention_bwd_dkdv_kernel, blocks * heads_of_batch, tensors_dkdv, strides, numbers, dkdv)
    return dwords, dentities


# --- both ------------------------------------------------------------------------------------------------------------


def _constants(words: Tensor, seed: Tensor | None) -> dict[str, Any]:
    """Return the compile-time constants that all kernels share."""
    # The new name of allow_tf32: reading the old one raises once the new one was set.
    tf32 = words.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return _constants_of(words.shape[1], words.shape[3], seed is not None, tf32)


@functools.cache
def _constants_of(stack: int, head_dim: int, has_dropout: bool, tf32: bool) -> dict[str, Any]:
    return {
        "STACK": stack,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "DROPOUT": has_dropout,
        "PRECISION": "tf32" if tf32 else "ieee",
        # Triton 3.9 warns, and 3.10 leaves it off, where a caller does not choose.
        "enable_fp_fusion": True,
    }


def _numbers(words: Tensor, entities: Tensor, layout: Layout, scale: float, dropout_p: float) -> tuple:
    """Return the numbers that vary from call to call, in the order of the kernels."""
    sizes = words.shape[0], entities.shape[0], words.shape[2], layout.max_words, layout.max_entities
    return *sizes, scale, 1 / (1 - dropout_p), dropout.threshold(dropout_p)


# What Triton compiled, by all it compiled for; and the values of the compile-time constants.
_compiled: dict[tuple, tuple[Any, list]] = {}


def _launch(
    kernel: triton.JITFunction,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    numbers: tuple,
    constants: dict[str, Any],
) -> None:
    """Launch `kernel(*tensors, *strides, *numbers, **constants)`.

    Triton's own dispatch looks at every argument anew, which costs more than the kernels of a small batch take. So a
    call like one before, with aligned tensors and numbers of 32 bits, goes straight to what was compiled for that.
    """
    if backends.INTERPRETING:
        kernel[(programs,)](*tensors, *strides, *numbers, **constants)
        return
    words = tensors[0]
    assert words is not None
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    present = [pointer for pointer in pointers if pointer is not None]
    ordinary = functools.reduce(operator.or_, present) % 16 == 0 and max(*strides, *numbers) < 2**31
    dtypes = tuple([None if t is None else t.dtype for t in tensors])
    key = (kernel, words.device, dtypes, strides, *constants.values())
    with torch.cuda.device_of(words):
        if ordinary and key in _compiled:
            compiled, values = _compiled[key]
            compiled[(programs, 1, 1)](*pointers, *strides, *numbers, *values)
            return
        compiled = kernel[(programs,)](*tensors, *strides, *numbers, **constants)
        if ordinary and isinstance(compiled, CompiledKernel):
            _compiled[key] = compiled, [constants[name] for name in kernel.arg_names if name in constants]
