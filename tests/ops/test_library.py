"""The op as torch sees it: schema, fakes, autograd, compile, export, transforms."""

import functools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from attention_cases import INTERPRETED
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from luke_kernels import entity_aware_attention, entity_aware_attention_varlen

BACKENDS = ["reference", "sdpa", "cpu"]


def _arguments(backend: str, entities: bool, covers_rows: bool | None, dropout_p: float, dtype=torch.float32) -> tuple:
    """Return arguments of the op; `covers_rows` None: a regular batch, without offsets and lengths."""
    words = torch.randn(12, 4, 2, 8, dtype=dtype, requires_grad=True)
    offsets, lengths = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([5, 7 if covers_rows else 3]).int()
    other = torch.randn(6, 4, 2, 8, dtype=dtype, requires_grad=True) if entities else None
    places = (torch.tensor([0, 2]).int(), torch.tensor([2, 4]).int()) if entities else (None, None)
    seed = torch.tensor([1, 2]) if dropout_p else None
    if covers_rows is None:
        layout = None, None, None, None, 2, 6, 3 if entities else 0, True
    else:
        layout = offsets, lengths, *places, 2, 7, 4 if entities else 0, covers_rows
    return words, other, *layout, 0.3, dropout_p, seed, backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entities", [True, False])
@pytest.mark.parametrize("covers_rows", [True, False, None])
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


def _padded(words, entities, word_lengths, backend):
    return entity_aware_attention(words, entities, word_lengths=word_lengths, backend=backend)


def _dense(words, entities, backend):
    return entity_aware_attention(words, entities, backend=backend)


def _packed(words, entities, cu_words, cu_entities, backend):
    return entity_aware_attention_varlen(words, entities, cu_words, cu_entities, 64, 64, backend=backend)


def _padded_inputs(batch: int, words: int, entities: int) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(batch, words, 4, 2, 8, requires_grad=True),
        torch.randn(batch, entities, 4, 2, 8, requires_grad=True),
        torch.randint(1, words, (batch,), dtype=torch.int32),
    )


def _dense_inputs(batch: int, words: int, entities: int) -> tuple[torch.Tensor, ...]:
    return _padded_inputs(batch, words, entities)[:2]


def _packed_inputs(batch: int, words: int, entities: int) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(batch * words, 4, 2, 8, requires_grad=True),
        torch.randn(batch * entities, 4, 2, 8, requires_grad=True),
        torch.arange(0, batch * words + 1, words, dtype=torch.int32),
        torch.arange(0, batch * entities + 1, entities, dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("function", "make", "backend", "compiler"),
    [
        (_padded, _padded_inputs, "auto", "inductor"),
        (_padded, _padded_inputs, "sdpa", "aot_eager"),
        (_padded, _padded_inputs, "cpu", "aot_eager"),
        (_dense, _dense_inputs, "cpu", "aot_eager"),
        (_dense, _dense_inputs, "reference", "aot_eager"),
        (_packed, _packed_inputs, "cpu", "aot_eager"),
        pytest.param(_padded, _padded_inputs, "triton", "aot_eager", marks=INTERPRETED),
    ],
)
def test_compiles_whole_and_once(function, make, backend, compiler):
    torch._dynamo.reset()
    function = functools.partial(function, backend=backend)
    counter, compilations = CompileCounterWithBackend(compiler), 0
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
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, words, entities, word_mask=None):
        return entity_aware_attention(words, entities, word_mask=word_mask, backend=self.backend)


@pytest.mark.parametrize("backend", ["sdpa", "cpu"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("masked", [True, False])
def test_export(strict, backend, masked):
    batch, num_words, num_entities = (torch.export.Dim(name, min=2, max=4096) for name in ("B", "W", "E"))
    given = 3 if masked else 2
    words, entities = torch.randn(2, 6, 4, 2, 8), torch.randn(2, 3, 4, 2, 8)
    program = torch.export.export(
        _Module(backend),
        (words, entities, torch.rand(2, 6) < 0.7)[:given],
        dynamic_shapes=({0: batch, 1: num_words}, {0: batch, 1: num_entities}, {0: batch, 1: num_words})[:given],
        strict=strict,
    )
    inputs = (torch.randn(3, 11, 4, 2, 8), torch.randn(3, 7, 4, 2, 8), torch.rand(3, 11) < 0.7)[:given]
    for a, b in zip(program.module()(*inputs), _Module(backend)(*inputs), strict=True):
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


def test_jacrev_is_refused():
    words = torch.randn(1, 2, 4, 1, 4)
    with pytest.raises(NotImplementedError, match=r"must not run under torch\.vmap"):
        torch.func.jacrev(lambda w: entity_aware_attention(w)[0])(words)


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused(grad):
    """Also where no gradient is recorded, and the op itself would drop the tangent."""
    words = torch.randn(1, 2, 4, 1, 4)
    with forward_ad.dual_level(), torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match="jvp"):
        entity_aware_attention(forward_ad.make_dual(words, words))


def test_fake_tensors():
    words, lengths = torch.randn(2, 5, 4, 2, 8), torch.tensor([5, 2], dtype=torch.int32)
    with FakeTensorMode() as mode:
        out, _ = entity_aware_attention(mode.from_tensor(words), word_lengths=mode.from_tensor(lengths))
        dense, _ = entity_aware_attention(mode.from_tensor(words))
    assert out.shape == dense.shape == (2, 5, 2, 8)


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("triton", marks=INTERPRETED)])
def test_wrong_lengths_reach_into_nothing(backend):
    """Where values cannot be checked before (a GPU, a compiled graph), a wrong length is cut to its bounds."""
    words = torch.randn(12, 4, 2, 8)
    douts = torch.randn(12, 2, 8)

    def run(offsets: list[int], lengths: list[int]) -> tuple[torch.Tensor, ...]:
        places = torch.tensor(offsets, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
        arguments = words, None, *places, None, None, len(offsets), 6, 0, False, 0.3, 0.0, None, backend
        out, lse = torch.ops.luke_kernels.attention_forward(*arguments)
        return out, lse, *torch.ops.luke_kernels.attention_backward(douts, None, out, lse, *arguments)

    for a, b in zip(run([0, 6, 2**30], [7, 2**30, 5]), run([0, 6], [6, 6]), strict=True):
        assert torch.equal(a, b)


def test_rows_beyond_the_last_sequence_are_zero_where_unchecked():
    words, cu = torch.randn(10, 4, 2, 8, requires_grad=True), torch.tensor([0, 4, 8], dtype=torch.int32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda w, c: entity_aware_attention_varlen(w, None, c, None, 4, 0)[0], fullgraph=True, backend="aot_eager"
    )
    out = compiled(words, cu)
    (gradient,) = torch.autograd.grad(out.sum(), words)
    assert not out[8:].any()
    assert not gradient[8:].any()
    assert out[:8].isfinite().all()


def test_strided_statistics():
    """The backward takes out and lse of any strides."""
    arguments = _arguments("cpu", True, True, 0.0)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    out, lse = torch.ops.luke_kernels.attention_forward(*arguments)
    dout = torch.randn_like(out)
    strided = out.transpose(0, 2).contiguous().transpose(0, 2), lse.T.contiguous().T
    expected = torch.ops.luke_kernels.attention_backward(dout[:12], dout[12:], out, lse, *arguments)
    results = torch.ops.luke_kernels.attention_backward(dout[:12], dout[12:], *strided, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))
