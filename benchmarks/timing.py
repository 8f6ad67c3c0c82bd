"""Time, memory and the peak of the machine."""

import functools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luke_kernels import explain_backends
from luke_kernels.memory import peak_memory_bytes as peak_memory_bytes

Call = Callable[[], Any]
WARM_UP = 2
# No more than so many seconds go into the rounds of a case, but for the fewest that have a median.
ROUNDS_S = 60
FEWEST = 3
# Larger than any L2 so far (B200: 126 MB).
FLUSH_BYTES = 256 * 2**20
_PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
# A matmul this long shows the peak; where torch has no fast one (float16 on most CPUs), more would take minutes.
_PEAK_MS = 50
# About 3 ms, of up to 24 sums each.
_PEAK_ROUNDS = 1_000_000


def failures() -> tuple[type[BaseException], ...]:
    """Return what a contender may raise where it cannot run: torch's errors and, once imported, those of the others."""
    found: list[type[BaseException]] = [RuntimeError, ImportError]
    # Their errors are of no class but Exception.
    for name in ("triton.errors", "onnxruntime.capi.onnxruntime_pybind11_state", "openvino.frontend"):
        module = vars(sys.modules[name]) if name in sys.modules else {}
        found += [each for each in module.values() if isinstance(each, type) and issubclass(each, Exception)]
    return tuple(found)


def described(error: BaseException) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def plan_rounds(round_s: float, repeats: int) -> tuple[int, int]:
    """Return how many rounds to warm up and to time where one takes `round_s` seconds, every call having run before."""
    most = max(FEWEST, int(ROUNDS_S / round_s)) if round_s else repeats
    return 0 if round_s * FEWEST > ROUNDS_S else WARM_UP, min(repeats, most)


def interleave(
    calls: Mapping[str, Call], repeats: int, device: torch.device, warm_up: int = WARM_UP
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time calls in turns, each round beginning one call later, after `warm_up` rounds that do not count.

    Returns:
        Milliseconds of each call, `repeats` of them; and the message of each call that failed.
    """
    names = list(calls)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    stopwatches: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for turn in range(warm_up + repeats):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            if name in failed:
                continue
            try:
                stopwatch = _timed(calls[name], flush)
            except failures() as error:
                failed[name] = described(error)
                continue
            if turn >= warm_up:
                stopwatches[name].append(stopwatch)
    if flush is not None:
        torch.cuda.synchronize(device)
    return {name: [read() for read in stopwatches[name]] for name in names if name not in failed}, failed


def _timed(call: Call, flush: Tensor | None) -> Callable[[], float]:
    """Run a call and return what reads its milliseconds: on a GPU only after a sync, so that launches queue up."""
    if flush is None:
        begin = time.perf_counter()
        call()
        elapsed_ms = (time.perf_counter() - begin) * 1e3
        return lambda: elapsed_ms
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin_event.record()
    call()
    end_event.record()
    return lambda: begin_event.elapsed_time(end_event)


def quantiles(samples: list[float]) -> dict[str, float]:
    """Return median_ms, p20_ms and p80_ms."""
    values = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return dict(zip(("median_ms", "p20_ms", "p80_ms"), values.tolist(), strict=True))


def measure_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Return the TFLOP/s of torch's large square matmul, the fastest of a few runs.

    On a CPU that can be far below what its FMA units reach; hence the name of the field, `matmul_peak_tflops`.
    """
    size, fastest_ms = 256, 0.0
    while fastest_ms < _PEAK_MS and size < _PEAK_SIZE[device.type]:
        size *= 2
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        samples, failed = interleave({"matmul": functools.partial(torch.matmul, a, b)}, 5, device)
        if failed:
            raise RuntimeError(f"the matmul of the peak must run, got {failed['matmul']}")
        fastest_ms = min(samples["matmul"])
    return 2 * size**3 / fastest_ms / 1e9


class Operations(NamedTuple):
    call: Call
    count: int


def multiply_adds(dtype: torch.dtype) -> Operations | None:
    """Return a call of some milliseconds that multiplies and adds on all threads as our CPU kernels do, and only that.

    None where they are not built.
    """
    if explain_backends(torch.zeros(1, 1, 4, 1, 64, dtype=dtype))["cpu"] is not None:
        return None
    from luke_kernels import _C
    from luke_kernels.ops.backends.parameters import DTYPE_NAMES

    core_dtype = getattr(_C.DType, DTYPE_NAMES[dtype])
    call = functools.partial(_C.multiply_add_cpu, core_dtype, torch.get_num_threads(), _PEAK_ROUNDS)
    return Operations(call, call())
