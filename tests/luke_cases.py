"""Batches drawn at random, real sentences with their mentions as entities, models with all parameters drawn anew."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from luke_kernels import LukeConfig, LukePreTrainedModel, LukeTokenizer, PackedBatch

DATA = Path(os.environ.get("LUKE_KERNELS_DATA", "/nonexistent"))
NEEDS_DATA = pytest.mark.skipif(not DATA.is_dir(), reason="LUKE_KERNELS_DATA names no folder of data sets")

ENCODERS = {
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
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * std)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter += 1


Model = TypeVar("Model", bound=LukePreTrainedModel)

BATCH, WORDS, ENTITIES, MENTION = 3, 7, 4, 3
WORD_LENGTHS, ENTITY_LENGTHS = [7, 4, 5], [4, 2, 3]
PADDINGS = ["right", "left", "holes", "none"]
# 38 words at most.
SIZES = {
    "vocab_size": 99,
    "entity_vocab_size": 10,
    "hidden_size": 32,
    "entity_emb_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "type_vocab_size": 3,
}


def build(cls: type[Model], *, backend: str = "auto", dtype: torch.dtype = torch.float64, **changes: Any) -> Model:
    """Make a small model in evaluation mode, every parameter drawn anew, in float64: what differs shows."""
    model = cls(LukeConfig(**{**SIZES, **changes}), backend=backend)
    redraw(model)
    return model.to(dtype).eval()


def exists(lengths: list[int], size: int, padding: str) -> Tensor:
    ranks = torch.arange(size)
    mask = (ranks < torch.tensor(lengths)[:, None]) | (padding == "none")
    if padding == "left":
        mask = mask.flip(1)
    elif padding == "holes":
        mask = mask[:, (3 * ranks + 1) % size]
    return mask.to(torch.int64)


def padded_inputs(padding: str = "right") -> dict[str, Tensor]:
    """Draw a batch with all inputs that LukeModel takes but positions; what the masks exclude is not neutral."""
    positions = torch.randint(0, WORDS, (BATCH, ENTITIES, MENTION))
    positions[..., 1:][torch.rand(BATCH, ENTITIES, MENTION - 1) < 0.5] = -1
    mask = exists(WORD_LENGTHS, WORDS, padding)
    return {
        "input_ids": torch.randint(3, 99, (BATCH, WORDS)).masked_fill(mask == 0, 1),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 3, (BATCH, WORDS)),
        "entity_ids": torch.randint(0, 10, (BATCH, ENTITIES)),
        "entity_attention_mask": exists(ENTITY_LENGTHS, ENTITIES, padding),
        "entity_token_type_ids": torch.randint(0, 3, (BATCH, ENTITIES)),
        "entity_position_ids": positions,
    }


def words_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if not name.startswith("entity")}


def of_transformers(ours: LukePreTrainedModel) -> Any:
    """Make transformers' model of the same name, with the same weights; names must be the same."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LukeConfig(**ours.config.to_dict(), attn_implementation="eager")
    theirs = getattr(transformers, type(ours).__name__)(config).to(ours.dtype)
    theirs.load_state_dict(ours.state_dict())
    return theirs.train(ours.training)


def one_by_one(inputs: dict[str, Tensor]) -> list[dict[str, list]]:
    """What a tokenizer gives without padding: the tokens that exist."""
    encodings = []
    for b in range(BATCH):
        words, entities = (inputs[name][b].bool() for name in ("attention_mask", "entity_attention_mask"))
        encodings.append(
            {
                name: value[b][entities if name.startswith("entity") else words].tolist()
                for name, value in inputs.items()
                if not name.endswith("mask")
            }
        )
    return encodings


def equal_batches(a: PackedBatch, b: PackedBatch) -> bool:
    def values(batch: PackedBatch) -> list:
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        lengths = fields.pop("lengths")
        return [*fields.values(), *(getattr(lengths, f.name) for f in dataclasses.fields(lengths))]

    return all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, Tensor) else x == y
        for x, y in zip(values(a), values(b), strict=True)
    )
