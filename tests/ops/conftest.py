import pytest

from luke_kernels.ops import backends


@pytest.fixture(autouse=True)
def _tiles_of_the_interpreter(request, monkeypatch):
    """Tiles of 64 x 64, the fastest in the interpreter. test_triton.py runs small ones."""
    if backends.INTERPRETING and "triton" in request.node.nodeid:
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
        monkeypatch.setattr("luke_kernels.ops.backends.triton.config", lambda kernel, dtype, block_d: tile)
