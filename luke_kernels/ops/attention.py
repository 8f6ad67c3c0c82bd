"""Entity-aware attention, the public functions: check the arguments, choose a backend, call it."""

import itertools
import math
import numbers
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luke_kernels.ops import backends, library, reference
from luke_kernels.ops.dropout import draw_seed
from luke_kernels.ops.layout import Layout

# The common ones first: to look through abstract classes takes longer than all other checks of a number.
_NUMBERS = (float, int, numbers.Real, torch.SymFloat, torch.SymInt)


def entity_aware_attention(
    words: Tensor,
    entities: Tensor | None = None,
    *,
    word_mask: Tensor | None = None,
    entity_mask: Tensor | None = None,
    word_lengths: Tensor | None = None,
    entity_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attend among the words and entities of each sequence of a padded batch.

        e(i, j) = query_to_words[i] . key[j] * scale       where j is a word
                  query_to_entities[i] . key[j] * scale    where j is an entity
        out[i]  = sum_j softmax_j(e(i, .))[j] value[j]     over all words and entities of the sequence

    Args:
        words: Projections of the words, (B, W, 4, H, D): query to words, query to entities, key, value; or
            (B, W, 3, H, D): query, key, value. float64, float32, bfloat16 or float16, any strides. `stack_projections`
            makes one from four tensors.
        entities: Projections of the entities, (B, E, same stack, H, D), of the same dtype and device; None for none.
        word_mask: Which words exist, (B, W), bool or integers 0 and 1, True = exists, in any pattern. Absent tokens
            are neither attended to nor read. Lengths are cheaper: a mask costs a copy of the projections.
        entity_mask: Which entities exist, (B, E).
        word_lengths: Number of words of each sequence, int32 or int64 (B,): its words stand first, the rest is padding.
        entity_lengths: Number of entities of each sequence, int32 or int64 (B,).
        scale: Factor of the scores; default D ** -0.5.
        dropout_p: Probability of dropping an element of the probability matrix, in [0, 1).
        seed: int64 (2,), (seed, offset) of the dropout mask, on the device of `words`; drawn where None.
        backend: "auto" or one of `available_backends()`. A backend asked for by name never falls back.

    Returns:
        out_words (B, W, H, D) and out_entities (B, E, H, D) or None. Rows of absent tokens are zero.

    Raises:
        ValueError: a shape, length or value breaks a rule above. Values that lie on a GPU are not read (no sync).
        TypeError: a dtype or type breaks one.
        NotImplementedError: no backend can take the tensors.

    Source: Yamada et al. 2020, "LUKE", section 3.2 (entity-aware self-attention).
    """
    _check_stacks(words, entities, ("B", "W"), ("B", "E"))
    _check_presence("word", words, word_mask, word_lengths)
    _check_presence("entity", entities, entity_mask, entity_lengths)
    words, entities = _autocast(words), None if entities is None else _autocast(entities)
    options = _check_options(words, scale, dropout_p, seed, backend)

    word_order = None if word_mask is None else _Order(word_mask)
    entity_order = None if entity_mask is None else _Order(entity_mask)
    flat_words, word_lengths = _flatten(words, word_order, word_lengths)
    flat_entities = None
    if entities is not None:
        flat_entities, entity_lengths = _flatten(entities, entity_order, entity_lengths)
    layout = Layout(
        None,
        word_lengths,
        None,
        entity_lengths,
        batch_size=words.shape[0],
        max_words=words.shape[1],
        max_entities=0 if entities is None else entities.shape[1],
        covers_rows=word_lengths is None and entity_lengths is None,
    )
    out_words, out_entities = library.attention(flat_words, flat_entities, *layout, *options)
    return (
        _unflatten(out_words, word_order, layout.batch_size, layout.max_words),
        None if entities is None else _unflatten(out_entities, entity_order, layout.batch_size, layout.max_entities),
    )


def entity_aware_attention_varlen(
    words: Tensor,
    entities: Tensor | None,
    cu_words: Tensor,
    cu_entities: Tensor | None,
    max_words: int,
    max_entities: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attend among the words and entities of each sequence of a packed batch: `entity_aware_attention`, no padding.

    Args:
        words: Projections of all words, sequence after sequence, (Tw, 4 or 3, H, D).
        entities: Projections of all entities, (Te, same stack, H, D), or None for none.
        cu_words: Where each sequence's words begin, int32 (B + 1,): cumulative lengths from 0 to Tw.
        cu_entities: The same for entities, from 0 to Te; None where entities is None.
        max_words: At least the longest sequence's number of words. An int, so that nothing waits for the device.
        max_entities: At least the largest number of entities.
        scale, dropout_p, seed, backend: as in `entity_aware_attention`.

    Returns:
        out_words (Tw, H, D) and out_entities (Te, H, D) or None.

    Raises:
        ValueError, TypeError, NotImplementedError: as in `entity_aware_attention`.
    """
    _check_stacks(words, entities, ("Tw",), ("Te",))
    batch = _check_cumulative("words", words, cu_words, max_words)
    if entities is None:
        for name, value in (("cu_entities", cu_entities), ("max_entities", max_entities or None)):
            if value is not None:
                raise ValueError(f"{name} must be None or 0 where entities is None, got {described(value)}")
    elif _check_cumulative("entities", entities, cu_entities, max_entities) != batch:
        raise ValueError(f"cu_entities must have the length of cu_words, {batch + 1}, got {described(cu_entities)}")
    words, entities = _autocast(words), None if entities is None else _autocast(entities)
    options = _check_options(words, scale, dropout_p, seed, backend)
    layout = Layout(
        cu_words[:-1],
        cu_words.diff(),
        None if cu_entities is None else cu_entities[:-1],
        None if cu_entities is None else cu_entities.diff(),
        batch,
        max_words,
        max_entities,
        # Where the values cannot be checked, they may leave rows out.
        covers_rows=readable(cu_words) and (cu_entities is None or readable(cu_entities)),
    )
    return library.attention(words, entities, *layout, *options)


def attend_joint(words: Tensor, entities: Tensor | None, layout: Layout, dropout_p: float, backend: str) -> Tensor:
    """Attend as `entity_aware_attention_varlen` does, for callers who have checked: one buffer comes out, words first.

    Returns:
        out (Tw + Te, H, D).
    """
    words, entities = _autocast(words), None if entities is None else _autocast(entities)
    if entities is None:
        layout = layout._replace(entity_offsets=None, entity_lengths=None, max_entities=0)
    options = _check_options(words, None, dropout_p, None, backend)
    return library.attention(words, entities, *layout, *options, split=False)


def attention_with_probabilities(
    words: Tensor,
    entities: Tensor | None = None,
    *,
    word_mask: Tensor | None = None,
    entity_mask: Tensor | None = None,
    word_lengths: Tensor | None = None,
    entity_lengths: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Attend as `entity_aware_attention` does, by the reference formula, and return the probabilities too.

    For looking at attention, not for speed: it holds the probabilities of all pairs.

    Args:
        All but `seed` and `backend` as in `entity_aware_attention`. Dropout is torch's own and drops other elements.

    Returns:
        out_words, out_entities and the probabilities after dropout, (B, H, W + E, W + E), words first. Rows and columns
        of absent tokens are zero.

    Raises:
        ValueError, TypeError: as in `entity_aware_attention`.
    """
    _check_stacks(words, entities, ("B", "W"), ("B", "E"))
    _check_presence("word", words, word_mask, word_lengths)
    _check_presence("entity", entities, entity_mask, entity_lengths)
    scale, dropout_p, _, _ = _check_options(words, scale, dropout_p, None, "reference")
    exists = _exists(words, word_mask, word_lengths)
    entities_exist = None if entities is None else _exists(entities, entity_mask, entity_lengths)
    # Absent tokens count for nothing, even where they hold NaN.
    words = words.where(exists[:, :, None, None, None], 0)
    if entities is None or entities_exist is None:
        entities = words[:, :0]
    else:
        entities = entities.where(entities_exist[:, :, None, None, None], 0)
        exists = torch.cat([exists, entities_exist], dim=1)
    pairs = exists[:, None, :, None] & exists[:, None, None, :]
    # Rows of absent tokens keep their scores, so that no softmax runs over nothing.
    masked = reference.scores(words, entities, scale).masked_fill(~pairs & exists[:, None, :, None], -torch.inf)
    probs = F.dropout(masked.softmax(dim=-1).where(pairs, 0), dropout_p)
    out_words, out_entities = reference.weighted_values(words, entities, probs).split(
        [words.shape[1], entities.shape[1]], dim=1
    )
    return out_words, None if entities_exist is None else out_entities, probs


def stack_projections(query_to_words: Tensor, query_to_entities: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Stack four projections of equal shape (..., H, D) into what the op takes, (..., 4, H, D).

    For words, `query_to_words` is the w2w query and `query_to_entities` the w2e query; for entities e2w and e2e. This
    copies; a single matrix product that writes (..., 4 * H * D) and a view give the same without.

    Raises:
        ValueError, TypeError: the shapes differ, or one is no tensor.
    """
    tensors = {"query_to_words": query_to_words, "query_to_entities": query_to_entities, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or tensor.shape != query_to_words.shape:
            raise ValueError(
                f"{name} must have the shape (..., H, D) of query_to_words, {tuple(query_to_words.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    return torch.stack(list(tensors.values()), dim=-3)


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that run on this machine, for some tensors at least."""
    return tuple(name for name, support in backends.TABLE.items() if support.missing(None) is None)


def explain_backends(words: Tensor, entities: Tensor | None = None) -> dict[str, str | None]:
    """Return, for each backend, why it cannot serve these tensors here; None where it can.

    Args:
        words, entities: as in `entity_aware_attention` or `entity_aware_attention_varlen`.
    """
    packed = isinstance(words, Tensor) and words.dim() == 4
    _check_stacks(words, entities, *((("Tw",), ("Te",)) if packed else (("B", "W"), ("B", "E"))))
    return {name: backends.reason_against(name, words.device, words.dtype, words.shape[-1]) for name in backends.TABLE}


class _Order:
    """Moves the tokens that exist to the front of each sequence, order kept; and results back. Shapes are static."""

    def __init__(self, mask: Tensor):
        batch, length = mask.shape
        order = torch.argsort(mask.to(torch.uint8), dim=1, descending=True, stable=True)
        first = torch.arange(batch, device=mask.device)[:, None] * length
        self.rows = (order + first).flatten()
        self.inverse = torch.empty_like(self.rows).scatter(
            0, self.rows, torch.arange(batch * length, device=mask.device)
        )
        self.lengths = mask.sum(dim=1, dtype=torch.int32)


def _flatten(tokens: Tensor, order: _Order | None, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Turn a padded batch into a flat buffer and the lengths of its sequences (None: all of it)."""
    flat = tokens.flatten(0, 1)
    if order is None:
        return flat, None if lengths is None else lengths.to(torch.int32)
    return flat.index_select(0, order.rows), order.lengths


def _unflatten(out: Tensor, order: _Order | None, batch: int, length: int) -> Tensor:
    if order is not None:
        out = out.index_select(0, order.inverse)
    # Not unflatten: Dynamo of torch 2.11 cannot trace it where a default device is set.
    return out.reshape(batch, length, *out.shape[1:])


def _autocast(tokens: Tensor) -> Tensor:
    """Cast as autocast casts the inputs of a matrix product: all but float64."""
    device = tokens.device.type
    # Dynamo of torch 2.11 cannot trace torch.amp.is_autocast_available.
    if device != "meta" and torch.is_autocast_enabled(device) and tokens.dtype != torch.float64:
        return tokens.to(torch.get_autocast_dtype(device))
    return tokens


def _exists(tokens: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Return which tokens exist, bool (B, tokens)."""
    if mask is not None:
        return mask.bool()
    ranks = torch.arange(tokens.shape[1], device=tokens.device)
    if lengths is None:
        return torch.ones_like(ranks, dtype=torch.bool).expand(tokens.shape[:2])
    return ranks < lengths[:, None]


def described(value: Any) -> str:
    """Return how an error shows a value: a tensor by dtype and shape."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def readable(tensor: Tensor) -> bool:
    """Return whether the values may be checked: on the CPU, not being traced, not a fake tensor."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


def _check_stacks(
    words: Tensor, entities: Tensor | None, word_dims: tuple[str, ...], entity_dims: tuple[str, ...]
) -> None:
    for name, tensor, dims in (("words", words, word_dims), ("entities", entities, entity_dims)):
        if tensor is None and name == "entities":
            return
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        shape = tensor.shape
        if len(shape) != len(dims) + 3:
            raise ValueError(f"{name} must be ({', '.join(dims)}, 4 or 3, H, D), got {tuple(shape)}")
        if shape[-3] not in (3, 4):
            raise ValueError(f"{name} must stack 4 or 3 projections in dimension -3, got {shape[-3]}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
        if shape[-2] == 0 or shape[-1] == 0:
            raise ValueError(f"{name} must have at least one head and head_dim 1, got {tuple(shape)}")
    assert entities is not None
    if words.dim() == 5 and entities.shape[0] != words.shape[0]:
        raise ValueError(f"entities must have the batch size of words, {words.shape[0]}, got {entities.shape[0]}")
    if entities.shape[-3:] != words.shape[-3:]:
        raise ValueError(
            f"entities must have the stack, H and D of words, {tuple(words.shape[-3:])}, "
            f"got {tuple(entities.shape[-3:])}"
        )
    if entities.dtype != words.dtype:
        raise TypeError(f"entities must have the dtype of words, {words.dtype}, got {entities.dtype}")
    if entities.device != words.device:
        raise ValueError(f"entities must be on the device of words, {words.device}, got {entities.device}")


def _check_presence(kind: str, tokens: Tensor | None, mask: Tensor | None, lengths: Tensor | None) -> None:
    """Check the mask or the lengths of one kind."""
    if tokens is None:
        for name, value in ((f"{kind}_mask", mask), (f"{kind}_lengths", lengths)):
            if value is not None:
                raise ValueError(f"{name} must be None where entities is None, got {described(value)}")
        return
    if mask is not None and lengths is not None:
        raise ValueError(f"{kind}_lengths must be None where {kind}_mask is given, got {described(lengths)}")
    batch, length = tokens.shape[:2]
    if mask is not None:
        _check_tensor(f"{kind}_mask", mask, tokens, (batch, length))
        if mask.dtype.is_floating_point or mask.dtype.is_complex:
            raise TypeError(f"{kind}_mask must be bool or integers, 1 where a token exists, got {mask.dtype}")
        if mask.dtype != torch.bool and readable(mask) and mask.numel() and not 0 <= mask.min() <= mask.max() <= 1:
            raise ValueError(f"{kind}_mask must hold 0 and 1 only, got {mask.min().item()} to {mask.max().item()}")
    if lengths is not None:
        _check_tensor(f"{kind}_lengths", lengths, tokens, (batch,))
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{kind}_lengths must be int32 or int64, got {lengths.dtype}")
        if readable(lengths):
            for value in lengths.tolist():
                if not 0 <= value <= length:
                    raise ValueError(f"{kind}_lengths must lie in [0, {length}], got {value}")


def _check_cumulative(kind: str, tokens: Tensor, cu: Tensor | None, max_length: int) -> int:
    """Check cumulative lengths and their bound; return the number of sequences."""
    if not isinstance(cu, Tensor) or cu.dim() != 1 or cu.shape[0] < 1:
        raise ValueError(f"cu_{kind} must be a tensor (B + 1,), got {described(cu)}")
    _check_tensor(f"cu_{kind}", cu, tokens, cu.shape, torch.int32)
    if isinstance(max_length, bool) or not isinstance(max_length, int | torch.SymInt):
        raise TypeError(f"max_{kind} must be an int, got {described(max_length)}")
    if max_length < 0:
        raise ValueError(f"max_{kind} must not be negative, got {max_length}")
    if readable(cu):
        values = cu.tolist()
        if values[0] != 0 or values[-1] != tokens.shape[0]:
            raise ValueError(f"cu_{kind} must run from 0 to {tokens.shape[0]}, got {values[0]} to {values[-1]}")
        for before, after in itertools.pairwise(values):
            if after < before:
                raise ValueError(f"cu_{kind} must not decrease, got {before} before {after}")
            if after - before > max_length:
                raise ValueError(f"max_{kind} must be at least every length, {after - before}, got {max_length}")
    return cu.shape[0] - 1


def _check_tensor(
    name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of words, {like.device}, got {tensor.device}")


def check_dropout(name: str, dropout_p: float) -> None:
    """Raise unless `dropout_p` is a probability below 1."""
    _check_number(name, dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {dropout_p}")


def _check_number(name: str, value: float) -> None:
    # A tensor would lose its gradient.
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _check_options(
    words: Tensor, scale: float | None, dropout_p: float, seed: Tensor | None, backend: str
) -> tuple[float, float, Tensor | None, str]:
    """Check what both functions share; return (scale, dropout_p, seed, backend) as the op takes them."""
    if scale is None:
        scale = words.shape[-1] ** -0.5
    else:
        _check_number("scale", scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
    check_dropout("dropout_p", dropout_p)
    if seed is not None:
        _check_tensor("seed", seed, words, (2,), torch.int64)
    elif dropout_p > 0:
        seed = draw_seed(words.device)
    return scale, dropout_p, seed, backends.choose(backend, words.device, words.dtype, words.shape[-1], dropout_p > 0)
