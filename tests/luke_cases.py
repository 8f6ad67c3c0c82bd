"""Real sentences with their mentions as entities, and models whose parameters are all drawn anew."""

import functools
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from luke_kernels import LukeTokenizer

DATA = Path(os.environ.get("LUKE_KERNELS_DATA", "/nonexistent"))
NEEDS_DATA = pytest.mark.skipif(not DATA.is_dir(), reason="LUKE_KERNELS_DATA names no folder of data sets")

SIZES = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "mini": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}


@functools.cache
def conll_sentences(name: str = "eng.testa") -> list[tuple[str, list[tuple[int, int]]]]:
    """Read CoNLL-2003 in IOB1: sentences and the character spans of their mentions."""
    sentences = []
    for block in (DATA / "conll2003" / name).read_text(encoding="utf-8").split("\n\n"):
        rows = [line.split() for line in block.splitlines() if line and not line.startswith("-DOCSTART-")]
        if not rows:
            continue
        text, spans, previous = "", [], "O"
        for word, *_, tag in rows:
            start = len(text) + bool(text)
            text += " " * bool(text) + word
            if tag != "O":
                if previous[1:] == tag[1:] and not tag.startswith("B-"):
                    spans[-1] = (spans[-1][0], len(text))
                else:
                    spans.append((start, len(text)))
            previous = tag
        sentences.append((text, spans))
    return sentences


def entity_vocab() -> dict[str, int]:
    """Every second mention of the sentences is known."""
    mentions = sorted({text[start:end] for text, spans in conll_sentences() for start, end in spans})
    return {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, **{m: 3 + i for i, m in enumerate(mentions[::2])}, "[MASK2]": 5000}


@functools.cache
def tokenizer(task: str | None = None) -> LukeTokenizer:
    """RoBERTa's pieces."""
    files = DATA / "roberta_bpe" / "vocab.json", DATA / "roberta_bpe" / "merges.txt"
    return LukeTokenizer.from_files(*files, entity_vocab(), task=task)


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter: attention far from uniform, no bias zero, no norm the identity, no two queries alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            std = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter += 1
