"""How much memory a call takes."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_memory_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return by how much memory grows at most during a call, its results included.

    On a GPU what torch's allocator holds; on Linux the resident set of the process (pages, so small calls come out as
    0 or some hundred KiB; buffers that a library keeps between calls count as there before); elsewhere None.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # Free memory that malloc kept would be reused without growth.
        ctypes.CDLL(None).malloc_trim(0)
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM (man 5 proc)
    except (OSError, AttributeError, TypeError):  # not Linux
        return None
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
