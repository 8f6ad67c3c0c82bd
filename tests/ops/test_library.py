"""The op as torch sees it: schema, fakes, autograd, compile, export, transforms."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from luke_kernels import entity_aware_attention, entity_aware_attention_varlen
from luke_kernels.ops import library

BACKENDS = ["reference", "sdpa", "cpu"]
assert library.NAMESPACE == "luke_kernels"


def _arguments(backend: str, entities: bool, covers_rows: bool, dropout_p: float, dtype=torch.float32) -> tuple:
    words = torch.randn(12, 4, 2, 8, dtype=dtype, requires_grad=True)
    offsets, lengths = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([5, 7 if covers_rows else 3]).int()
    other = torch.randn(6, 4, 2, 8, dtype=dtype, requires_grad=True) if entities else None
    places = (torch.tensor([0, 2]).int(), torch.tensor([2, 4]).int()) if entities else (None, None)
    seed = torch.tensor([1, 2]) if dropout_p else None
    return words, other, offsets, lengths, *places, 7, 4 if entities else 0, covers_rows, 0.3, dropout_p, seed, backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entities", [True, False])
@pytest.mark.parametrize("covers_rows", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_opcheck(backend, entities, covers_rows, dropout_p):
    arguments = _arguments(backend, entities, covers_rows, dropout_p)
    torch.library.opcheck(torch.ops.luke_kernels.attention_forward.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.luke_kernels.attention_forward(*arguments)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    dout = torch.randn_like(out)
    backward_arguments = (dout[:12], dout[12:] if entities else None, out, lse, *detached)
    torch.library.opcheck(torch.ops.luke_kernels.attention_backward.default, backward_arguments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stack", [4, 3])
@pytest.mark.parametrize("pattern", ["lengths", "mask"])
def test_gradcheck(backend, stack, pattern):
    words = torch.randn(2, 4, stack, 2, 3, dtype=torch.float64, requires_grad=True)
    entities = torch.randn(2, 3, stack, 2, 3, dtype=torch.float64, requires_grad=True)
    masks = {
        "lengths": {"word_lengths": torch.tensor([4, 2]).int(), "entity_lengths": torch.tensor([0, 3]).int()},
        "mask": {"word_mask": torch.tensor([[True, False, True, True], [False] * 4])},
    }[pattern]
    assert torch.autograd.gradcheck(
        lambda w, e: entity_aware_attention(w, e, **masks, backend=backend), (words, entities)
    )


def test_double_backward_is_refused():
    words = torch.randn(2, 4, 4, 2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(entity_aware_attention(words)[0].sum(), words, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(NotImplementedError, match="must be differentiated once"):
        (words.sum() + gradient.sum()).backward()


def _padded(words, entities, word_lengths):
    return entity_aware_attention(words, entities, word_lengths=word_lengths)


def _packed(words, entities, cu_words, cu_entities):
    return entity_aware_attention_varlen(words, entities, cu_words, cu_entities, 64, 64)


def _padded_inputs(batch: int, words: int, entities: int) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(batch, words, 4, 2, 8, requires_grad=True),
        torch.randn(batch, entities, 4, 2, 8, requires_grad=True),
        torch.randint(1, words, (batch,), dtype=torch.int32),
    )


def _packed_inputs(batch: int, words: int, entities: int) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(batch * words, 4, 2, 8, requires_grad=True),
        torch.randn(batch * entities, 4, 2, 8, requires_grad=True),
        torch.arange(0, batch * words + 1, words, dtype=torch.int32),
        torch.arange(0, batch * entities + 1, entities, dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("function", "make", "backend"),
    [
        (_padded, _padded_inputs, "aot_eager"),
        (_packed, _packed_inputs, "aot_eager"),
        (_padded, _padded_inputs, "inductor"),
    ],
)
def test_compiles_whole_and_once(function, make, backend):
    torch._dynamo.reset()
    counter, compilations = CompileCounterWithBackend(backend), 0
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    # The sizes of the first call are distinct, also from stack, H and D: torch takes equal ones to stay equal.
    for sizes in ((5, 9, 3), (3, 7, 12), (6, 33, 2), (4, 17, 31)):
        inputs = make(*sizes)
        expected, results = function(*inputs), compiled(*inputs)
        douts = [torch.randn_like(out) for out in expected]
        expected_gradients = torch.autograd.grad(expected, inputs[:2], douts)
        gradients = torch.autograd.grad(results, inputs[:2], douts)
        for a, b in zip((*expected, *expected_gradients), (*results, *gradients), strict=True):
            torch.testing.assert_close(a, b)
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations


def test_compiled_dropout_and_mask():
    def function(words, mask):
        return entity_aware_attention(words, word_mask=mask, dropout_p=0.5, seed=torch.tensor([1, 2]))[0]

    words, mask = torch.randn(2, 9, 4, 2, 8), torch.rand(2, 9) < 0.5
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(words, mask), function(words, mask))


class _Module(torch.nn.Module):
    def forward(self, words, entities, word_mask):
        return entity_aware_attention(words, entities, word_mask=word_mask)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    batch, num_words, num_entities = (torch.export.Dim(name, min=2, max=4096) for name in ("B", "W", "E"))
    words, entities = torch.randn(2, 6, 4, 2, 8), torch.randn(2, 3, 4, 2, 8)
    program = torch.export.export(
        _Module(),
        (words, entities, torch.rand(2, 6) < 0.7),
        dynamic_shapes=({0: batch, 1: num_words}, {0: batch, 1: num_entities}, {0: batch, 1: num_words}),
        strict=strict,
    )
    inputs = torch.randn(3, 11, 4, 2, 8), torch.randn(3, 7, 4, 2, 8), torch.rand(3, 11) < 0.7
    for a, b in zip(program.module()(*inputs), _Module()(*inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_vmap_is_refused():
    words = torch.randn(3, 2, 4, 4, 2, 8)
    with pytest.raises(NotImplementedError, match=r"must not run under torch\.vmap"):
        torch.vmap(lambda w: entity_aware_attention(w)[0])(words)


def test_functional_gradient():
    words, entities = torch.randn(2, 5, 4, 2, 8), torch.randn(2, 3, 4, 2, 8)
    gradients = torch.func.grad(lambda w, e: entity_aware_attention(w, e)[0].sin().sum(), argnums=(0, 1))(
        words, entities
    )
    words.requires_grad_(), entities.requires_grad_()
    expected = torch.autograd.grad(entity_aware_attention(words, entities)[0].sin().sum(), (words, entities))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_activation_checkpointing_replays_the_dropout():
    words = torch.randn(2, 5, 4, 2, 8, requires_grad=True)

    def function(w):
        return entity_aware_attention(w, dropout_p=0.5)[0]

    gradients = []
    for call in (function, lambda w: torch.utils.checkpoint.checkpoint(function, w, use_reentrant=False)):
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(call(words).sin().sum(), words)[0])
    assert torch.equal(*gradients)


def test_lengths_beyond_the_buffer_read_nothing_outside():
    """Where values cannot be checked before (a GPU, a compiled graph), a wrong length must not be a wild access."""
    words = torch.randn(12, 4, 2, 8)
    offsets, lengths = torch.tensor([0, 6, 2**30], dtype=torch.int32), torch.tensor([6, 2**30, 5], dtype=torch.int32)
    out, _ = torch.ops.luke_kernels.attention_forward(
        words, None, offsets, lengths, None, None, 100, 0, False, 0.3, 0.0, None, "cpu"
    )
    cut, _ = torch.ops.luke_kernels.attention_forward(
        words, None, offsets[:2], torch.tensor([6, 6]).int(), None, None, 100, 0, False, 0.3, 0.0, None, "cpu"
    )
    assert torch.equal(out, cut)
