"""Packed batches: sequences laid one after another, no padding."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedLengths:
    """Where the sequences of a packed batch begin, words and entities apart.

    Attributes:
        cu_words: Cumulative numbers of words, int32 (B + 1,), from 0 to the total.
        cu_entities: Cumulative numbers of entities, int32 (B + 1,).
        max_words: The longest sequence's number of words, an int: no kernel launch waits for the device.
        max_entities: The largest number of entities.
    """

    cu_words: Tensor
    cu_entities: Tensor
    max_words: int
    max_entities: int

    @classmethod
    def from_lengths(
        cls, word_lengths: Sequence[int] | Tensor, entity_lengths: Sequence[int] | Tensor | None = None
    ) -> "PackedLengths":
        """Make one from the numbers of words and entities (None for none) of each sequence.

        Raises:
            ValueError: the two differ in number, or a length is negative.
            TypeError: a length is no integer.
        """
        word_lengths = _integers("word_lengths", word_lengths)
        entity_lengths = (
            [0] * len(word_lengths) if entity_lengths is None else _integers("entity_lengths", entity_lengths)
        )
        if len(word_lengths) != len(entity_lengths):
            raise ValueError(
                f"entity_lengths must have one length a sequence, {len(word_lengths)}, got {len(entity_lengths)}"
            )
        for name, lengths in (("word_lengths", word_lengths), ("entity_lengths", entity_lengths)):
            if min(lengths, default=0) < 0:
                raise ValueError(f"{name} must not be negative, got {min(lengths)}")
        return cls(
            _cumulative(word_lengths),
            _cumulative(entity_lengths),
            max(word_lengths, default=0),
            max(entity_lengths, default=0),
        )

    def to(self, device: torch.device | str) -> "PackedLengths":
        """Move the tensors to a device."""
        return PackedLengths(self.cu_words.to(device), self.cu_entities.to(device), self.max_words, self.max_entities)


def _integers(name: str, lengths: Sequence[int] | Tensor) -> list[int]:
    try:
        return [operator.index(n) for n in lengths]
    except TypeError:
        raise TypeError(f"{name} must be a list or a tensor (B,) of integers, got {lengths!r}") from None


def _cumulative(lengths: Sequence[int]) -> Tensor:
    # On the CPU whatever the default device: `to` moves them.
    return torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)
