"""Checkpoints written on the spot, and what a test of them needs."""

import json
import tarfile

import torch
from safetensors.torch import save_file

from luke_kernels.config import LukeConfig

SIZES = {
    "vocab_size": 40,
    "entity_vocab_size": 9,
    "hidden_size": 16,
    "entity_emb_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
WORDS = "luke.embeddings.word_embeddings.weight"
ENTITIES = "luke.entity_embeddings.entity_embeddings.weight"
SELF = "luke.encoder.layer.1.attention.self."
QUERIES = ("w2e_query", "e2w_query", "e2e_query")
FILES = ("model.safetensors", "pytorch_model.bin")
INPUTS = {
    "input_ids": torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "entity_ids": torch.tensor([[3, 0], [2, 0]]),
    "entity_attention_mask": torch.tensor([[1, 1], [1, 0]]),
    "entity_position_ids": torch.tensor([[[1, 2], [3, -1]], [[1, -1], [-1, -1]]]),
}
TITLES = ["[PAD]", "[UNK]", "[MASK]", "Ana Ivanovic", "Wimbledon [MASK2]", "a", "b", "c", "d"]


def weights_of(cls, **changes):
    """Random weights as transformers 4.x stores them: tied ones once."""
    model = cls(LukeConfig(**{**SIZES, **changes}))
    return {name: torch.randn_like(parameter) * 0.2 for name, parameter in model.named_parameters()}


def write(directory, state, file="model.safetensors", config=None, **how):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**SIZES, "model_type": "luke", **(config or {})}))
    if file.endswith(".safetensors"):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / file)
    else:
        torch.save(state, directory / file, **how)
    return directory


def assert_holds(model, state):
    named = dict(model.named_parameters())
    assert set(named) == set(state)
    for name, parameter in named.items():
        assert parameter.is_leaf
        assert parameter.requires_grad
        assert parameter.dtype == state[name].dtype
        assert torch.equal(parameter, state[name]), name


def original(directory, state, entity_vocab, kind="tsv", **changes):
    directory.mkdir()
    model_config = {**SIZES, **changes, "bert_model_name": "roberta-base", "use_cache": False}
    metadata = {"model_config": model_config, "max_seq_length": 512, "max_entity_length": 128}
    (directory / "metadata.json").write_text(json.dumps(metadata))
    if kind == "tsv":
        lines = [f"{title}\t{10 - row}" for row, title in enumerate(entity_vocab)]
    else:
        lines = [
            json.dumps({"id": row, "entities": [[title, "en"], [title + "x", "de"]], "count": 1})
            for row, title in enumerate(entity_vocab)
        ]
    (directory / f"entity_vocab.{kind}").write_text("\n".join(lines) + "\n")
    torch.save({name.removeprefix("luke."): t for name, t in state.items()}, directory / "pytorch_model.bin")
    return directory


def pack(directory, archive, mode="w:gz"):
    with tarfile.open(archive, mode) as members:
        members.add(directory, arcname="luke")
    return archive
