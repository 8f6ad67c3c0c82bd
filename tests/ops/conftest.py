import cuda_emulator
import pytest

from luke_kernels.ops import backends


@pytest.fixture(autouse=True)
def _tiles_of_the_interpreter(request, monkeypatch):
    """Tiles of 64 x 64, the fastest in the interpreter. test_triton.py runs small ones."""
    if backends.INTERPRETING and "triton" in request.node.nodeid:
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "TAIL": 64, "num_warps": 4, "num_stages": 2}
        monkeypatch.setattr("luke_kernels.ops.backends.triton.config", lambda *key: tile)


@pytest.fixture(autouse=True)
def _emulator(request, monkeypatch):
    if "cuda-emulated" in request.node.nodeid:
        cuda_emulator.emulate(monkeypatch)
    if "hopper" in request.node.nodeid:
        monkeypatch.setenv("LUKE_EMULATOR_ORDER", "warpgroups")


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def isa(request):
    """Each instruction set that this machine has, one after the other."""
    core = pytest.importorskip("luke_kernels._C", reason="luke_kernels._C is not built")
    before = core.cpu_isa()
    core.set_cpu_isa(request.param)
    found = core.cpu_isa()
    if found == request.param:
        yield request.param
    core.set_cpu_isa(before)
    if found != request.param:
        pytest.skip(f"this machine or build has no {request.param}")
