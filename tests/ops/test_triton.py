"""The Triton backend: what its tiles, buffers and compilers could get wrong. Without a GPU, in the interpreter."""

import contextlib
import itertools
import json
import mmap
import os
import subprocess
import sys
import time
import timeit
from pathlib import Path

import pytest
import torch
from attention_cases import rounding_floor

pytest.importorskip("triton", reason="triton is not installed")

import compile_triton
import triton
import triton.language as tl

from luke_kernels import entity_aware_attention
from luke_kernels.ops import backends, dropout, reference
from luke_kernels.ops.backends import triton as backend
from luke_kernels.ops.layout import Layout

DEVICE = torch.device("cpu" if backends.INTERPRETING else "cuda")
pytestmark = [] if backends.INTERPRETING else [pytest.mark.gpu]
# Lengths that cross tiles of 16, fill them, leave one over; sequences without words, entities, tokens.
WORDS, ENTITIES = (33, 16, 0, 1, 0), (17, 0, 16, 3, 0)
SEED = (2**40 + 12345, -5)

_reason = backends.reason_against("triton", DEVICE, torch.float32, 64)
runs_here = pytest.mark.skipif(_reason is not None, reason=f"the triton backend cannot run here: {_reason}")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    return use_tiles(monkeypatch, 16, 16)


def use_tiles(monkeypatch, block_m, block_n):
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "TAIL": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(backend, "config", lambda *key: tile)


def packed(words, entities):
    """Return the layout of sequences that lie one after the other."""
    offsets = [torch.tensor([0, *lengths[:-1]]).cumsum(0) for lengths in (words, entities)]
    tensors = (offsets[0], torch.tensor(words), offsets[1], torch.tensor(entities))
    return Layout(*(t.to(DEVICE, torch.int32) for t in tensors), len(words), max(words), max(entities), True)


def padded(words, entities, pitch_w, pitch_e):
    """Return the layout of right-padded sequences."""
    word_lengths, entity_lengths = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in (words, entities))
    return Layout(None, word_lengths, None, entity_lengths, len(words), pitch_w, pitch_e, False)


def draw(num_words, num_entities, stack=4, heads=2, head_dim=16, generator_seed=0):
    """Return words, entities, dout_words, dout_entities in float64."""
    generator = torch.Generator().manual_seed(generator_seed)
    shapes = [(t, *rest) for rest in ((stack, heads, head_dim), (heads, head_dim)) for t in (num_words, num_entities)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE) for shape in shapes]


def run(module, tensors, dtype, layout, scale=0.25, dropout_p=0.0, seed=SEED):
    """Return out, lse, dwords, dentities."""
    words, entities, dout_words, dout_entities = (t.to(dtype) for t in tensors)
    options = (layout, scale, dropout_p, torch.tensor(seed, device=DEVICE) if dropout_p else None)
    assert torch.empty(1, device=DEVICE).isnan()  # A row that no kernel writes shows.
    out, lse = module.forward(words, entities, *options)
    return out, lse, *module.backward(dout_words, dout_entities, out, lse, words, entities, *options)


def check(tensors, dtype, layout, **options):
    """Hold the backend to the error of the reference in the same dtype, both against float64."""
    tensors = [t.to(dtype).double() for t in tensors]
    exact = run(reference, tensors, torch.float64, layout, **options)
    same_dtype = run(reference, tensors, dtype, layout, **options)
    got = run(backend, tensors, dtype, layout, **options)
    names, factors = ("out", "lse", "dwords", "dentities"), (2, 2, 3, 3)
    # A float32 log-sum-exp in base 2 is rounded once more, and holds probabilities, so gradients, to its own rounding.
    lse_rounding = torch.finfo(torch.float32).eps / 2 * exact[1].abs().amax().item()
    for name, factor, ours, theirs, true in zip(names, factors, got, same_dtype, exact, strict=True):
        assert ours.dtype == (torch.float32 if name == "lse" else dtype)
        error, allowed = ((t - true).abs().amax().item() if t.numel() else 0 for t in (ours, theirs))
        allowed = factor * allowed + rounding_floor(true, ours.dtype, tensors[2:], [t[:, -1] for t in tensors[:2]])
        if name != "out" and true.numel():
            allowed += lse_rounding * (1 if name == "lse" else true.abs().amax().item())
        # Not `error > allowed`: a NaN must fail.
        assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"
    return got


def assert_bitwise_equal(first, second):
    for name, a, b in zip(("out", "lse", "dwords", "dentities"), first, second, strict=True):
        assert torch.equal(a, b), name


