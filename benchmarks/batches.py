"""The batches of the model and layer benchmarks: ids drawn at random, and real texts.

A name says all: `BxWxE` and `BxWxE-ragged` as in `cases`; `conll-N`, `conll-spans-N`, `wikipedia-N` and `questions-N`
are N texts of `texts.CORPORA`.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks import cases, texts
from luke_kernels import LukeConfig, PackedBatch

# Positions of a mention, -1 pads: tokenizers give so many, transformers' too.
MENTION = 30


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch, packed and padded."""

    name: str
    packed: PackedBatch

    @property
    def word_lengths(self) -> list[int]:
        return self.packed.lengths.cu_words.diff().tolist()

    @property
    def entity_lengths(self) -> list[int]:
        return self.packed.lengths.cu_entities.diff().tolist()

    @cached_property
    def padded(self) -> dict[str, Tensor]:
        """The inputs as transformers' tokenizer gives them."""
        packed = self.packed
        assert packed.input_ids is not None
        return {
            "input_ids": packed.pad_words(packed.input_ids, fill=1),
            "attention_mask": packed.pad_words(torch.ones_like(packed.input_ids)),
            "entity_ids": packed.pad_entities(packed.entity_ids),
            "entity_attention_mask": packed.pad_entities(torch.ones_like(packed.entity_ids)),
            "entity_position_ids": packed.pad_entities(packed.entity_position_ids, fill=-1),
        }

    def first(self, count: int) -> "Batch":
        """Return the first sequences, padded to the longest of them."""
        if count >= self.packed.batch_size:
            return self
        words, entities = max(self.word_lengths[:count]), max(self.entity_lengths[:count])
        lengths = {name: entities if name.startswith("entity") else words for name in self.padded}
        inputs = {name: value[:count, : lengths[name]] for name, value in self.padded.items()}
        return Batch(f"{self.name}[:{count}]", PackedBatch.from_padded(**inputs))

    def parts(self, tokens: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Cut the padded inputs to parts of about so many tokens, and each to its longest sequence.

        Returns:
            Which sequences, and the inputs; without those of entities where no sequence has any.
        """
        step = max(1, tokens // (self.packed.padded_words + self.packed.padded_entities))
        for first in range(0, self.packed.batch_size, step):
            rows = slice(first, first + step)
            words, entities = max(self.word_lengths[rows]), max(self.entity_lengths[rows])
            lengths = {name: entities if name.startswith("entity") else words for name in self.padded}
            yield rows, {name: self.padded[name][rows, :length] for name, length in lengths.items() if length}

    @property
    def shape(self) -> dict[str, int]:
        packed = self.packed
        return {
            "B": packed.batch_size,
            "W": packed.padded_words,
            "E": packed.padded_entities,
            "real_tokens": packed.num_words + packed.num_entities,
            "padded_tokens": packed.batch_size * (packed.padded_words + packed.padded_entities),
        }

    def flops(self, config: LukeConfig, direction: str) -> float:
        """Count what real tokens cost: products by weights, 2 a weight and token, and 4 C sum_b S_b^2 of attention.

        The backward costs 2 times the former and 2.5 times the latter.
        """
        size = config.hidden_size
        assert config.entity_emb_size is not None
        # Two queries a token, key, value, output; and the feed-forward.
        layer_weights = 5 * size**2 + 2 * size * config.intermediate_size
        tokens = self.shape["real_tokens"]
        products = 2 * (config.num_hidden_layers * layer_weights * tokens)
        products += 2 * config.entity_emb_size * size * self.packed.num_entities
        lengths = zip(self.word_lengths, self.entity_lengths, strict=True)
        attention = config.num_hidden_layers * 4 * size * sum((w + e) ** 2 for w, e in lengths)
        return products + attention if direction == "forward" else 3 * products + 3.5 * attention


_TEXTS = re.compile(rf"({'|'.join(texts.CORPORA)})-([1-9]\d*)")


def corpus_of(name: str) -> tuple[texts.Corpus, int]:
    """Return the corpus of a case and the number of its texts.

    Raises:
        ValueError: the name is none of texts.
    """
    match = _TEXTS.fullmatch(name)
    if match is None:
        raise ValueError(f"case must be one of {', '.join(f'{corpus}-N' for corpus in texts.CORPORA)}, got {name!r}")
    return texts.CORPORA[match[1]], int(match[2])


def load(name: str, config: LukeConfig, device: torch.device) -> Batch:
    """Make the batch of a name.

    Raises:
        ValueError: the name is none, the model has no place for so many words, or there are not so many texts.
        FileNotFoundError: it is of real texts, and they are not here.
    """
    packed = PackedBatch.from_encodings(texts.load(*corpus_of(name)) if _TEXTS.fullmatch(name) else _draw(name, config))
    return Batch(name, packed.to(device))


def _draw(name: str, config: LukeConfig) -> list[dict[str, list]]:
    """Draw what a tokenizer would give without padding; ids of special tokens do not occur."""
    try:
        case = cases.parse(name)
    except ValueError:
        known = ", ".join(f"{corpus}-N" for corpus in texts.CORPORA)
        raise ValueError(f"case must be BxWxE, BxWxE-ragged or one of {known}, got {name!r}") from None
    if case.num_words > config.max_words or case.num_entities == 0:
        raise ValueError(f"case must have at most {config.max_words} words and some entities, got {name!r}")
    draw = random.Random(name)

    def mention(num_words: int) -> list[int]:
        length = min(draw.randint(1, 4), num_words)
        start = draw.randint(0, num_words - length)
        return [*range(start, start + length), *[-1] * (MENTION - length)]

    return [
        {
            "input_ids": [draw.randrange(4, config.vocab_size) for _ in range(words)],
            "entity_ids": [draw.randrange(3, config.entity_vocab_size) for _ in range(entities)],
            "entity_position_ids": [mention(words) for _ in range(entities)],
        }
        for words, entities in zip(case.word_lengths, case.entity_lengths, strict=True)
    ]
