"""Peak memory at 4096 words and 1024 entities: far from the scores of all pairs."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch, luke_kernels
from pathlib import Path

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(2)
heads, dim, words, entities = 12, 64, 4096, 1024
w = torch.randn(1, words, 4, heads, dim, requires_grad=True)
e = torch.randn(1, entities, 4, heads, dim, requires_grad=True)
douts = torch.randn(1, words, heads, dim), torch.randn(1, entities, heads, dim)
output_bytes = sum(d.nbytes for d in douts)

def step():
    outs = luke_kernels.entity_aware_attention(w, e, backend=sys.argv[1])
    return torch.autograd.grad(outs, (w, e), douts)

step()
Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts from the memory in use
before = status("VmRSS")
step()
print((status("VmHWM") - before) / output_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
def test_peak_growth_of_a_second_step(backend, tmp_path):
    # Elsewhere than the source tree, which must not shadow the installed package.
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    growth = float(result.stdout)
    print(f"{backend}: {growth:.1f} x the output")
    # The gradient alone is 4 times the output, less what pages of before serve again; scores of all pairs would be 80.
    # Of both backends 7 on most machines; 12 were seen, since the allocator keeps what it pleases.
    assert 3.5 < growth < 20
