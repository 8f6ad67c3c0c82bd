"""Parity with transformers: batches of real sentences, heads and their labels, models of equal weights, bounds."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import luke_cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import luke_kernels
from luke_kernels import LukeConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

BATCH = 16
LABELS = 9
# Largest difference at tokens that exist, by size; of "base" relative to the largest activation.
BOUNDS = {"tiny": 1e-5, "mini": 2e-5, "base": 1e-4}


@dataclass(frozen=True)
class Head:
    """A class, the task of its tokenizer, and what it learns from."""

    name: str
    task: str | None
    labels: Callable[[dict], dict]


def _classes(kind: str) -> Callable[[dict], dict]:
    """Label every word or entity that exists; pads are ignored."""
    mask = {"word": "attention_mask", "entity": "entity_attention_mask"}[kind]
    return lambda batch: {"labels": torch.randint(0, LABELS, batch[mask].shape).masked_fill(batch[mask] == 0, -100)}


def _masked(batch: dict) -> dict:
    labels = batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.8, -100)
    entity_labels = batch["entity_ids"].masked_fill(batch["entity_attention_mask"] == 0, -100)
    return {"labels": labels.masked_fill(batch["attention_mask"] == 0, -100), "entity_labels": entity_labels}


def _of_sequences(batch: dict) -> dict:
    return {"labels": torch.randint(0, LABELS, (len(batch["input_ids"]),))}


def _answers(batch: dict) -> dict:
    return {f"{end}_positions": torch.randint(0, 5, (len(batch["input_ids"]),)) for end in ("start", "end")}


def _choices(batch: dict) -> dict:
    return {"labels": torch.randint(0, 2, (len(batch["input_ids"]) // 2,))}


HEADS = [
    Head("LukeForMaskedLM", None, _masked),
    Head("LukeForEntityClassification", "entity_classification", _of_sequences),
    Head("LukeForEntityPairClassification", "entity_pair_classification", _of_sequences),
    Head("LukeForEntitySpanClassification", "entity_span_classification", _classes("entity")),
    Head("LukeForSequenceClassification", None, _of_sequences),
    Head("LukeForTokenClassification", None, _classes("word")),
    Head("LukeForQuestionAnswering", None, _answers),
    Head("LukeForMultipleChoice", None, _choices),
]
BY_NAME = pytest.mark.parametrize("head", HEADS, ids=[head.name for head in HEADS])


def sentences(task: str | None, first: int, count: int) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Return sentences with at least two mentions, and as many of these as the task takes."""
    chosen = [s for s in luke_cases.conll_sentences() if len(s[1]) >= 2][first : first + count]
    kept = {"entity_classification": 1, "entity_pair_classification": 2}.get(task or "", 99)
    return [text for text, _ in chosen], [spans[:kept] for _, spans in chosen]


def encode(task: str | None, first: int = 0, count: int = BATCH) -> dict[str, Tensor]:
    if not luke_cases.DATA.is_dir():
        pytest.skip("LUKE_KERNELS_DATA names no folder of data sets")
    texts, spans = sentences(task, first, count)
    titles = None if task else [[t[s:e] for s, e in sp] for t, sp in zip(texts, spans, strict=True)]
    return dict(
        luke_cases.tokenizer(task)(texts, entity_spans=spans, entities=titles, padding=True, return_tensors="pt")
    )


def pair_of_models(name: str, size: str, **settings) -> tuple[nn.Module, nn.Module]:
    """Return transformers' model and ours, with the same weights, all drawn anew, without dropout."""
    config = LukeConfig(
        **{"entity_vocab_size": 5001, "entity_emb_size": 24, **luke_cases.ENCODERS[size], **settings},
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        num_labels=2 if name == "LukeForQuestionAnswering" else LABELS,
    )
    theirs = getattr(transformers, name)(transformers.LukeConfig(**config.to_dict())).eval()
    if name == "LukeForMaskedLM":
        # transformers 5 leaves them apart.
        theirs.lm_head.decoder.weight = theirs.luke.embeddings.word_embeddings.weight
    luke_cases.redraw(theirs)
    ours = getattr(luke_kernels, name)(config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run(model: nn.Module, head: Head, batch: dict, labels: dict):
    """Run a model; eager answers with the pads' logits masked as ours are."""
    if head.name == "LukeForMultipleChoice":
        batch = {name: value.unflatten(0, (-1, 2)) for name, value in batch.items()}
    output = model(**batch, **{name: value.clone() for name, value in labels.items()})
    if head.name == "LukeForQuestionAnswering" and type(model.luke.encoder).__name__ == "LukeEncoder":
        output.loss = 0
        for end in ("start", "end"):
            logits = output[f"{end}_logits"]
            logits = logits.masked_fill(batch["attention_mask"] == 0, torch.finfo(logits.dtype).min)
            output.loss = output.loss + F.cross_entropy(logits, labels[f"{end}_positions"]) / 2
            output[f"{end}_logits"] = logits
    return output


def existing(value: Tensor, batch: dict) -> Tensor:
    """Cut an output to tokens that exist; there are never as many words as entities."""
    for mask in (batch["attention_mask"], batch.get("entity_attention_mask")):
        if mask is not None and value.shape[:2] == mask.shape:
            return value[mask.bool()]
    return value


def outputs(output) -> dict[str, Tensor]:
    return {name: output[name] for name in output.keys() if isinstance(output[name], Tensor) and "loss" not in name}  # noqa: SIM118


def assert_close(ours, theirs, batch: dict, size: str) -> None:
    assert list(outputs(ours)) == list(outputs(theirs))
    for name, expected in outputs(theirs).items():
        got, expected = (existing(value, batch) for value in (outputs(ours)[name], expected))
        bound = BOUNDS[size] * (expected.abs().max().item() if size == "base" else 1)
        error = (got - expected).abs().max().item()
        assert error <= bound, f"{name}: {error:.2g} > {bound:.2g}"


def assert_gradients(ours: nn.Module, theirs: nn.Module, exact: nn.Module) -> None:
    """Assert of every parameter: an error at most three times eager's, plus what rounding to float32 costs."""
    truth = {name: parameter.grad for name, parameter in exact.named_parameters()}
    eager = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if truth[name] is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        rounded = truth[name].float()
        largest = truth[name].abs().max()
        if "attention.self" in name:
            # The gradient of a score is the difference of dout . v and dout . out, which any flash attention rounds
            # apart; the gradient of the values shows their size.
            largest = max(largest, truth[re.sub(r"self\.\w+\.", "self.value.", name)].abs().max())
        if name == "classifier.bias":
            # Its terms, probabilities less labels, cancel; for multiple choice to nothing.
            largest = largest.clamp(min=1.0)
        floor = 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max() + torch.finfo(torch.float32).eps * largest
        error, eager_error = ((gradient - truth[name]).abs().max() for gradient in (parameter.grad, eager[name]))
        assert error <= 3 * eager_error + floor, f"{name}: {error:.2g} > 3 * {eager_error:.2g} + {floor:.2g}"
