"""The PyTorch fallback: all rows attend to the word keys, then to the entity keys, merged by log-sum-exp.

Each of the two calls gives its output and the log-sum-exp of its scores, from which the softmax over both follows. The
backward needs no merging: given the merged output and log-sum-exp, each call's gradient is already that of the whole.

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

QUERY_SLOTS = (QUERY_TO_WORDS, QUERY_TO_ENTITIES)  # by the kind of the keys
Keep = Callable[[range], Tensor]


def forward(
    words: Tensor, entities: Tensor, layout: Layout, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(words, entities, layout.covers_rows)
    for group in layout.groups(words.shape[0], entities.shape[0]):
        stacks = group.of_words(words), group.of_entities(entities)
        parts = []
        for column, slot in enumerate(QUERY_SLOTS):
            if stacks[column].shape[1]:
                keep = _keep(seed, dropout_p, group, words.shape[2], column)
                parts.append(_attend(_rows(stacks, slot), *_keys_values(stacks[column]), scale, dropout_p, keep))
        if parts:
            merged, merged_lse = _merge(parts)
            _scatter(merged.transpose(1, 2), _kinds(group, out, words.shape[0]))
            _scatter(merged_lse.transpose(1, 2), _kinds(group, lse.T, words.shape[0]))
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
    # The query of a stack of 3 takes the sum of two gradients, and that of an absent kind of keys takes none.
    gradients = empty_gradients(words, entities, covers_rows=False)
    for group in layout.groups(words.shape[0], entities.shape[0]):
        stacks = group.of_words(words), group.of_entities(entities)
        dstacks = group.of_words(gradients[0]), group.of_entities(gradients[1])
        dout = torch.cat([group.of_words(dout_words), group.of_entities(dout_entities)], dim=1).transpose(1, 2)
        merged = torch.cat(_kinds(group, out, words.shape[0]), dim=1).transpose(1, 2)
        merged_lse = torch.cat(_kinds(group, lse.T, words.shape[0]), dim=1).transpose(1, 2)
        for column, slot in enumerate(QUERY_SLOTS):
            if stacks[column].shape[1]:
                keep = _keep(seed, dropout_p, group, words.shape[2], column)
                q, (k, v) = _rows(stacks, slot), _keys_values(stacks[column])
                dq, dk, dv = _attend_backward(dout, q, k, v, merged, merged_lse, scale, dropout_p, keep)
                for dstack, part in zip(dstacks, dq.transpose(1, 2).split(_lengths(stacks), dim=1), strict=True):
                    dstack[:, :, slot].add_(part)
                dstacks[column][:, :, KEY].copy_(dk.transpose(1, 2))
                dstacks[column][:, :, VALUE].copy_(dv.transpose(1, 2))
    return gradients


def _kinds(group: Group, rows: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """View the group's words and entities in a buffer of all tokens, words first."""
    return group.of_words(rows[:num_words]), group.of_entities(rows[num_words:])


def _scatter(rows: Tensor, kinds: tuple[Tensor, Tensor]) -> None:
    for kind, part in zip(kinds, rows.split(_lengths(kinds), dim=1), strict=True):
        kind.copy_(part)


def _lengths(kinds: tuple[Tensor, Tensor]) -> list[int]:
    return [kind.shape[1] for kind in kinds]


def _rows(stacks: tuple[Tensor, Tensor], slot: int) -> Tensor:
    """Put one query of the words and the entities together, (B, H, W + E, D)."""
    return torch.cat([stack[:, :, slot] for stack in stacks], dim=1).transpose(1, 2)


def _keys_values(stack: Tensor) -> tuple[Tensor, Tensor]:
    return stack[:, :, KEY].transpose(1, 2), stack[:, :, VALUE].transpose(1, 2)


def _keep(seed: Tensor | None, dropout_p: float, group: Group, num_heads: int, column: int) -> Keep | None:
    if seed is None:
        return None

    def keep(columns: range) -> Tensor:
        rows = ((group.words, False), (group.entities, True))
        masks = [
            dropout.keep_mask(seed, dropout_p, group.sequences, num_heads, n, columns, row_is_entity, bool(column))
            for n, row_is_entity in rows
        ]
        return torch.cat(masks, dim=2)

    return keep


def _merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge (out, lse) of disjoint sets of keys."""
    if len(parts) == 1:
        return parts[0]
    lse = functools.reduce(torch.logaddexp, [part_lse for _, part_lse in parts])
    return sum(out * (part_lse - lse).exp()[..., None] for out, part_lse in parts), lse  # type: ignore[return-value]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, keep: Keep | None
) -> tuple[Tensor, Tensor]:
    """Attend from all rows to keys of one kind, (B, H, N, D) each -> out, lse (B, H, N)."""
    if keep is None and q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    running_max = q.new_full(q.shape[:-1], -torch.inf, dtype=wide)
    running_sum = torch.zeros_like(running_max)
    accumulator = torch.zeros(q.shape, dtype=wide, device=q.device)
    for columns in _blocks(k.shape[2]):
        block = slice(columns.start, columns.stop)
        s = (q.to(wide) @ k[:, :, block].mT.to(wide)) * scale
        new_max = torch.maximum(running_max, s.amax(dim=-1))
        p = (s - new_max[..., None]).exp()
        rescale = (running_max - new_max).exp()
        running_sum = running_sum * rescale + p.sum(dim=-1)
        kept = p if keep is None else p * keep(columns) / (1 - dropout_p)
        accumulator = accumulator * rescale[..., None] + kept.to(v.dtype) @ v[:, :, block]
        running_max = new_max
    return accumulator / running_sum[..., None], running_max + running_sum.log()


def _attend_backward(
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
        p = ((q.to(wide) @ k[:, :, block].mT.to(wide)) * scale - lse[..., None]).exp()
        # Not rounded: delta is taken away, and where a row attends to one key nothing may be left.
        dp = dout.to(wide) @ v[:, :, block].mT.to(wide)
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
