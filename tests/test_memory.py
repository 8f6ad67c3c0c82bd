import pytest
import torch

from luke_kernels.memory import peak_memory_bytes


def test_an_allocation_is_seen():
    grown = peak_memory_bytes(lambda: torch.zeros(2**26, dtype=torch.uint8).add_(1), torch.device("cpu"))
    if grown is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 2**26 * 0.95 <= grown <= 2**26 * 1.2
