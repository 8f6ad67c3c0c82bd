"""The cases: how many words and entities each sequence of a batch has.

A name says all: `BxWxE` is dense, `BxWxE-ragged` is padded to W and E, its lengths drawn from the name; `BxWxE-d32` has
heads of 32 numbers, as MiniLM, else they are of 64.
"""

import random
import re
from dataclasses import dataclass

CPU_CASES = (
    "1x64x8",
    "8x128x32",
    "32x128x16-ragged",
    "4x512x128",
    "1x512x1024",
    "1x4096x512",
    "16x512x128-ragged",
    # Of the mean length of the ragged ones, for comparison.
    "32x73x9",
    "16x338x50",
    "8x128x32-d32",
    "4x512x128-d32",
    "1x512x1024-d32",
)
GPU_CASES = (
    "32x512x32",
    "32x512x128",
    "8x512x512",
    "1x512x64",
    "128x128x16-ragged",
    "4x2048x512",
    "1x8192x1024",
    "32x512x128-d128",
    "4x2048x512-d128",
)
# Of the GPU's, where the core of transformers also competes compiled: to compile it takes longer than all else.
COMPILED_CASES = ("32x512x128", "32x512x128-d128")
DEVICE_CASES = {"cpu": CPU_CASES, "cuda": GPU_CASES}
# LUKE base on the CPU, LUKE large on the GPU.
DEVICE_HEADS = {"cpu": 12, "cuda": 16}
DIRECTIONS = ("forward", "both")


@dataclass(frozen=True)
class Case:
    """A batch padded to `num_words` and `num_entities`, with the real lengths of its sequences."""

    name: str
    num_heads: int
    num_words: int
    num_entities: int
    word_lengths: tuple[int, ...]
    entity_lengths: tuple[int, ...]
    head_dim: int = 64

    @property
    def ragged(self) -> bool:
        return len({*zip(self.word_lengths, self.entity_lengths, strict=True)}) > 1

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens of each sequence, words and entities."""
        return tuple(w + e for w, e in zip(self.word_lengths, self.entity_lengths, strict=True))

    @property
    def shape(self) -> dict[str, int]:
        return {
            "B": len(self.word_lengths),
            "W": self.num_words,
            "E": self.num_entities,
            "H": self.num_heads,
            "D": self.head_dim,
            "real_tokens": sum(self.lengths),
        }

    def flops(self, direction: str) -> float:
        """Count what real tokens cost: 4 H D sum_b S_b^2 forward; the backward is 2.5 times that."""
        forward = 4 * self.num_heads * self.head_dim * sum(length**2 for length in self.lengths)
        return forward * (1 if direction == "forward" else 3.5)


def parse(name: str, num_heads: int = 12) -> Case:
    """Build the case of a name.

    Raises:
        ValueError: the name is not BxWxE[-dD][-ragged].
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x(\d+)(-d[1-9]\d*)?(-ragged)?", name)
    if match is None:
        raise ValueError(f"case must be BxWxE[-dD][-ragged], got {name!r}")
    batch, words, entities = map(int, match.groups()[:3])
    head_dim = int(match[4][2:]) if match[4] else 64
    if match[5] is None:
        return Case(name, num_heads, words, entities, (words,) * batch, (entities,) * batch, head_dim)
    draw = random.Random(name)
    # From 60 words of 512 up, in proportion; the first sequence is full, so that the padding is that of a real batch.
    shortest = max(1, words * 60 // 512)
    word_lengths = (words, *(draw.randint(shortest, words) for _ in range(batch - 1)))
    entity_lengths = (entities, *(draw.randint(0, entities) for _ in range(batch - 1)))
    return Case(name, num_heads, words, entities, word_lengths, entity_lengths, head_dim)
