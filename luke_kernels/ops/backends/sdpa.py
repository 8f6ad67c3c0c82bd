"""The PyTorch fallback: attention for each pair of kinds, merged by log-sum-exp.

Rows of one kind attend to the word keys and to the entity keys in two calls; each gives its output and the
log-sum-exp of its scores, from which the softmax over both follows. The backward needs no merging: given the merged
output and log-sum-exp, each call's gradient is already that of the whole.

The call is torch's flash kernel for the CPU where it serves; elsewhere, and for dropout (the flash kernels take no
foreign mask), a loop over blocks of keys with an online softmax, recomputed in the backward. Neither holds scores of
all pairs.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from luke_kernels.ops import dropout
from luke_kernels.ops.layout import (
    KEY,
    QUERY_TO_ENTITIES,
    QUERY_TO_WORDS,
    VALUE,
    Group,
    Layout,
    empty_gradients,
    empty_outputs,
)

# Keys a step of the loop in PyTorch; a multiple of 4, the columns one draw of dropout serves.
BLOCK = 256

Keep = Callable[[range], Tensor]


def forward(
    words: Tensor, entities: Tensor, layout: Layout, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(words, entities, layout.covers_rows)
    split = [words.shape[0], entities.shape[0]]
    for group in layout.groups(words.shape[0], entities.shape[0]):
        kinds = _kinds(group, [words, entities])
        outs, lses = _kinds(group, out.split(split)), _kinds(group, lse.T.split(split))
        for row, tokens in enumerate(kinds):
            parts = []
            for column, slot in enumerate((QUERY_TO_WORDS, QUERY_TO_ENTITIES)):
                if tokens.shape[1] and kinds[column].shape[1]:
                    keep = _keep(seed, dropout_p, group, tokens, row, column)
                    parts.append(
                        _pair_forward(_heads(tokens, slot), *_keys_values(kinds[column]), scale, dropout_p, keep)
                    )
            if parts:
                merged, merged_lse = _merge(parts)
                outs[row].copy_(merged.transpose(1, 2))
                lses[row].copy_(merged_lse.transpose(1, 2))
    return out, lse


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
    # Gradients of keys, values and (in a stack of 3) queries are sums over calls: they start from zero.
    gradients = empty_gradients(words, entities, covers_rows=False)
    split = [words.shape[0], entities.shape[0]]
    for group in layout.groups(words.shape[0], entities.shape[0]):
        kinds, dkinds = _kinds(group, [words, entities]), _kinds(group, gradients)
        douts = _kinds(group, [dout_words, dout_entities])
        outs, lses = _kinds(group, out.split(split)), _kinds(group, lse.T.split(split))
        for row, tokens in enumerate(kinds):
            merged, merged_lse = outs[row].transpose(1, 2), lses[row].transpose(1, 2)
            dout = douts[row].transpose(1, 2)
            for column, slot in enumerate((QUERY_TO_WORDS, QUERY_TO_ENTITIES)):
                if tokens.shape[1] and kinds[column].shape[1]:
                    keep = _keep(seed, dropout_p, group, tokens, row, column)
                    dq, dk, dv = _pair_backward(
                        dout,
                        _heads(tokens, slot),
                        *_keys_values(kinds[column]),
                        merged,
                        merged_lse,
                        scale,
                        dropout_p,
                        keep,
                    )
                    _heads(dkinds[row], slot).add_(dq)
                    _heads(dkinds[column], KEY).add_(dk)
                    _heads(dkinds[column], VALUE).add_(dv)
    return gradients


def _kinds(group: Group, buffers: list[Tensor] | tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return group.of_words(buffers[0]), group.of_entities(buffers[1])


def _heads(stack: Tensor, slot: int) -> Tensor:
    """View one slot of (B, N, stack, H, D) as (B, H, N, D)."""
    return stack[:, :, slot].transpose(1, 2)


def _keys_values(stack: Tensor) -> tuple[Tensor, Tensor]:
    return _heads(stack, KEY), _heads(stack, VALUE)


def _keep(seed: Tensor | None, dropout_p: float, group: Group, tokens: Tensor, row: int, column: int) -> Keep | None:
    if seed is None:
        return None
    num_rows, num_heads = tokens.shape[1], tokens.shape[3]

    def keep(columns: range) -> Tensor:
        return dropout.keep_mask(
            seed, dropout_p, group.sequences, num_heads, num_rows, columns, bool(row), bool(column)
        )

    return keep


def _merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge (out, lse) of disjoint sets of keys."""
    if len(parts) == 1:
        return parts[0]
    lse = functools.reduce(torch.logaddexp, [part_lse for _, part_lse in parts])
    return sum(out * (part_lse - lse).exp()[..., None] for out, part_lse in parts), lse  # type: ignore[return-value]


def _pair_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, keep: Keep | None
) -> tuple[Tensor, Tensor]:
    """Attend from rows of one kind to keys of one kind, (B, H, N, D) each -> out, lse (B, H, N)."""
    if keep is None and q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    running_max = q.new_full(q.shape[:-1], -torch.inf, dtype=wide)
    running_sum = torch.zeros_like(running_max)
    accumulator = torch.zeros(q.shape, dtype=wide, device=q.device)
    for columns in _blocks(k.shape[2]):
        block = slice(columns.start, columns.stop)
        s = (q @ k[:, :, block].mT).to(wide) * scale
        new_max = torch.maximum(running_max, s.amax(dim=-1))
        p = (s - new_max[..., None]).exp()
        rescale = (running_max - new_max).exp()
        running_sum = running_sum * rescale + p.sum(dim=-1)
        kept = p if keep is None else p * keep(columns) / (1 - dropout_p)
        accumulator = accumulator * rescale[..., None] + kept.to(v.dtype) @ v[:, :, block]
        running_max = new_max
    return accumulator / running_sum[..., None], running_max + running_sum.log()


def _pair_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    keep: Keep | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if keep is None and q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, False, scale=scale
        )
    wide = lse.dtype
    delta = (dout.to(wide) * out).sum(dim=-1, keepdim=True)
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    for columns in _blocks(k.shape[2]):
        block = slice(columns.start, columns.stop)
        p = ((q @ k[:, :, block].mT).to(wide) * scale - lse[..., None]).exp()
        dp = (dout @ v[:, :, block].mT).to(wide)
        kept = p
        if keep is not None:
            kept_scale = keep(columns).to(wide) / (1 - dropout_p)
            dp, kept = dp * kept_scale, p * kept_scale
        ds = (p * (dp - delta) * scale).to(q.dtype)
        dq += ds @ k[:, :, block]
        dk[:, :, block] = ds.mT @ q
        dv[:, :, block] = kept.to(v.dtype).mT @ dout
    return dq, dk, dv


def _blocks(num_keys: int) -> list[range]:
    return [range(start, min(start + BLOCK, num_keys)) for start in range(0, num_keys, BLOCK)]
