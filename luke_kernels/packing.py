"""Packed batches: sequences laid one after another, no padding."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from luke_kernels.ops.attention import described, readable
from luke_kernels.ops.layout import Layout

Packed = TypeVar("Packed", "PackedLengths", "PackedBatch")


@dataclass(frozen=True, eq=False)
class PackedLengths:
    """Where the sequences of a packed batch begin, words and entities apart.

    Attributes:
        cu_words: Cumulative numbers of words, int32 (B + 1,), from 0 to the total.
        cu_entities: Cumulative numbers of entities, int32 (B + 1,).
        max_words: The longest sequence's number of words, an int: no kernel launch waits for the device.
        max_entities: The largest number of entities.
        min_entities: The smallest number of entities, for heads that need some; None: not known.
    """

    cu_words: Tensor
    cu_entities: Tensor
    max_words: int
    max_entities: int
    min_entities: int | None = None

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
            min(entity_lengths, default=0),
        )

    @property
    def batch_size(self) -> int:
        return self.cu_words.shape[0] - 1

    def layout(self) -> Layout:
        """Return the offsets and lengths as the op takes them; every row is in a sequence."""
        return Layout(
            self.cu_words[:-1],
            self.cu_words.diff(),
            self.cu_entities[:-1],
            self.cu_entities.diff(),
            self.batch_size,
            self.max_words,
            self.max_entities,
            covers_rows=True,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedLengths":
        """Move the tensors to a device."""
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedLengths":
        """Copy the tensors into page-locked memory."""
        return _each_tensor(self, lambda tensor: tensor.pin_memory())


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """The inputs of LUKE with no padding: Tw words and Te entities of B sequences, one after another.

    Make one on the CPU with `from_encodings` (what a tokenizer gives) or `from_padded`, and move it with `to`: then no
    model waits for the device to learn a length.

    Attributes:
        lengths: Where each sequence begins.
        input_ids: Word ids, int64 (Tw,); None where `inputs_embeds` stands for them.
        position_ids: Positions of the words in the word position table, int64 (Tw,).
        entity_ids: Entity ids, int64 (Te,).
        entity_position_ids: The words of each entity's mention, by rank in the sequence, int64 (Te, M), -1 pads.
        word_rows: Row of each word in a padded batch (B * W,), int64 (Tw,); `pad_words` undoes the packing with it.
        entity_rows: The same for entities, int64 (Te,).
        padded_words: W of that padded batch.
        padded_entities: E of that padded batch.
        token_type_ids, entity_token_type_ids: int64 (Tw,), (Te,), or None: all 0.
        entity_start_positions, entity_end_positions: First and last word of each mention, by rank in the sequence,
            int64 (Te,); span classification reads them.
        inputs_embeds: Embeddings of the words, (Tw, C), in place of `input_ids`.
        pad_token_id: The word id that `position_ids` were counted from; None: they were given.
    """

    lengths: PackedLengths
    input_ids: Tensor | None
    position_ids: Tensor
    entity_ids: Tensor
    entity_position_ids: Tensor
    word_rows: Tensor
    entity_rows: Tensor
    padded_words: int
    padded_entities: int
    token_type_ids: Tensor | None = None
    entity_token_type_ids: Tensor | None = None
    entity_start_positions: Tensor | None = None
    entity_end_positions: Tensor | None = None
    inputs_embeds: Tensor | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_padded(
        cls,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        entity_ids: Tensor | None = None,
        entity_attention_mask: Tensor | None = None,
        entity_token_type_ids: Tensor | None = None,
        entity_position_ids: Tensor | None = None,
        entity_start_positions: Tensor | None = None,
        entity_end_positions: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        pad_token_id: int = 1,
    ) -> "PackedBatch":
        """Pack a padded batch, as transformers' LukeTokenizer makes it.

        Args:
            input_ids: Word ids, (B, W).
            attention_mask: Which words exist, (B, W), bool or 0 and 1; None: all, as in transformers. Any pattern.
            token_type_ids: (B, W).
            position_ids: (B, W); None: words that are not `pad_token_id` count from pad_token_id + 1 on, others get
                pad_token_id; with `inputs_embeds`, all words count.
            entity_ids: (B, E); None for no entities.
            entity_attention_mask: Which entities exist, (B, E); None: all.
            entity_token_type_ids: (B, E).
            entity_position_ids: Mentions' words by their place among the words that exist, (B, E, M), -1 pads.
            entity_start_positions, entity_end_positions: Columns of `input_ids`, (B, E).
            inputs_embeds: (B, W, C), in place of `input_ids`.
            pad_token_id: That of the model: 1 of RoBERTa's, 0 of BERT's.

        Raises:
            ValueError, TypeError: shapes or dtypes do not fit, an entity argument comes without `entity_ids`, or
                `entity_position_ids` is missing.
        """
        words = _check_words(input_ids, inputs_embeds)
        batch, num_words = words.shape[:2]
        _check("attention_mask", attention_mask, (batch, num_words))
        _check("token_type_ids", token_type_ids, (batch, num_words))
        _check("position_ids", position_ids, (batch, num_words))
        given = {
            "entity_attention_mask": entity_attention_mask,
            "entity_token_type_ids": entity_token_type_ids,
            "entity_position_ids": entity_position_ids,
            "entity_start_positions": entity_start_positions,
            "entity_end_positions": entity_end_positions,
        }
        if entity_ids is None:
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name} must be None where entity_ids is None, got {described(value)}")
            entity_ids = words.new_empty((batch, 0), dtype=torch.int64)
            entity_position_ids = words.new_empty((batch, 0, 1), dtype=torch.int64)
        if entity_position_ids is None:
            raise ValueError("entity_position_ids must be given with entity_ids, got None")
        _check("entity_ids", entity_ids, (batch, None))
        num_entities = entity_ids.shape[1]
        for name, value in given.items():
            _check(name, value, (batch, num_entities, *((None,) if name == "entity_position_ids" else ())))

        word_mask = _mask("attention_mask", attention_mask, words, num_words)
        entity_mask = _mask("entity_attention_mask", entity_attention_mask, words, num_entities)
        columns = {name: given[name] for name in ("entity_start_positions", "entity_end_positions")}
        ranks = {name: _ranks(c, word_mask, entity_mask) for name, c in columns.items() if c is not None}
        # One wait for the device.
        facts = [word_mask.sum(dim=1), entity_mask.sum(dim=1), *(wrong.sum().view(1) for _, wrong in ranks.values())]
        counts = torch.cat(facts).tolist()
        word_lengths, entity_lengths = counts[:batch], counts[batch : 2 * batch]
        for (name, (_, wrong)), number in zip(ranks.items(), counts[2 * batch :], strict=True):
            if number:
                raise ValueError(
                    f"{name} must hold columns of words that exist, got {columns[name][wrong][0].item()}"  # type: ignore[index]
                )
        word_rows = torch.nonzero_static(word_mask.flatten(), size=sum(word_lengths)).squeeze(1)
        entity_rows = torch.nonzero_static(entity_mask.flatten(), size=sum(entity_lengths)).squeeze(1)

        def pack(padded: Tensor, rows: Tensor) -> Tensor:
            return padded.flatten(0, 1).index_select(0, rows)

        def pack_if_given(padded: Tensor | None, rows: Tensor) -> Tensor | None:
            return None if padded is None else pack(padded, rows)

        return cls(
            lengths=PackedLengths.from_lengths(word_lengths, entity_lengths).to(words.device),
            input_ids=pack_if_given(input_ids, word_rows),
            position_ids=pack(
                _default_positions(input_ids, words, pad_token_id) if position_ids is None else position_ids, word_rows
            ),
            entity_ids=pack(entity_ids, entity_rows),
            entity_position_ids=pack(entity_position_ids, entity_rows),
            word_rows=word_rows,
            entity_rows=entity_rows,
            padded_words=num_words,
            padded_entities=num_entities,
            token_type_ids=pack_if_given(token_type_ids, word_rows),
            entity_token_type_ids=pack_if_given(entity_token_type_ids, entity_rows),
            **{name: pack(of_columns, entity_rows) for name, (of_columns, _) in ranks.items()},
            inputs_embeds=pack_if_given(inputs_embeds, word_rows),
            pad_token_id=pad_token_id if position_ids is None else None,
        )

    @classmethod
    def from_encodings(
        cls, encodings: Mapping[str, Sequence] | Sequence[Mapping[str, Sequence]], *, pad_token_id: int | None = None
    ) -> "PackedBatch":
        """Pack what a tokenizer gives without padding: a mapping of lists of sequences, or a list of mappings.

        Keys are those of `from_padded`; others are ignored, entities may be missing from some sequences, and words and
        entities that a mask in the encodings excludes are left out.

        Args:
            encodings: What `LukeTokenizer` returns, or a list of such, or of plain dicts.
            pad_token_id: That of the model; None: the tokenizer's, where it made `encodings`, else 1.

        Raises:
            ValueError, TypeError: `input_ids` is missing, no sequence is given, or lengths disagree.
        """
        if pad_token_id is None:
            first = encodings if isinstance(encodings, Mapping) else next(iter(encodings), None)
            pad_token_id = getattr(first, "pad_token_id", 1)
        if isinstance(encodings, Mapping):
            if len(ids := encodings.get("input_ids", ())) and not hasattr(ids[0], "__len__"):
                encodings = {key: [values] for key, values in encodings.items()}  # of a single text
            encodings = [
                {key: values[b] for key, values in encodings.items() if key in _ENCODING_KEYS}
                for b in range(len(encodings.get("input_ids", ())))
            ]
        encodings = list(encodings)
        if not encodings or any("input_ids" not in encoding for encoding in encodings):
            raise ValueError("encodings must hold at least one sequence, each with input_ids, got none")
        present = {key for encoding in encodings for key in encoding}
        masks = {"attention_mask"} | ({"entity_attention_mask"} if "entity_ids" in present else set())
        padded = {key: _pad_ragged(key, encodings) for key in _ENCODING_KEYS if key in present | masks}
        return cls.from_padded(**padded, pad_token_id=pad_token_id)

    @property
    def batch_size(self) -> int:
        return self.lengths.batch_size

    @property
    def num_words(self) -> int:
        return self.position_ids.shape[0]

    @property
    def num_entities(self) -> int:
        return self.entity_ids.shape[0]

    def __post_init__(self) -> None:
        words, entities = self.position_ids.shape[0], self.entity_ids.shape[0]
        for name, length in (
            ("input_ids", words),
            ("inputs_embeds", words),
            ("word_rows", words),
            ("token_type_ids", words),
            ("entity_position_ids", entities),
            ("entity_rows", entities),
            ("entity_token_type_ids", entities),
            ("entity_start_positions", entities),
            ("entity_end_positions", entities),
        ):
            value = getattr(self, name)
            if value is not None and value.shape[0] != length:
                raise ValueError(f"{name} must have {length} rows, got {described(value)}")
        if (self.input_ids is None) == (self.inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds must be given, and not both")
        # Kernels trust them; elsewhere reading would wait for the device.
        if readable(self.lengths.cu_words):
            totals = int(self.lengths.cu_words[-1]), int(self.lengths.cu_entities[-1])
            if totals != (words, entities):
                raise ValueError(f"lengths must add up to {words} words and {entities} entities, got {totals}")
            for cu, most in (
                (self.lengths.cu_words, self.lengths.max_words),
                (self.lengths.cu_entities, self.lengths.max_entities),
            ):
                counts = cu.diff()
                if int(cu[0]) or (len(counts) and (int(counts.min()) < 0 or int(counts.max()) > most)):
                    raise ValueError(f"lengths must begin at 0, not decrease, and be at most {most}, got {cu.tolist()}")
            for name in ("entity_start_positions", "entity_end_positions"):
                ranks = getattr(self, name)
                if ranks is not None:
                    wrong = (ranks < 0) | (ranks >= self.lengths.cu_words.diff()[self.sequence_of_entity()])
                    if wrong.any():
                        raise ValueError(f"{name} must be ranks of words in the sequence, got {ranks[wrong][0].item()}")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedBatch":
        """Move all tensors to a device."""
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        """Copy all tensors into page-locked memory, as a DataLoader asks with `pin_memory=True`."""
        return _each_tensor(self, lambda tensor: tensor.pin_memory())

    def pack_words(self, padded: Tensor, name: str = "padded") -> Tensor:
        """Pack something of each word (labels, say): (B, W, ...) -> (Tw, ...)."""
        _check_leading(name, padded, (self.batch_size, self.padded_words))
        return padded.flatten(0, 1).index_select(0, self.word_rows.to(padded.device))

    def pack_entities(self, padded: Tensor, name: str = "padded") -> Tensor:
        """Pack something of each entity: (B, E, ...) -> (Te, ...)."""
        _check_leading(name, padded, (self.batch_size, self.padded_entities))
        return padded.flatten(0, 1).index_select(0, self.entity_rows.to(padded.device))

    def pad_words(self, packed: Tensor, fill: float = 0) -> Tensor:
        """Put what is packed back where it was in the padded batch: (Tw, ...) -> (B, W, ...), `fill` in the pads."""
        return pad(packed, self.word_rows, self.batch_size, self.padded_words, fill)

    def pad_entities(self, packed: Tensor, fill: float = 0) -> Tensor:
        """Put what is packed back: (Te, ...) -> (B, E, ...)."""
        return pad(packed, self.entity_rows, self.batch_size, self.padded_entities, fill)

    def sequence_of_entity(self) -> Tensor:
        """Return which sequence each entity belongs to, int64 (Te,)."""
        cu = self.lengths.cu_entities
        sequences = torch.arange(self.batch_size, device=cu.device)
        return sequences.repeat_interleave(cu.diff(), output_size=self.num_entities)


# What each key of an encoding has one value for.
_ENCODING_KEYS = {
    "input_ids": "input_ids",
    "attention_mask": "input_ids",
    "token_type_ids": "input_ids",
    "position_ids": "input_ids",
    "entity_ids": "entity_ids",
    "entity_attention_mask": "entity_ids",
    "entity_token_type_ids": "entity_ids",
    "entity_position_ids": "entity_ids",
    "entity_start_positions": "entity_ids",
    "entity_end_positions": "entity_ids",
}


def _pad_ragged(key: str, encodings: list[Mapping[str, Any]]) -> Tensor:
    """Pad one key of encodings on the right, (B, longest) or, for positions of mentions, (B, longest, M)."""
    lengths = [len(encoding.get(_ENCODING_KEYS[key], ())) for encoding in encodings]
    mentions = key == "entity_position_ids"
    mention_lengths = [len(row) for e in encodings for row in e.get(key, ())] if mentions else []
    longest_mention = max(mention_lengths, default=1)
    tail = (longest_mention,) if mentions else ()
    padded = torch.full((len(encodings), max(lengths), *tail), -1 if mentions else 0, device="cpu")
    for b, (encoding, length) in enumerate(zip(encodings, lengths, strict=True)):
        # A mask that is missing excludes nothing.
        values = encoding.get(key, [1] * length if key.endswith("attention_mask") else ())
        if len(values) != length:
            raise ValueError(
                f"{key} must have one value for each of {_ENCODING_KEYS[key]}, {length}, got {len(values)}"
            )
        if length:
            if mentions:
                values = [[*row, *[-1] * (longest_mention - len(row))] for row in values]
            row = torch.as_tensor(values, device="cpu")
            if row.dtype.is_floating_point:
                raise TypeError(f"{key} must be integers, got {row.dtype}")
            padded[b, :length] = row
    return padded


def _each_tensor(packed: Packed, change: Callable[[Any], Any]) -> Packed:
    """Return a copy with every tensor changed, those within too."""
    changed: dict[str, Any] = {
        field.name: change(value)
        for field in dataclasses.fields(packed)
        if isinstance(value := getattr(packed, field.name), Tensor | PackedLengths)
    }
    return dataclasses.replace(packed, **changed)


def pad(packed: Tensor, rows: Tensor, batch_size: int, length: int, fill: float = 0) -> Tensor:
    """Put each row of `packed` at its row of a padded batch (B * length, ...), `fill` elsewhere: (B, length, ...)."""
    padded = packed.new_full((batch_size * length, *packed.shape[1:]), fill)
    return padded.index_copy(0, rows, packed).unflatten(0, (batch_size, length))


def _check_words(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Return whichever is given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids or inputs_embeds must be given, and not both")
    if input_ids is None:
        assert inputs_embeds is not None
        if inputs_embeds.dim() != 3:
            raise ValueError(f"inputs_embeds must be (B, W, C), got {described(inputs_embeds)}")
        return inputs_embeds
    _check("input_ids", input_ids, (None, None))
    return input_ids


def _check(name: str, tensor: Tensor | None, shape: tuple[int | None, ...]) -> None:
    """Check the shape and that ids are integers."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have the shape ({wanted}), got {tuple(tensor.shape)}")
    if not name.endswith("mask") and (tensor.dtype.is_floating_point or tensor.dtype == torch.bool):
        raise TypeError(f"{name} must be integers, got {tensor.dtype}")


