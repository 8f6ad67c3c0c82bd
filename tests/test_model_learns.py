"""Whole models at work: two hundred steps on two backends, and LUKE-large."""

import json
from importlib.resources import files

import pytest
import torch

from luke_kernels import LukeConfig, LukeForMaskedLM, LukeModel, LukeTokenizer, PackedBatch
from luke_kernels.tokenizer import BUNDLED

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def bundled_batch(tokenizer: LukeTokenizer) -> PackedBatch:
    lines = (files("luke_kernels") / "data/sentences.jsonl").read_text(encoding="utf-8").splitlines()
    sentences = [json.loads(line) for line in lines]
    return PackedBatch.from_encodings(
        tokenizer(
            [s["text"] for s in sentences],
            entity_spans=[[(e["start"], e["end"]) for e in s["entities"]] for s in sentences],
            entities=[[e["title"] for e in s["entities"]] for s in sentences],
        )
    )


def losses(backend: str, batch: PackedBatch, tokenizer: LukeTokenizer, steps: int, lr: float = 0.02) -> list[float]:
    """Learn masked words and entities by plain gradient descent."""
    torch.manual_seed(0)
    config = LukeConfig(
        vocab_size=len(tokenizer),
        entity_vocab_size=len(tokenizer.entity_vocab),
        hidden_size=32,
        entity_emb_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    model = LukeForMaskedLM(config, backend=backend).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(1)
    values = []
    for _ in range(steps):
        hidden = torch.rand(batch.num_words, generator=generator) < 0.15
        hidden_entities = torch.rand(batch.num_entities, generator=generator) < 0.3
        masked = PackedBatch(
            **{
                **vars(batch),
                "input_ids": batch.input_ids.masked_fill(hidden, tokenizer.mask_token_id),
                "entity_ids": batch.entity_ids.masked_fill(hidden_entities, tokenizer.entity_mask_token_id),
            }
        )
        output = model(
            masked,
            labels=batch.input_ids.masked_fill(~hidden, -100),
            entity_labels=batch.entity_ids.masked_fill(~hidden_entities, -100),
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        values.append(output.loss.item())
    return values


def test_two_hundred_steps_are_the_same_on_the_kernels():
    tokenizer = LukeTokenizer.from_pretrained(BUNDLED)
    batch = bundled_batch(tokenizer)
    ours, reference = (losses(backend, batch, tokenizer, 200) for backend in ("cpu", "reference"))
    assert max(abs(a - b) for a, b in zip(ours, reference, strict=True)) <= 1e-4
    assert sum(ours[-20:]) < 0.9 * sum(ours[:20])


def test_parameters_are_counted_as_the_paper_does():
    """355M of RoBERTa-large and 128M of entities; the three extra queries apart."""
    with torch.device("meta"):
        model = LukeModel(LukeConfig(**LARGE))
    counts = {name: p.numel() for name, p in model.named_parameters()}
    extra = sum(n for name, n in counts.items() if "2e_query" in name or "2w_query" in name)
    entities = counts["entity_embeddings.entity_embeddings.weight"]
    assert (sum(counts.values()), extra, entities) == (559_724_544, 75_571_200, 128_000_000)
    # transformers' count of roberta-large is 355,359,744; LUKE has two words more and its own entity parts.
    roberta = sum(n for name, n in counts.items() if not name.startswith("entity_embeddings.")) - extra - 2 * 1024
    assert roberta == 355_359_744


@pytest.mark.slow
def test_large_runs():
    tokenizer = LukeTokenizer.from_pretrained(BUNDLED)
    model = LukeModel(LukeConfig(**LARGE)).eval()
    with torch.no_grad():
        output = model(bundled_batch(tokenizer))
    assert output.last_hidden_state.isfinite().all()
    assert output.entity_last_hidden_state.shape[1] == 1024
