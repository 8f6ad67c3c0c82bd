"""The CUDA kernels without a GPU: parts, all of them in each order of warps and copies, what nvcc made of them."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_emulator
import cuda_kernels
import pytest
import torch
from attention_cases import Case, assert_as_exact_as_eager, run, with_gradients

from luke_kernels import entity_aware_attention
from luke_kernels.ops import backends

_C = pytest.importorskip("luke_kernels._C", reason="luke_kernels._C is not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIBRARY = Path(_C.__file__)
# Bytes where the compiler, of one source for all, leaves some.
SMALL_STACK = {
    **{(chip, "Forward", dtype, 64): 56 for chip in ("sm_100", "sm_120") for dtype in ("bfloat16", "float16")},
    ("sm_120", "KeyGradient", "float32", 128): 24,
}
# Of each dtype, head_dim and with dropout or without.
KERNELS = len(cuda_kernels.KERNELS) * len(DTYPES) * 3 * 2
BUILT = pytest.mark.skipif(not hasattr(_C, "cuda_architectures"), reason="luke_kernels._C was built without CUDA")
# What registers there are is the affair of the compiler: other versions may keep a few in memory.
NVCC = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout if shutil.which("nvcc") else ""
OF_NVCC_13 = pytest.mark.skipif("release 13.0" not in NVCC, reason="the page and the limits are of nvcc 13.0")
DUMPED = pytest.mark.skipif(cuda_kernels.cuobjdump() is None, reason="neither cuobjdump nor triton is installed")


@pytest.fixture
def emulated(monkeypatch):
    cuda_emulator.emulate(monkeypatch)


@pytest.fixture(scope="module")
def unit_tests(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("c++ is not installed")
    program = tmp_path_factory.mktemp("cuda") / "test_cuda"
    cuda_kernels.build_unit_tests(program)
    return program


def test_parts(unit_tests):
    done = subprocess.run([unit_tests], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all passed\n"), done.stderr


@pytest.mark.parametrize("kernels", ["", "warpgroups"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_order_of_warps_and_copies(dtype, head_dim, kernels, emulated, monkeypatch):
    """A barrier or a wait that is missing shows where the first or the last warp runs ahead, or copies land late."""
    if kernels and dtype == torch.float32:
        pytest.skip("the same kernels")
    case = Case(130, 70, "ragged", head_dim)
    for options in ({}, *([{"dropout_p": 0.1, "seed": torch.tensor([1, 2])}] if head_dim == 64 else [])):
        results = []
        for order in ("first late", "last late", "first at once", "last at once"):
            monkeypatch.setenv("LUKE_EMULATOR_ORDER", f"{order} {kernels}")
            results.append(run(case, dtype, "cuda", **options))
        if not options:
            assert_as_exact_as_eager(results[0], case, dtype)
        for found in results[1:]:
            assert all(torch.equal(found[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("kernels", ["", "warpgroups"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("options", [{"dropout_p": 0.25}, {"scale": -0.2, "dropout_p": 0.25}, {"scale": 0.0}], ids=str)
def test_dropout_and_scale(options, head_dim, dtype, kernels, emulated, monkeypatch):
    if kernels and dtype == torch.float32:
        pytest.skip("the same kernels")
    monkeypatch.setenv("LUKE_EMULATOR_ORDER", kernels)
    case, options = Case(70, 21, "ragged", head_dim), {"seed": torch.tensor([1, 2]), "dropout_p": 0.0} | options

    def reference(words, entities):
        return entity_aware_attention(words, entities, **case.masks(), backend="reference", **options)

    inputs = case.inputs(dtype)
    against = with_gradients(reference, [t.double() for t in inputs]), with_gradients(reference, inputs)
    assert_as_exact_as_eager(run(case, dtype, "cuda", **options), case, dtype, pooled=True, against=against)


def test_torch_compile_asks_once_whether_a_gpu_will_do(monkeypatch):
    monkeypatch.setattr(backends, "_core", cuda_emulator.core())
    monkeypatch.setattr(backends, "_CUDA_DEVICES", set())
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + (backends._device_missing(0) is None), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 1
    assert 0 in backends._CUDA_DEVICES
    monkeypatch.setattr(backends, "_core", SimpleNamespace(cuda_missing=lambda index: f"no GPU {index}"))
    assert backends._device_missing(1) == "no GPU 1"
    assert backends._device_missing(0) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 20, 33, 100])
def test_head_dims_that_are_no_whole_chunks(dtype, head_dim, emulated):
    case = Case(40, 9, "ragged", head_dim)
    assert_as_exact_as_eager(run(case, dtype, "cuda"), case, dtype)


def test_addresses_that_are_not_aligned(emulated):
    words, entities = torch.randn(2, 9, 4, 2, 32), torch.randn(2, 5, 4, 2, 32)
    expected = entity_aware_attention(words, entities, backend="cuda")
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (words, entities)]
    assert all(t.data_ptr() % 16 for t in shifted)
    assert all(map(torch.equal, entity_aware_attention(*shifted, backend="cuda"), expected))


def test_too_large_heads_are_refused(emulated):
    with pytest.raises(NotImplementedError, match="takes head_dim up to 128, got 136"):
        entity_aware_attention(torch.zeros(1, 2, 4, 1, 136), backend="cuda")


@BUILT
@DUMPED
@OF_NVCC_13
def test_registers_and_stack():
    """No kernel keeps a register in memory, but where SMALL_STACK says how much."""
    found = cuda_kernels.usages(LIBRARY)
    built = {each.removesuffix("+PTX") for each in _C.cuda_architectures().split(", ")}
    assert set(found) == built
    for chip, kernels in found.items():
        assert len(kernels) == KERNELS
        allowed = {kernel: SMALL_STACK.get((chip, *kernel[:3]), 0) for kernel in kernels}
        assert {kernel: use.stack for kernel, use in kernels.items() if use.stack > allowed[kernel]} == {}


def test_shared_memory_fits_every_chip(unit_tests):
    asked = cuda_kernels.launches(unit_tests)
    assert len(asked) == KERNELS * 5 // 3  # those of warpgroups too, of halves
    assert max(shared for _, shared in asked.values()) <= cuda_kernels.SMALLEST_SHARED_BYTES


@BUILT
@DUMPED
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_instructions(architecture):
    """Halves meet in tensor cores, on Hopper by warpgroups; float32 does not. Tiles come by asynchronous copies."""
    if architecture not in _C.cuda_architectures():
        pytest.skip(f"not built for {architecture}")
    found = cuda_kernels.instructions(LIBRARY, architecture)
    assert len(found) == KERNELS
    for kernel, counts in found.items():
        assert {"HMMA", "HGMMA"} & counts.keys() == {kernel.products()} - {"FFMA"}, kernel
        assert {"LDGSTS", "FFMA"} < counts.keys(), kernel
        assert ("LDSM" in counts) == (kernel.dtype != "float32"), kernel


@BUILT
@DUMPED
@OF_NVCC_13
def test_page_is_not_stale(unit_tests):
    found = cuda_kernels.usages(LIBRARY)
    if set(found) != set(cuda_kernels.CHIPS):
        pytest.skip(f"built for {_C.cuda_architectures()}")
    assert cuda_kernels.PAGE.read_text() == cuda_kernels.page(found, cuda_kernels.launches(unit_tests))


# (file, text, what replaces it): each makes results wrong, or the emulator stop.
BROKEN = {
    "nothing": ("tiles.h", "", ""),
    "swizzle": ("tiles.h", "row / kRowsPerLine % kPanelChunks", "row / kRowsPerLine % 2"),
    "fragment of the right factor": ("tiles.h", "2 * k + lane() / 8 % 2", "2 * k + lane() / 16 % 2"),
    "fragment of the left factor": ("tiles.h", "16 * m + lane() % 16", "16 * m + (lane() + 8) % 16"),
    "transposed fragment": ("tiles.h", "n + lane() / 16)", "n + lane() / 8 % 2)"),
    "switch of the segment": ("forward.h", "if (kind == kEntity && start == 0)", "if (kind == kEntity && start > 0)"),
    "tail of a segment": ("forward.h", "if constexpr (kTail)", "if constexpr (kTail && kN > 4)"),
    "slots of dQ": ("backward.h", "(kind)));\n        clear", "(1 - kind)));\n        clear"),
    "query of dK": ("backward.h", "op.query_slot(kind) * q.slot_stride", "op.query_slot(row_kind) * q.slot_stride"),
    "barrier of the stream": ("stream.h", "    synchronize();\n", ""),
    "fence of copies": ("stream.h", "if constexpr (kWarpgroups) fence_copies();", ""),
    "descriptor": ("tiles.h", "8 * kLineBytes / 16", "8 * kLineBytes / 8"),
    "wait of the stream": ("stream.h", "    wait_copies<0>();\n", ""),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels_are_caught(name, tmp_path):
    file, text, replacement = BROKEN[name]
    for folder in ("csrc", "tests/cpp"):
        shutil.copytree(cuda_emulator.REPOSITORY / folder, tmp_path / folder)
    source = tmp_path / "csrc/cuda" / file
    assert text in source.read_text()
    source.write_text(source.read_text().replace(text, replacement))
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import pytest, torch, cuda_emulator
from attention_cases import Case, assert_as_exact_as_eager, run
from pathlib import Path
from types import SimpleNamespace
pybind11 = __import__("pybind11")
path = cuda_emulator.build(Path({str(tmp_path)!r}), ["c++", f"-I{{pybind11.get_include()}}"])
cuda_emulator.emulate(pytest.MonkeyPatch(), cuda_emulator.load(path))
case = Case(150, 70, "ragged", 64)
for order in ("", "warpgroups"):
    os.environ["LUKE_EMULATOR_ORDER"] = order
    assert_as_exact_as_eager(run(case, torch.bfloat16, "cuda"), case, torch.bfloat16)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if name == "nothing":
        assert done.returncode == 0, done.stderr
    else:
        assert "AssertionError" in done.stderr or "emulator: " in done.stderr, done.stderr