def check_range(name: str, ids: Tensor | None, low: int, size: int) -> None:
    """Raise unless ids lie in [low, size), where reading them waits for nothing.

    Raises:
        ValueError: they do not.
        TypeError: they are no integers.
    """
    if ids is None:
        return
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if readable(ids) and ids.numel():
        least, most = (int(value) for value in ids.aminmax())
        if least < low or most >= size:
            raise ValueError(f"{name} must lie in [{low}, {size - 1}], got {least if least < low else most}")


def _check_leading(name: str, tensor: Tensor, sizes: tuple[int, int]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape[:2]) != sizes:
        raise ValueError(f"{name} must have the shape ({sizes[0]}, {sizes[1]}, ...), got {tuple(tensor.shape)}")


def _mask(name: str, mask: Tensor | None, words: Tensor, length: int) -> Tensor:
    """Return which tokens exist, bool (B, length)."""
    if mask is None:
        return torch.ones(words.shape[0], length, dtype=torch.bool, device=words.device)
    if mask.dtype != torch.bool and readable(mask) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{name} must hold 0 and 1 only, got {mask.min().item()} to {mask.max().item()}")
    return mask.to(words.device).bool()


def _ranks(columns: Tensor, word_mask: Tensor, entity_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Turn columns of words into ranks among the words that exist, (B, E), and say which of entities are none."""
    num_words = word_mask.shape[1]
    if not num_words:
        return columns, entity_mask
    inside = columns.clamp(0, num_words - 1)
    wrong = entity_mask & ((inside != columns) | ~word_mask.gather(1, inside))
    return (word_mask.cumsum(dim=1) - 1).gather(1, inside), wrong


def _default_positions(input_ids: Tensor | None, words: Tensor, pad_token_id: int) -> Tensor:
    """Count as RoBERTa does: pads stay at the position of the pad, (B, W)."""
    if input_ids is None:
        return torch.arange(pad_token_id + 1, pad_token_id + 1 + words.shape[1], device=words.device).expand(
            words.shape[:2]
        )
    counted = (input_ids != pad_token_id).to(torch.int64)
    return counted.cumsum(dim=1) * counted + pad_token_id


def _integers(name: str, lengths: Sequence[int] | Tensor) -> list[int]:
    try:
        return [operator.index(n) for n in lengths]
    except TypeError:
        raise TypeError(f"{name} must be a list or a tensor (B,) of integers, got {lengths!r}") from None


def _cumulative(lengths: Sequence[int]) -> Tensor:
    # On the CPU whatever the default device: `to` moves them.
    return torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)
