"""Where the sequences of a batch lie: (offset, length) into flat token buffers, words and entities apart."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Slots of a stack of projections, counted so that they hold for stacks of 4 and of 3: in a stack of 3
# (query, key, value) the one query serves both kinds of keys.
QUERY_TO_WORDS, QUERY_TO_ENTITIES, KEY, VALUE = 0, -3, -2, -1


class Group(NamedTuple):
    """Sequences of equal lengths, evenly spaced in the buffers: what one batched call can serve."""

    sequences: range
    word_offset: int
    word_pitch: int
    words: int
    entity_offset: int
    entity_pitch: int
    entities: int

    def of_words(self, buffer: Tensor) -> Tensor:
        """View the words of the group, (T, ...) -> (sequences, words, ...)."""
        return _batched(buffer, len(self.sequences), self.word_offset, self.word_pitch, self.words)

    def of_entities(self, buffer: Tensor) -> Tensor:
        """View the entities of the group, (T, ...) -> (sequences, entities, ...)."""
        return _batched(buffer, len(self.sequences), self.entity_offset, self.entity_pitch, self.entities)


class Layout(NamedTuple):
    """Sequence b holds words[word_offsets[b]:][:word_lengths[b]] and the entities likewise; all int32 (B,) or None.

    Without offsets, sequence b begins at row b * max_words; without lengths, each has max_words tokens. Otherwise
    `max_words` and `max_entities` bound the lengths. `covers_rows` promises that every row of both buffers is in a
    sequence, so that outputs need no zero fill. The fields stand as in the schema of the op.
    """

    word_offsets: Tensor | None
    word_lengths: Tensor | None
    entity_offsets: Tensor | None
    entity_lengths: Tensor | None
    batch_size: int
    max_words: int
    max_entities: int
    covers_rows: bool

    def groups(self, num_words: int, num_entities: int) -> Iterator[Group]:
        """Yield the batch as one group where it is regular, else a sequence at a time. Reads what is given (a sync).

        Lengths are cut to their bounds and to buffers of `num_words` and `num_entities` tokens: where values could not
        be checked before, a wrong one must not reach into other sequences.
        """
        batch, max_words, max_entities = self.batch_size, self.max_words, self.max_entities
        fits = batch * max_words <= num_words and batch * max_entities <= num_entities
        if fits and all(tensor is None for tensor in self[:4]):
            yield Group(range(batch), 0, max_words, max_words, 0, max_entities, max_entities)
            return
        offsets, lengths = _read(self.word_offsets, self.word_lengths, batch, num_words, max_words)
        entity_offsets, entity_lengths = _read(
            self.entity_offsets, self.entity_lengths, batch, num_entities, max_entities
        )
        pitch = offsets[1] - offsets[0] if batch > 1 else 0
        entity_pitch = entity_offsets[1] - entity_offsets[0] if batch > 1 else 0
        first = Group(
            range(batch), *_first(offsets, pitch, lengths), *_first(entity_offsets, entity_pitch, entity_lengths)
        )
        regular = all(
            row == (first.word_offset + b * pitch, first.words, first.entity_offset + b * entity_pitch, first.entities)
            for b, row in enumerate(zip(offsets, lengths, entity_offsets, entity_lengths, strict=True))
        )
        if regular:
            yield first
            return
        for b in range(batch):
            yield Group(range(b, b + 1), offsets[b], 0, lengths[b], entity_offsets[b], 0, entity_lengths[b])


def _read(
    offsets: Tensor | None, lengths: Tensor | None, batch: int, num_tokens: int, max_length: int
) -> tuple[list[int], list[int]]:
    places = [b * max_length for b in range(batch)] if offsets is None else offsets.tolist()
    numbers = [max_length] * batch if lengths is None else lengths.tolist()
    starts = [min(max(offset, 0), num_tokens) for offset in places]
    longest = [min(max_length, num_tokens - start) for start in starts]
    return starts, [min(max(n, 0), most) for n, most in zip(numbers, longest, strict=True)]


def _first(offsets: list[int], pitch: int, lengths: list[int]) -> tuple[int, int, int]:
    return (offsets[0], pitch, lengths[0]) if offsets else (0, 0, 0)


def _batched(buffer: Tensor, batch: int, offset: int, pitch: int, length: int) -> Tensor:
    stride = buffer.stride()
    return buffer.as_strided(
        (batch, length, *buffer.shape[1:]),
        (pitch * stride[0], *stride),
        buffer.storage_offset() + offset * stride[0],
    )


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums are kept in: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_outputs(words: Tensor, entities: Tensor, covers_rows: bool) -> tuple[Tensor, Tensor]:
    """Return out (Tw + Te, H, D) and lse (H, Tw + Te), filled with the values of rows in no sequence unless covered."""
    tokens, (heads, head_dim) = words.shape[0] + entities.shape[0], words.shape[2:]
    lse_dtype = accumulator_dtype(words.dtype)
    if covers_rows:
        return words.new_empty(tokens, heads, head_dim), words.new_empty(heads, tokens, dtype=lse_dtype)
    return words.new_zeros(tokens, heads, head_dim), words.new_full((heads, tokens), torch.inf, dtype=lse_dtype)


def empty_gradients(words: Tensor, entities: Tensor, covers_rows: bool) -> tuple[Tensor, Tensor]:
    """Return contiguous dwords and dentities, zero unless every row is covered."""
    new = torch.empty if covers_rows else torch.zeros
    return tuple(new(t.shape, dtype=t.dtype, device=t.device) for t in (words, entities))  # type: ignore[return-value]
