"""The specification of entity-aware attention, in plain PyTorch. It is never optimised.

    scores(i, j) = q_to_words[i] . k[j] * scale       where j is a word
                   q_to_entities[i] . k[j] * scale    where j is an entity
    out(i) = sum_j softmax_j(scores(i, .))(j) v[j]

Source: Yamada et al. 2020, "LUKE: Deep Contextualized Entity Representations with Entity-aware Self-attention".
"""

import torch
from torch import Tensor

from luke_kernels.ops import dropout
from luke_kernels.ops.layout import (
    KEY,
    QUERY_TO_ENTITIES,
    QUERY_TO_WORDS,
    VALUE,
    Layout,
    empty_gradients,
    empty_outputs,
)


def scores(words: Tensor, entities: Tensor, scale: float) -> Tensor:
    """Score every token against every token: (..., W, stack, H, D), (..., E, stack, H, D) -> (..., H, W + E, W + E)."""
    queries = torch.cat([words, entities], dim=-4)
    to_words = torch.einsum("...qhd,...khd->...hqk", _slot(queries, QUERY_TO_WORDS), _slot(words, KEY))
    to_entities = torch.einsum("...qhd,...khd->...hqk", _slot(queries, QUERY_TO_ENTITIES), _slot(entities, KEY))
    return torch.cat([to_words, to_entities], dim=-1) * scale


def weighted_values(words: Tensor, entities: Tensor, probs: Tensor) -> Tensor:
    """Sum the values by their probabilities: (..., H, W + E, W + E) -> (..., W + E, H, D)."""
    values = torch.cat([_slot(words, VALUE), _slot(entities, VALUE)], dim=-3)
    return torch.einsum("...hqk,...khd->...qhd", probs, values)


def keep_mask(seed: Tensor, dropout_p: float, sequences: range, num_heads: int, words: int, entities: int) -> Tensor:
    """Return which probabilities are kept, bool (len(sequences), H, W + E, W + E)."""

    def block(rows: int, columns: int, row_is_entity: bool, column_is_entity: bool) -> Tensor:
        return dropout.keep_mask(
            seed, dropout_p, sequences, num_heads, rows, range(columns), row_is_entity, column_is_entity
        )

    word_rows = torch.cat([block(words, words, False, False), block(words, entities, False, True)], dim=-1)
    entity_rows = torch.cat([block(entities, words, True, False), block(entities, entities, True, True)], dim=-1)
    return torch.cat([word_rows, entity_rows], dim=-2)


def forward(
    words: Tensor, entities: Tensor, layout: Layout, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(words, entities, layout.covers_rows)
    for group in layout.groups(words.shape[0], entities.shape[0]):
        w, e = group.of_words(words), group.of_entities(entities)
        s = scores(w, e, scale)
        probs = s.softmax(dim=-1)
        if seed is not None:
            probs = probs * _kept(seed, dropout_p, group.sequences, s, w.shape[1])
        # A copy into out_w and out_e: views of the rows of the group.
        out_w, out_e = weighted_values(w, e, probs).split([w.shape[1], e.shape[1]], dim=1)
        group.of_words(out[: words.shape[0]]).copy_(out_w)
        group.of_entities(out[words.shape[0] :]).copy_(out_e)
        lse_w, lse_e = s.to(lse.dtype).logsumexp(dim=-1).permute(0, 2, 1).split([w.shape[1], e.shape[1]], dim=1)
        group.of_words(lse.T[: words.shape[0]]).copy_(lse_w)
        group.of_entities(lse.T[words.shape[0] :]).copy_(lse_e)
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
    dwords, dentities = empty_gradients(words, entities, layout.covers_rows)
    for group in layout.groups(words.shape[0], entities.shape[0]):
        w, e = group.of_words(words), group.of_entities(entities)
        dw, de = group.of_words(dwords), group.of_entities(dentities)
        num_words = w.shape[1]
        tokens = torch.cat([w, e], dim=1)
        dout = torch.cat([group.of_words(dout_words), group.of_entities(dout_entities)], dim=1)
        s = scores(w, e, scale)
        probs = s.softmax(dim=-1)
        dprobs = torch.einsum("bqhd,bkhd->bhqk", dout, _slot(tokens, VALUE))
        kept = probs
        if seed is not None:
            keep = _kept(seed, dropout_p, group.sequences, s, num_words)
            dprobs, kept = dprobs * keep, probs * keep
        wide, dwide = probs.to(lse.dtype), dprobs.to(lse.dtype)
        ds = (wide * (dwide - (wide * dwide).sum(dim=-1, keepdim=True))).to(words.dtype) * scale
        ds_words, ds_entities = ds.split([num_words, e.shape[1]], dim=-1)
        dtokens = torch.zeros_like(tokens)
        _slot(dtokens, QUERY_TO_WORDS).add_(torch.einsum("bhqk,bkhd->bqhd", ds_words, _slot(w, KEY)))
        _slot(dtokens, QUERY_TO_ENTITIES).add_(torch.einsum("bhqk,bkhd->bqhd", ds_entities, _slot(e, KEY)))
        dkeys = _slot(dtokens, KEY)
        dkeys[:, :num_words] = torch.einsum("bhqk,bqhd->bkhd", ds_words, _slot(tokens, QUERY_TO_WORDS))
        dkeys[:, num_words:] = torch.einsum("bhqk,bqhd->bkhd", ds_entities, _slot(tokens, QUERY_TO_ENTITIES))
        _slot(dtokens, VALUE).copy_(torch.einsum("bhqk,bqhd->bkhd", kept, dout))
        dw.copy_(dtokens[:, :num_words])
        de.copy_(dtokens[:, num_words:])
    return dwords, dentities


def _slot(stack: Tensor, slot: int) -> Tensor:
    return stack[..., slot, :, :]


def _kept(seed: Tensor, dropout_p: float, sequences: range, s: Tensor, num_words: int) -> Tensor:
    keep = keep_mask(seed, dropout_p, sequences, s.shape[1], num_words, s.shape[-1] - num_words)
    return keep.to(s.dtype) / (1 - dropout_p)
