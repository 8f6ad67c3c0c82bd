"""Bad input: an error that names the argument, the rule and the value, before any kernel runs."""

import dataclasses
import re

import pytest
import torch

import luke_kernels
from luke_kernels import entity_aware_attention, entity_aware_attention_varlen
from luke_kernels.ops import backends

B, W, E, H, D = 2, 5, 3, 2, 16
WORDS, ENTITIES = torch.zeros(B, W, 4, H, D), torch.zeros(B, E, 4, H, D)


def _int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


PADDED = [
    ({"words": WORDS[0]}, ValueError, "words must be (B, W, 4 or 3, H, D), got (5, 4, 2, 16)"),
    ({"words": None}, TypeError, "words must be a tensor, got NoneType"),
    ({"words": WORDS.long()}, TypeError, "words must be of a floating-point dtype, got torch.int64"),
    ({"words": WORDS[:, :, :2]}, ValueError, "words must stack 4 or 3 projections in dimension -3, got 2"),
    (
        {"entities": torch.zeros(B, E, 5, H, D)},
        ValueError,
        "entities must stack 4 or 3 projections in dimension -3, got 5",
    ),
    ({"entities": ENTITIES[0]}, ValueError, "entities must be (B, E, 4 or 3, H, D), got (3, 4, 2, 16)"),
    (
        {"entities": ENTITIES[:, :, :3]},
        ValueError,
        "entities must have the stack, H and D of words, (4, 2, 16), got (3, 2, 16)",
    ),
    (
        {"entities": ENTITIES[..., :1, :]},
        ValueError,
        "entities must have the stack, H and D of words, (4, 2, 16), got (4, 1, 16)",
    ),
    (
        {"entities": ENTITIES[..., :8]},
        ValueError,
        "entities must have the stack, H and D of words, (4, 2, 16), got (4, 2, 8)",
    ),
    ({"entities": ENTITIES[:1]}, ValueError, "entities must have the batch size of words, 2, got 1"),
    (
        {"entities": ENTITIES.double()},
        TypeError,
        "entities must have the dtype of words, torch.float32, got torch.float64",
    ),
    ({"entities": ENTITIES.to("meta")}, ValueError, "entities must be on the device of words, cpu, got meta"),
    ({"word_lengths": _int32(6, 1)}, ValueError, "word_lengths must lie in [0, 5], got 6"),
    ({"word_lengths": _int32(-1, 1)}, ValueError, "word_lengths must lie in [0, 5], got -1"),
    ({"entity_lengths": _int32(4, 1)}, ValueError, "entity_lengths must lie in [0, 3], got 4"),
    ({"word_lengths": _int32(1)}, ValueError, "word_lengths must have the shape (2,), got (1,)"),
    ({"word_lengths": torch.tensor([1.0, 2.0])}, TypeError, "word_lengths must be int32 or int64, got torch.float32"),
    ({"word_lengths": [1, 2]}, TypeError, "word_lengths must be a tensor, got list"),
    (
        {"word_lengths": _int32(1, 2).to("meta")},
        ValueError,
        "word_lengths must be on the device of words, cpu, got meta",
    ),
    ({"word_mask": torch.ones(B, W + 1)}, ValueError, "word_mask must have the shape (2, 5), got (2, 6)"),
    (
        {"word_mask": torch.ones(B, W)},
        TypeError,
        "word_mask must be bool or integers, 1 where a token exists, got torch.float32",
    ),
    ({"word_mask": torch.full((B, W), 2)}, ValueError, "word_mask must hold 0 and 1 only, got 2 to 2"),
    ({"entity_mask": torch.tensor([[0, 1, -1]] * 2)}, ValueError, "entity_mask must hold 0 and 1 only, got -1 to 1"),
    (
        {"word_mask": torch.ones(B, W).bool(), "word_lengths": _int32(1, 2)},
        ValueError,
        "word_lengths must be None where word_mask is given, got torch.int32 (2,)",
    ),
    (
        {"entities": None, "entity_mask": torch.ones(B, E).bool()},
        ValueError,
        "entity_mask must be None where entities is None, got torch.bool (2, 3)",
    ),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must lie in [0, 1), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must lie in [0, 1), got -0.1"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p must lie in [0, 1), got nan"),
    ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    ({"seed": torch.tensor([1.0, 2.0])}, TypeError, "seed must be int64, got torch.float32"),
    ({"backend": "flash"}, ValueError, f"backend must be one of {', '.join(('auto', *backends.TABLE))}, got 'flash'"),
    ({"backend": ["cpu"]}, TypeError, "backend must be a string, got list"),
    ({"scale": torch.tensor(0.3)}, TypeError, "scale must be a number, got Tensor"),
    ({"scale": "a"}, TypeError, "scale must be a number, got str"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number, got str"),
    ({"dropout_p": None}, TypeError, "dropout_p must be a number, got NoneType"),
    (
        {"words": WORDS[..., :0, :]},
        ValueError,
        "words must have at least one head and head_dim 1, got (2, 5, 4, 0, 16)",
    ),
    ({"words": WORDS[..., :0]}, ValueError, "words must have at least one head and head_dim 1, got (2, 5, 4, 2, 0)"),
    ({"seed": torch.tensor([1])}, ValueError, "seed must have the shape (2,), got (1,)"),
]


@pytest.mark.parametrize(("change", "error", "message"), PADDED)
def test_padded(change, error, message, monkeypatch):
    monkeypatch.setattr("luke_kernels.ops.library.attention", _never)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        entity_aware_attention(**{"words": WORDS, "entities": ENTITIES, **change})


