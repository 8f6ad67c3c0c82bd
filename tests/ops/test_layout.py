"""Layouts without offsets or lengths: what they spare, and that they mean what the explicit ones say."""

import pytest
import torch
from attention_cases import INTERPRETED
from torch.profiler import profile

from luke_kernels import entity_aware_attention
from luke_kernels.ops.layout import Layout

BACKENDS = ["reference", "sdpa", "cpu", pytest.param("triton", marks=INTERPRETED)]
# B, W, E
SIZES = [(3, 5, 4), (1, 7, 2), (3, 5, 0), (3, 0, 4), (3, 0, 0), (0, 5, 4)]
# Of torch's ops, those that only describe or allocate memory.
VIEWS = {"view", "reshape", "flatten", "unsqueeze", "slice", "split", "split_with_sizes", "narrow", "as_strided"}
FREE = VIEWS | {"detach", "empty", "empty_like", "empty_strided", "new_empty"}


def run(backend: str, layout: Layout, num_words: int, num_entities: int) -> tuple[torch.Tensor, ...]:
    """Return out, lse, dwords, dentities."""
    generator = torch.Generator().manual_seed(3)
    words, entities, dout_words, dout_entities = (
        torch.randn(tokens, *rest, generator=generator)
        for rest in ((4, 2, 16), (2, 16))
        for tokens in (num_words, num_entities)
    )
    arguments = words, entities, *layout, 0.25, 0.1, torch.tensor([5, 6]), backend
    out, lse = torch.ops.luke_kernels.attention_forward(*arguments)
    return out, lse, *torch.ops.luke_kernels.attention_backward(dout_words, dout_entities, out, lse, *arguments)


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for name, a, b in zip(("out", "lse", "dwords", "dentities"), found, expected, strict=True):
        assert torch.equal(a, b), name


def explicit(sizes: tuple[int, int, int]) -> Layout:
    batch, words, entities = sizes
    places = [[b * words for b in range(batch)], [words] * batch, [b * entities for b in range(batch)]]
    tensors = (torch.tensor(place, dtype=torch.int32) for place in (*places, [entities] * batch))
    return Layout(*tensors, *sizes, covers_rows=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_none_is_the_regular_batch(backend, sizes):
    batch, words, entities = sizes
    layout = Layout(None, None, None, None, *sizes, covers_rows=True)
    expected = run(backend, explicit(sizes), batch * words, batch * entities)
    assert not any(tensor.isnan().any() for tensor in expected)
    assert_same(run(backend, layout, batch * words, batch * entities), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_may_be_none(backend):
    given = explicit((3, 5, 4))
    lengths = {"word_lengths": torch.tensor([5, 0, 2]).int(), "entity_lengths": torch.tensor([1, 4, 0]).int()}
    for ragged in ({}, lengths):
        full = given._replace(**ragged, covers_rows=not ragged)
        expected = run(backend, full, 15, 12)
        absent = [name for name in Layout._fields[:4] if name not in ragged]
        for names in (*([name] for name in absent), absent):
            assert_same(run(backend, full._replace(**dict.fromkeys(names)), 15, 12), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_batch_size_reaches_into_nothing(backend):
    """Sequences that begin past the end of the buffers are empty, and one that goes past it is cut."""
    lengths = {"word_lengths": torch.tensor([5, 3]).int(), "entity_lengths": torch.tensor([4, 4]).int()}
    expected = run(backend, explicit((2, 5, 4))._replace(**lengths), 8, 8)
    assert_same(run(backend, Layout(None, None, None, None, 4, 5, 4, covers_rows=True), 8, 8), expected)


def test_a_regular_batch_is_one_group():
    (group,) = Layout(None, None, None, None, 1000, 7, 3, covers_rows=True).groups(7000, 3000)
    assert group == (range(1000), 0, 7, 7, 0, 3, 3)
    lengths = torch.full((4,), 6)
    (group,) = Layout(None, lengths, None, None, 4, 7, 3, covers_rows=False).groups(28, 12)
    assert group == (range(4), 0, 7, 6, 0, 3, 3)


@pytest.mark.parametrize("with_entities", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_dense_batch_launches_nothing_but_the_kernels(monkeypatch, with_entities, training):
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", False)
    words, entities = torch.randn(2, 5, 4, 2, 16), torch.randn(2, 3, 4, 2, 16) if with_entities else None
    inputs = [tensor.requires_grad_(training) for tensor in (words, entities) if tensor is not None]
    with profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        outs = [out for out in entity_aware_attention(words, entities, backend="cpu") if out is not None]
        if training:
            torch.autograd.grad(outs, inputs, [torch.empty_like(out) for out in outs])
    ops = {
        event.name.split("::")[1] for event in profiled.events() if event.name.startswith(("aten:", "luke_kernels:"))
    }
    assert ops - FREE == {"attention_forward", *(["attention_backward"] if training else [])}