@runs_here
@pytest.mark.parametrize(
    ("dtype", "stack", "head_dim", "tiles"),
    [
        (torch.float32, 4, 16, (16, 16)),
        (torch.float16, 4, 20, (16, 32)),
        (torch.float32, 3, 5, (32, 16)),
        (torch.float16, 3, 32, (16, 16)),
    ],
)
def test_tails_and_boundaries_of_segments(monkeypatch, dtype, stack, head_dim, tiles):
    use_tiles(monkeypatch, *tiles)
    check(draw(sum(WORDS), sum(ENTITIES), stack, head_dim=head_dim), dtype, packed(WORDS, ENTITIES))


@runs_here
def test_every_slot_is_written():
    """The query towards a kind that a sequence has not gets zero, in buffers that start as NaN."""
    layout = packed((20, 0), (0, 3))
    *_, dwords, dentities = check(draw(20, 3), torch.float32, layout)
    assert (dwords[:, 1] == 0).all()
    assert (dentities[:, 0] == 0).all()


@runs_here
@pytest.mark.parametrize("tiles", [(16, 16), (32, 16)])
def test_dropout_is_the_references_in_any_tile(monkeypatch, tiles):
    use_tiles(monkeypatch, *tiles)
    tensors = draw(sum(WORDS[:3]), sum(ENTITIES[:3]))
    check(tensors, torch.float32, packed(WORDS[:3], ENTITIES[:3]), dropout_p=0.3)


