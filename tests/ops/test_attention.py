"""The op against float64, on every backend: the numbers, the layouts, what NaN reaches."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from attention_cases import (
    BACKENDS,
    BATCH,
    HEADS,
    INTERPRETED,
    PATTERNS,
    SIZES,
    Case,
    assert_as_exact_as_eager,
    run,
    with_gradients,
)

import luke_kernels
from luke_kernels import entity_aware_attention, entity_aware_attention_varlen

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = {
    "reference": (F64, F32, BF16, F16),
    "sdpa": (F64, F32, BF16, F16),
    "cpu": (F64, F32, BF16),
    "triton": (F32, F16),
    "cuda": (F32, BF16, F16),
}


def _run(backend: str, dtype: torch.dtype, device: str = "cpu"):
    marks = [INTERPRETED] if backend == "triton" and device == "cpu" else []
    if device == "cuda":
        marks.append(pytest.mark.gpu)
    where = "-cuda" if device == "cuda" else "-emulated" if backend == "cuda" else ""
    return pytest.param(backend, dtype, id=f"{backend}{where}-{str(dtype).removeprefix('torch.')}", marks=marks)


RUNS = [_run(backend, dtype) for backend, dtypes in DTYPES.items() for dtype in dtypes]
RUNS += [pytest.param("cuda", dtype, id=f"cuda-emulated-hopper-{dtype}") for dtype in (BF16, F16)]
RUNS += [_run(backend, dtype, "cuda") for backend in ("sdpa", "triton", "cuda") for dtype in (F32, BF16, F16)]


# Triton's interpreter is the slowest room by far: what float32 or another head_dim covers too is left to `slow`.
RUNS_BY_HEAD_DIM = [
    pytest.param(
        *run.values, head_dim, marks=[*run.marks, *([pytest.mark.slow] if slow else [])], id=f"{run.id}-{head_dim}"
    )
    for run in RUNS
    for head_dim in (32, 64, 80)
    for slow in [run.id == "triton-float16" and head_dim != 80]
]


@pytest.mark.parametrize(("backend", "dtype", "head_dim"), RUNS_BY_HEAD_DIM)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_error_against_float64(backend, dtype, head_dim, pattern, size):
    case = Case(*size, pattern, head_dim)
    assert_as_exact_as_eager(run(case, dtype, backend), case, dtype)


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize("pattern", ["none", "empty"])
def test_stack_of_three(backend, dtype, pattern):
    case = Case(63, 17, pattern, stack=3)
    assert_as_exact_as_eager(run(case, dtype, backend), case, dtype)


# Not float64: the truth itself is computed in it.
@pytest.mark.parametrize(("backend", "dtype"), [run for run in RUNS if run.values[1] != F64])
def test_big_scores(backend, dtype):
    # The merge of sdpa weighs outputs by float32 log-sum-exps: its error grows with the scores. It gets smaller ones.
    case = Case(70, 9, "ragged", magnitude=100.0 if dtype == F16 or backend == "sdpa" else 3000.0)
    assert_as_exact_as_eager(run(case, dtype, backend), case, dtype, merges=backend == "sdpa")


@pytest.mark.parametrize(("backend", "dtype"), [run for run in RUNS if run.values[1] != F64])
@pytest.mark.parametrize("sign", [1, -1])
def test_absent_keys_stay_out_of_far_off_scores(backend, dtype, sign):
    """An absent key, which scores 0, would win the softmax, or overflow in the backward."""
    case = Case(70, 9, "ragged", far_off=sign)
    assert_as_exact_as_eager(run(case, dtype, backend), case, dtype, merges=backend == "sdpa")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_entities(backend):
    words = torch.randn(2, 5, 4, 2, 16, requires_grad=True)
    out, none = entity_aware_attention(words, backend=backend)
    expected, empty = entity_aware_attention(words, words.new_empty(2, 0, 4, 2, 16), backend=backend)
    assert none is None
    assert empty.shape == (2, 0, 2, 16)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert torch.isfinite(words.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_output_alone(backend):
    words, entities, dout, _ = Case(9, 4).inputs(F32)
    words.requires_grad_(), entities.requires_grad_()
    out_words, out_entities = entity_aware_attention(words, entities, backend=backend)
    alone = torch.autograd.grad(out_words, (words, entities), dout, retain_graph=True)
    zero = torch.zeros_like(out_entities)
    both = torch.autograd.grad((out_words, out_entities), (words, entities), (dout, zero), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))
    (only_entities,) = torch.autograd.grad(out_entities.sum(), entities)
    assert only_entities.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_padded(backend):
    case = Case(63, 17, "ragged")
    lengths = case.masks()
    words, entities, *douts = case.inputs(F32)
    kept = [
        torch.cat([t[b, :n] for b, n in enumerate(ns)])
        for t, ns in zip(
            (words, entities, *douts), [lengths["word_lengths"], lengths["entity_lengths"]] * 2, strict=True
        )
    ]
    packed = luke_kernels.PackedLengths.from_lengths(
        lengths["word_lengths"].tolist(), lengths["entity_lengths"].tolist()
    )
    packed = packed.to(words.device)
    w, e = kept[0].requires_grad_(), kept[1].requires_grad_()
    outs = entity_aware_attention_varlen(
        w, e, packed.cu_words, packed.cu_entities, packed.max_words, packed.max_entities, backend=backend
    )
    gradients = torch.autograd.grad(outs, (w, e), kept[2:])
    padded = run(case, F32, backend)
    word_exists, entity_exists = case.exists()
    assert torch.equal(outs[0], padded["out_words"][word_exists])
    assert torch.equal(outs[1], padded["out_entities"][entity_exists])
    for slot in range(4):
        assert torch.equal(gradients[0][:, slot], padded[f"dwords[{slot}]"][word_exists])
        assert torch.equal(gradients[1][:, slot], padded[f"dentities[{slot}]"][entity_exists])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_empty_batches(backend, packed):
    if packed:
        cu = torch.zeros(1, dtype=torch.int32)
        words = torch.empty(0, 4, 2, 16)
        outs = entity_aware_attention_varlen(words, words, cu, cu, 0, 0, backend=backend)
        assert outs[0].shape == outs[1].shape == (0, 2, 16)
    for shape in ((0, 5), (2, 0)):
        words = torch.empty(*shape, 4, 2, 16)
        outs = entity_aware_attention(words, words, backend=backend)
        assert outs[0].shape == outs[1].shape == (*shape, 2, 16)


def _strided(tensor: torch.Tensor, how: str) -> torch.Tensor:
    if how == "heads first":
        return tensor.transpose(1, 3).contiguous().transpose(1, 3)
    if how == "gap":
        return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-2).flatten(-3, -2)[..., ::2, :]
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1)[..., 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["heads first", "gap", "no unit stride"])
def test_strides(backend, how):
    case = Case(33, 7, "ragged")
    inputs = case.inputs(F32)
    expected = run(case, F32, backend)
    strided = [_strided(t, how) for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    results = with_gradients(
        lambda w, e: entity_aware_attention(_strided(w, how), _strided(e, how), **case.masks(), backend=backend),
        inputs[:2] + strided[2:],
    )
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bitwise_equal(backend):
    case = Case(130, 33, "ragged")
    first, second = (run(case, F32, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", ["ragged", "holes", "left", "empty"])
def test_nan_in_pads_reaches_nothing(backend, pattern):
    case = Case(20, 6, pattern)
    word_exists, entity_exists = case.exists()
    words, entities, *douts = case.inputs(F32)
    words[~word_exists], entities[~entity_exists] = torch.nan, torch.nan
    results = with_gradients(
        lambda w, e: entity_aware_attention(w, e, **case.masks(), backend=backend), [words, entities, *douts]
    )
    expected = run(case, F32, backend)
    for name, value in expected.items():
        assert torch.equal(results[name], value), name
        absent = ~(word_exists if "words" in name else entity_exists)
        assert not results[name][absent].any(), f"{name}: rows of absent tokens must be zero"


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, within Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_sequence_stays_in_it(backend):
    case = Case(20, 6, "ragged")
    words, entities, *douts = case.inputs(F32)
    words[0, 3] = torch.nan
    results = with_gradients(
        lambda w, e: entity_aware_attention(w, e, **case.masks(), backend=backend), [words, entities, *douts]
    )
    expected = run(case, F32, backend)
    for name, value in expected.items():
        assert torch.equal(results[name][1:], value[1:]), name
    assert results["out_words"][0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend):
    words, entities = torch.randn(2, 5, 4, 2, 16), torch.randn(2, 3, 4, 2, 16)
    scaled_words, scaled_entities = words.clone(), entities.clone()
    scaled_words[:, :, :2] *= 2 * 16**0.5
    scaled_entities[:, :, :2] *= 2 * 16**0.5
    for a, b in zip(
        entity_aware_attention(words, entities, scale=2.0, backend=backend),
        entity_aware_attention(scaled_words, scaled_entities, backend=backend),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_writing_into_an_output_is_never_silent(backend):
    """The backward reads the output: a gradient computed from one that was overwritten would be wrong."""
    words, entities = torch.randn(2, 5, 4, 2, 16, requires_grad=True), torch.randn(2, 3, 4, 2, 16)
    out_words, _ = entity_aware_attention(words, entities, backend=backend)
    with pytest.raises(RuntimeError, match="inplace"):
        out_words.mul_(2).sum().backward()
    with torch.no_grad():
        out_words, out_entities = entity_aware_attention(words, entities, backend=backend)
        expected = out_entities.clone()
        out_words.zero_()
    assert torch.equal(out_entities, expected)


@pytest.mark.parametrize("backend", ["sdpa", "cpu"])
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(data=st.data())
def test_any_ragged_batch(backend, data):
    """Lengths, buffers larger than what the sequences cover, head sizes: against the reference in float64."""
    batch, heads, head_dim = (data.draw(st.integers(1, n)) for n in (4, 3, 70))
    stack = data.draw(st.sampled_from([3, 4]))
    sizes = [data.draw(st.integers(0, n)) for n in (150, 70)]
    lengths = [
        torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=batch, max_size=batch))).int() for n in sizes
    ]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    inputs = [torch.randn(batch, n, stack, heads, head_dim, dtype=F64) for n in sizes]
    inputs += [torch.randn(batch, n, heads, head_dim, dtype=F64) for n in sizes]
    options = {"word_lengths": lengths[0], "entity_lengths": lengths[1]}
    if data.draw(st.booleans()):
        options |= {"dropout_p": 0.3, "seed": torch.tensor([5, 6])}
    expected, results = (
        with_gradients(lambda w, e, name=name: entity_aware_attention(w, e, **options, backend=name), inputs)
        for name in ("reference", backend)
    )
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=1e-11, atol=1e-11)


def test_autocast():
    words, entities = torch.randn(2, 5, 4, 2, 16), torch.randn(2, 3, 4, 2, 16)
    with torch.autocast("cpu", dtype=BF16):
        out_words, out_entities = entity_aware_attention(words, entities)
        assert out_words.dtype == out_entities.dtype == BF16
        assert entity_aware_attention(words.double(), entities.double())[0].dtype == F64
    assert torch.equal(out_words, entity_aware_attention(words.bfloat16(), entities.bfloat16())[0])


def test_stack_projections():
    tensors = [torch.randn(3, 5, 2, 16) for _ in range(4)]
    assert torch.equal(luke_kernels.stack_projections(*tensors)[:, :, 2], tensors[2])
    with pytest.raises(ValueError, match=r"key must have the shape .* got \(3, 4, 2, 16\)"):
        luke_kernels.stack_projections(tensors[0], tensors[1], tensors[2][:, :4], tensors[3])


def test_masks_and_lengths_agree():
    case = Case(20, 6, "ragged")
    word_exists, entity_exists = case.exists()
    words, entities, *_ = case.inputs(F32)
    by_lengths = entity_aware_attention(words, entities, **case.masks())
    as_int64 = entity_aware_attention(words, entities, **{name: n.long() for name, n in case.masks().items()})
    assert all(torch.equal(a, b) for a, b in zip(by_lengths, as_int64, strict=True))
    for dtype in (torch.bool, torch.int64, torch.uint8):
        by_mask = entity_aware_attention(
            words, entities, word_mask=word_exists.to(dtype), entity_mask=entity_exists.to(dtype)
        )
        assert all(torch.equal(a, b) for a, b in zip(by_lengths, by_mask, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_query_serves_its_own_pair_of_kinds(backend):
    """Slot 0 scores words, slot 1 entities: with keys of one kind alone, the other slot must not matter."""
    words, entities, *_ = Case(6, 4).inputs(F32)
    for slot, lengths in ((0, "entity_lengths"), (1, "word_lengths")):
        # Rows of the kind that stays see keys of their own kind only.
        options = {lengths: torch.zeros(BATCH, dtype=torch.int32), "backend": backend}
        expected = entity_aware_attention(words, entities, **options)
        changed = [words.clone(), entities.clone()]
        for stack in changed:
            stack[:, :, 1 - slot] += 1
        assert all(
            torch.equal(a, b) for a, b in zip(expected, entity_aware_attention(*changed, **options), strict=True)
        )
        for stack in changed:
            stack[:, :, slot] += torch.randn_like(stack[:, :, slot])
        assert not torch.allclose(expected[slot], entity_aware_attention(*changed, **options)[slot])
    # And each of the four matters to the rows of its own kind only.
    expected = entity_aware_attention(words, entities, backend=backend)
    for kind, slot in itertools.product((0, 1), (0, 1)):
        changed = [words.clone(), entities.clone()]
        changed[kind][:, :, slot] += torch.randn_like(changed[kind][:, :, slot])
        results = entity_aware_attention(*changed, backend=backend)
        assert not torch.allclose(results[kind], expected[kind])
        assert torch.equal(results[1 - kind], expected[1 - kind])
    assert expected[0].shape == (BATCH, 6, HEADS, 32)


@pytest.mark.filterwarnings("ignore:overflow|invalid:RuntimeWarning")  # numpy's, within Triton's interpreter
# Not sdpa: torch's flash kernel for the CPU says that the log-sum-exp of such a row is 0.
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "sdpa" and getattr(b, "id", None) != "sdpa-cuda"])
def test_scores_of_minus_infinity(backend):
    """A whole first block of keys may score -inf by overflow; the row lives on the others."""
    words, entities = torch.zeros(1, 70, 4, 1, 16), torch.randn(1, 3, 4, 1, 16)
    words[:, :, 0], words[:, :, 2], words[:, :, 1] = 1e3, -1e38, 1.0
    entities[:, :, 0] = 1e3
    outs = entity_aware_attention(words, entities, backend=backend)
    expected = entity_aware_attention(words, entities, backend="reference")
    for out, value in zip(outs, expected, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(out, value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_the_backward_alone(backend):
    case = Case(20, 6)
    words, entities, *douts = case.inputs(F32)
    words.requires_grad_(), entities.requires_grad_()
    outs = entity_aware_attention(words, entities, backend=backend)
    plain = torch.autograd.grad(outs, (words, entities), douts, retain_graph=True)
    with torch.autocast(words.device.type, dtype=BF16):
        inside = torch.autograd.grad(outs, (words, entities), douts)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