CU_WORDS, CU_ENTITIES = _int32(0, 5, 10), _int32(0, 3, 6)
PACKED = [
    ({"words": WORDS}, ValueError, "words must be (Tw, 4 or 3, H, D), got (2, 5, 4, 2, 16)"),
    ({"cu_words": _int32(0, 6, 5)}, ValueError, "cu_words must run from 0 to 10, got 0 to 5"),
    ({"cu_words": _int32(1, 5, 10)}, ValueError, "cu_words must run from 0 to 10, got 1 to 10"),
    ({"cu_words": _int32(0, 11, 10), "max_words": 11}, ValueError, "cu_words must not decrease, got 11 before 10"),
    ({"cu_words": CU_WORDS.long()}, TypeError, "cu_words must be int32, got torch.int64"),
    ({"cu_words": CU_WORDS[None]}, ValueError, "cu_words must be a tensor (B + 1,), got torch.int32 (1, 3)"),
    ({"cu_words": None}, ValueError, "cu_words must be a tensor (B + 1,), got None"),
    ({"cu_entities": None}, ValueError, "cu_entities must be a tensor (B + 1,), got None"),
    ({"cu_entities": _int32(0, 6)}, ValueError, "max_entities must be at least every length, 6, got 3"),
    (
        {"cu_entities": _int32(0, 6), "max_entities": 6},
        ValueError,
        "cu_entities must have the length of cu_words, 3, got torch.int32 (2,)",
    ),
    ({"max_words": 4}, ValueError, "max_words must be at least every length, 5, got 4"),
    ({"max_words": -1}, ValueError, "max_words must not be negative, got -1"),
    ({"max_words": 5.0}, TypeError, "max_words must be an int, got 5.0"),
    ({"max_words": torch.tensor(5)}, TypeError, "max_words must be an int, got torch.int64 ()"),
    ({"entities": None}, ValueError, "cu_entities must be None or 0 where entities is None, got torch.int32 (3,)"),
    (
        {"entities": None, "cu_entities": None},
        ValueError,
        "max_entities must be None or 0 where entities is None, got 3",
    ),
    ({"dropout_p": 2}, ValueError, "dropout_p must lie in [0, 1), got 2"),
]


@pytest.mark.parametrize(("change", "error", "message"), PACKED)
def test_packed(change, error, message, monkeypatch):
    monkeypatch.setattr("luke_kernels.ops.library.attention", _never)
    arguments = {
        "words": WORDS.flatten(0, 1),
        "entities": ENTITIES.flatten(0, 1),
        "cu_words": CU_WORDS,
        "cu_entities": CU_ENTITIES,
        "max_words": W,
        "max_entities": E,
    }
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        entity_aware_attention_varlen(**{**arguments, **change})


def _never(*arguments, **options):
    raise AssertionError("a kernel ran on bad input")


def test_named_backends_never_fall_back():
    with pytest.raises(NotImplementedError, match=r"cpu: takes head_dim up to 256, got 300"):
        entity_aware_attention(torch.zeros(B, W, 4, H, 300), backend="cpu")
    assert entity_aware_attention(torch.zeros(B, W, 4, H, 300))[0].shape == (B, W, H, 300)


def test_auto_takes_the_fastest(monkeypatch):
    def chosen(dropout_p: float) -> str:
        taken = []
        monkeypatch.setattr(
            "luke_kernels.ops.library.attention", lambda *a, **k: taken.append(a[-1]) or (a[0][:, 0], None)
        )
        entity_aware_attention(WORDS, dropout_p=dropout_p)
        return taken[0]

    # Our kernels, but for those that any machine runs: without dropout torch's are faster.
    assert chosen(0.0) == ("sdpa" if backends._CPU_ISA == "portable" else "cpu")
    assert chosen(0.1) == "cpu"


def test_a_missing_extension_has_its_reason(monkeypatch):
    support = backends.TABLE["cpu"]
    missing = dataclasses.replace(support, missing=lambda device: "is not built (why)")
    monkeypatch.setattr(backends, "TABLE", {**backends.TABLE, "cpu": missing})
    assert "cpu" not in luke_kernels.available_backends()
    with pytest.raises(NotImplementedError, match=r"got 'cpu': cpu: is not built \(why\)"):
        entity_aware_attention(WORDS, backend="cpu")
    assert luke_kernels.explain_backends(WORDS, ENTITIES)["cpu"] == "is not built (why)"


def test_explain_backends():
    reasons = luke_kernels.explain_backends(WORDS.half(), ENTITIES.half())
    assert list(reasons) == list(backends.TABLE)
    assert reasons["reference"] is None
    assert reasons["sdpa"] is None
    assert reasons["cpu"] is None
    reason = backends.reason_against("cpu", torch.device("cpu"), torch.float8_e5m2, 64)
    assert reason == "takes float64, float32, bfloat16, float16, got float8_e5m2"
    assert luke_kernels.explain_backends(WORDS.flatten(0, 1))["cpu"] is None
    with pytest.raises(ValueError, match="words must be"):
        luke_kernels.explain_backends(WORDS[0, 0])
    with pytest.raises(TypeError, match="words must be a tensor, got NoneType"):
        luke_kernels.explain_backends(None)
    with pytest.raises(TypeError, match="key must be a tensor, got NoneType"):
        luke_kernels.stack_projections(WORDS, WORDS, None, WORDS)


def test_available_backends():
    assert {"reference", "sdpa", "cpu"} <= set(luke_kernels.available_backends())