@triton.jit
def kept_kernel(
    mask, seed, threshold, ROWS_ARE_ENTITIES: tl.constexpr, COLUMNS_ARE_ENTITIES: tl.constexpr, N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Write the mask of program (block of columns, head, sequence), (2 N, N), as the kernels draw it."""
    draws = backend._draws(seed, tl.program_id(2), tl.program_id(1), tl.num_programs(1), threshold, True)
    offs, start_n = tl.arange(0, N), tl.program_id(0) * N
    row, column = offs[:, None], start_n + offs[None, :]
    if TRANSPOSED:
        kept = backend._kept_transposed(draws, offs, ROWS_ARE_ENTITIES, start_n, COLUMNS_ARE_ENTITIES, N, N)
        row, column = offs[None, :], start_n + offs[:, None]
    else:
        kept = backend._kept(draws, offs, offs >= N - N * ROWS_ARE_ENTITIES, start_n, COLUMNS_ARE_ENTITIES, N, N)
    mask += (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 2 * N * N
    tl.store(mask + row * 2 * N + column, kept.to(tl.int8))


@runs_here
@pytest.mark.parametrize("dropout_p", [0.1, 0.75, 0.0])
@pytest.mark.parametrize("seed", [SEED, (0, 0), (-1, 2**63 - 1)])
def test_draws_are_those_of_the_rule(seed, dropout_p):
    seed = torch.tensor(seed, device=DEVICE)
    for row, column, transposed in itertools.product((False, True), repeat=3):
        mask = torch.empty(3, 2, 16, 32, dtype=torch.int8, device=DEVICE)
        threshold = dropout.threshold(dropout_p)
        kept_kernel[2, 2, 3](mask, seed, threshold, row, column, 16, transposed, enable_fp_fusion=True)
        assert torch.equal(mask.bool(), dropout.keep_mask(seed, dropout_p, range(3), 2, 16, range(32), row, column))


@runs_here
@pytest.mark.parametrize("scale", [-0.25, 0.0])
def test_scale_of_any_sign(scale):
    check(draw(20, 5), torch.float32, packed((20,), (5,)), scale=scale)


@runs_here
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_absent_keys_stay_out_of_far_off_scores(sign, dtype):
    """Scores near +-200: an absent key, which scores 0, would win the softmax or overflow."""
    words, entities, *douts = draw(18, 3)
    for stack in (words, entities):
        stack[:, :2] = 5 + stack[:, :2] / 16
        stack[:, 2] = sign * (10 + stack[:, 2] / 16)
    check((words, entities, *douts), dtype, packed((18,), (3,)))


@runs_here
def test_pads_and_strides_change_nothing():
    """NaN in pads reaches nothing, rows in no sequence come out as zero, and any strides give the same bits."""
    words, entities = (18, 3, 0), (0, 2, 4)
    layout = padded(words, entities, 20, 17)
    tensors = draw(60, 51)
    present = [
        (torch.arange(pitch) < torch.tensor(lengths)[:, None]).flatten().to(DEVICE)
        for pitch, lengths in ((20, words), (17, entities))
    ] * 2
    for tensor, exists in zip(tensors, present, strict=True):
        tensor[~exists] = 0
    clean = run(backend, tensors, torch.float32, layout)
    for tensor, exists in zip(tensors, present, strict=True):
        tensor[~exists] = torch.nan
    # Same values, heads outermost: strides of another order, on top of gaps between the rows.
    strided = [torch.stack([t, t], dim=-2).transpose(0, -3).contiguous().transpose(0, -3)[..., 0, :] for t in tensors]
    assert all(t.stride() != s.stride() for t, s in zip(tensors, strided, strict=True))
    assert_bitwise_equal(run(backend, tensors, torch.float32, layout), clean)
    assert_bitwise_equal(run(backend, strided, torch.float32, layout), clean)
    out, lse, dwords, dentities = clean
    absent = ~torch.cat(present[:2])
    assert (lse[:, absent] == torch.inf).all()
    for zero in (out[absent], dwords[~present[0]], dentities[~present[1]]):
        assert (zero == 0).all()


@runs_here
def test_lengths_are_kept_inside_the_buffers():
    """Lengths on a GPU are not checked: too large ones must not reach past the buffers or the grid."""
    layout = packed((5, 18), (2, 3))
    beyond = layout._replace(word_lengths=layout.word_lengths + layout.word_lengths.new_tensor([0, 1000]))
    beyond = beyond._replace(entity_lengths=layout.entity_lengths + layout.entity_lengths.new_tensor([0, 1000]))
    tensors = draw(23, 5)
    assert_bitwise_equal(run(backend, tensors, torch.float32, beyond), run(backend, tensors, torch.float32, layout))


@runs_here
def test_lengths_are_cut_to_the_longest_there_is():
    """Inside the buffer, but longer than a sequence may be: no further than the reference reads."""
    layout = padded((18, 3), (2, 4), 20, 5)
    beyond = padded((27, 23), (7, 9), 20, 5)
    tensors = draw(40, 10)
    full = run(backend, tensors, torch.float32, layout._replace(word_lengths=None, entity_lengths=None))
    assert_bitwise_equal(run(backend, tensors, torch.float32, beyond), full)
    check(tensors, torch.float32, beyond)


@runs_here
def test_slots_far_from_each_other():
    """Three slots are more than 2^31 elements; of the memory between them none is touched."""
    slot, tensors = 3 * 2**28, [t.half() for t in draw(20, 7)]
    size = 3 * slot + 27 * 32
    if DEVICE.type == "cpu":
        memory = torch.frombuffer(mmap.mmap(-1, 2 * size), dtype=torch.float16)  # takes what is written to, no more
    else:
        memory = torch.empty(size, dtype=torch.float16, device=DEVICE)
    far = [
        memory.as_strided(t.shape, (32, slot, 16, 1), place) for t, place in zip(tensors, (0, 20 * 32), strict=False)
    ]
    for place, stack in zip(far, tensors[:2], strict=True):
        place.copy_(stack)
    expected = run(backend, tensors, torch.float16, packed((20,), (7,)))
    assert_bitwise_equal(run(backend, [*far, *tensors[2:]], torch.float16, packed((20,), (7,))), expected)


@triton.jit
def place_kernel(places, num_tokens, max_length):
    offset, length = backend._place(None, None, tl.program_id(0), num_tokens, max_length)
    tl.store(places + 2 * tl.program_id(0), offset)
    tl.store(places + 2 * tl.program_id(0) + 1, length)


@runs_here
def test_a_wrong_batch_size_does_not_come_round():
    """Of 5 sequences of 2^30 words, the buffer holds one and a bit; the fifth begins at 2^32."""
    places, pitch = torch.empty(5, 2, dtype=torch.int64, device=DEVICE), 2**30
    place_kernel[5,](places, pitch + 7, pitch, enable_fp_fusion=True)
    assert places.tolist() == [[b * pitch, length] for b, length in enumerate((pitch, 7, 0, 0, 0))]


@runs_here
def test_two_runs_are_bitwise_equal():
    tensors, layout = draw(35, 20), packed((30, 5), (0, 20))
    first, second = (run(backend, tensors, torch.float16, layout, dropout_p=0.2) for _ in range(2))
    assert_bitwise_equal(first, second)


# The installed one for the other chips is slow: they differ from these in sizes, and GPU machines have 3.6.
@pytest.mark.parametrize(
    ("which", "capability"),
    [
        *(("3.6", capability) for capability in compile_triton.CHIPS),
        *(
            pytest.param("installed", capability, marks=[] if capability in (80, 90) else pytest.mark.slow)
            for capability in compile_triton.CHIPS
        ),
    ],
)
def test_compiles_for_every_chip(which, capability):
    folder = os.environ.get("LUKE_KERNELS_TRITON36")
    if which == "3.6" and folder is None:
        pytest.skip("LUKE_KERNELS_TRITON36 names no folder that holds Triton 3.6")
    # The package that this process tests, which need not be the source tree.
    path = [*([folder] if which == "3.6" else []), str(Path(backends.__file__).parents[3])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, compile_triton.__file__, str(capability)]
    # All kinds for all chips under both would take a quarter of an hour.
    command += ["halves"] + (["dropout"] if capability in (80, 90) else [])
    command += ["float32"] if (which, capability) in (("installed", 80), ("3.6", 90)) else []
    script = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert script.returncode == 0, script.stdout + script.stderr
    records = [json.loads(line) for line in script.stdout.splitlines()]
    assert {(r["kernel"], r["sm"]) for r in records} == {
        (kernel, capability) for kernel in ("fwd", "bwd_dq", "bwd_dkdv")
    }
    version = triton.__version__ if which == "installed" else "3.6"
    assert all(r["triton"].startswith(version) for r in records)
    if which == "3.6":
        rows = compile_triton.PAGE.read_text().splitlines()
        rows = rows[rows.index(f"## sm_{capability}") :]
        stale = [r for r in records if r["head_dim"] != 80 and compile_triton.row(r) not in rows]
        assert not stale, "python tests/compile_triton.py --write under Triton 3.6.0"


class StubbedKernel:
    """What Triton compiles, and what it leaves behind, without a GPU: notes its launches."""

    def __init__(self, arg_names=("a", "b", "stride", "number", "SECOND", "FIRST")):
        self.arg_names, self.dispatched, self.direct = arg_names, [], []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.dispatched.append((grid, arguments)) or StubbedBinary(self)


class StubbedBinary:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.direct.append((grid, arguments))


@pytest.fixture
def stubbed(monkeypatch):
    """The launcher as on a GPU."""
    monkeypatch.setattr(backends, "INTERPRETING", False)
    monkeypatch.setattr(backend, "CompiledKernel", StubbedBinary)
    monkeypatch.setattr(backend, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())


@pytest.mark.skipif(not backends.INTERPRETING, reason="is about the CPU's share of a call")
def test_what_a_call_costs_before_it_is_launched(stubbed, monkeypatch):
    """43 us on a Zen 4, 99 on a Cascade Lake, 63 flattenings there; Triton's own dispatch alone takes twice as long."""
    kernel = StubbedKernel(backend.attention_fwd_kernel.arg_names)
    monkeypatch.setattr(backend, "attention_fwd_kernel", kernel)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # To fill 2 MB of output, as in all tests, takes longer than the call.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    words, entities = torch.empty(1, 512, 4, 16, 64), torch.empty(1, 64, 4, 16, 64)

    def call():
        entity_aware_attention(words, entities, backend="triton")

    call()

    def seconds(function, number):
        # Of this thread, whatever else runs here.
        return min(timeit.repeat(function, number=number, repeat=20, timer=time.thread_time)) / number

    # Machines differ, and are shared: told in another call of torch's.
    cost = seconds(call, 50) / seconds(lambda: words.flatten(0, 1), 500)
    assert (len(kernel.dispatched), len(kernel.direct)) == (1, 1000)
    assert cost < 110


def test_a_call_like_one_before_goes_past_the_dispatch(stubbed):
    """And only such a call: what Triton specialises on must be the same, pointers aligned, numbers of 32 bits."""
    tensor, kernel, constants = torch.empty(64), StubbedKernel(), {"FIRST": 1, "SECOND": 2, "num_warps": 4}
    dispatched, direct = kernel.dispatched, kernel.direct
    for programs, number in ((3, 0.5), (4, 0.25)):
        backend._launch(kernel, programs, (tensor, None), (16,), (number,), constants)
    assert len(dispatched) == 1
    assert direct == [((4, 1, 1), (tensor.data_ptr(), None, 16, 0.25, 2, 1))]
    for tensors, strides, number, others in (
        ((tensor, tensor), (16,), 0.5, {}),
        ((tensor, tensor.double()), (16,), 0.5, {}),
        ((tensor, None), (1,), 0.5, {}),
        ((tensor, None), (16,), 0.5, {"FIRST": 5}),
    ):
        backend._launch(kernel, 3, tensors, strides, (number,), constants | others)
    assert (len(dispatched), len(direct)) == (5, 1)
    for tensors, number in (((tensor[1:], None), 0.5), ((tensor, None), 2**31)):
        for _ in range(2):
            backend._launch(kernel, 3, tensors, (16,), (number,), constants)
    assert (len(dispatched), len(direct)) == (9, 1)
