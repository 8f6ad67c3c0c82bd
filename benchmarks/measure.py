"""What every suite does with a case: judge the contenders, then time those that passed, in turns."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import energy, timing

Record = dict[str, Any]
_FMA = "multiply and add"
# Calls that take so long are not run once more before they are measured: the gate's has warmed them up.
LONG_S = 5


@dataclass(frozen=True)
class Entrant:
    """The record of a contender so far; `enter` returns what the gate adds to it, and the call to time."""

    record: Record
    enter: Callable[[], tuple[Record, timing.Call]]


def compete(
    entrants: Sequence[Entrant], flops: float, repeats: int, peak_tflops: float, device: torch.device
) -> list[Record]:
    """Judge and time the contenders of a case in one direction.

    Args:
        flops: What the case costs.
        repeats: Timed calls of each, at most: `timing.plan_rounds`.
        peak_tflops: `timing.measure_peak` of the same run.

    Returns:
        A record a contender. `gate` is "pass"; "none" where another thing is computed on purpose; "wrong" or "failed"
        (with its message), both without a time. `fraction_of_peak` is of `fma_peak_tflops`, timed in the same turns,
        where our CPU kernels are built and the device is a CPU; else of the matmul.
    """
    rows, calls, operations, round_s = {}, {}, None, 0.0
    for entrant in entrants:
        row = entrant.record | {"matmul_peak_tflops": peak_tflops}
        rows[row["contender"]] = row
        try:
            begin = time.perf_counter()
            verdict, call = entrant.enter()
            entered_s = time.perf_counter() - begin
            row |= verdict
            if row["gate"] != "wrong":
                if entered_s < LONG_S:
                    call()
                begin = time.perf_counter()
                row["peak_memory_bytes"] = timing.peak_memory_bytes(call, device)
                round_s += time.perf_counter() - begin
                calls[row["contender"]] = call
        except timing.failures() as error:
            row |= {"gate": "failed", "message": timing.described(error)}
    if device.type == "cpu" and entrants:
        operations = timing.multiply_adds(getattr(torch, entrants[0].record["dtype"]))
    warm_up, repeats = timing.plan_rounds(round_s, repeats)
    calls |= {_FMA: operations.call} if operations else {}
    samples, failed = timing.interleave(calls, repeats, device, warm_up)
    fma_ms, _ = samples.pop(_FMA, None), failed.pop(_FMA, None)
    fma_peak_tflops = operations.count / timing.quantiles(fma_ms)["median_ms"] / 1e9 if operations and fma_ms else None
    for name, message in failed.items():
        rows[name] |= {"gate": "failed", "message": message, "peak_memory_bytes": None}
    for name, times in samples.items():
        rows[name] |= timing.quantiles(times) | {"repeats": repeats}
        rows[name]["tflops"] = flops / rows[name]["median_ms"] / 1e9
        rows[name]["fma_peak_tflops"] = fma_peak_tflops
        rows[name]["fraction_of_peak"] = rows[name]["tflops"] / (fma_peak_tflops or peak_tflops)
        rows[name]["joules"] = energy.joules(calls[name]) if device.type == "cpu" else None
    return list(rows.values())


def without_nan(errors: dict[str, float]) -> dict[str, float | None]:
    """Return errors as JSON can hold them."""
    return {name: error if error == error else None for name, error in errors.items()}


def rounding(value: torch.Tensor) -> float:
    """Return the floor below which an error in the dtype of `value` says nothing."""
    return 2 * ((value + 0.3) - 0.3 - value).abs().max().item()


def summary(record: Record) -> str:
    """Return a record as a line for people."""
    head = f"{record['case']:<18} {record['dtype']:<9} {record['direction']:<8} {record['contender']:<22}"
    if record["median_ms"] is None:
        return f"{head} {record['gate']} {record['message'] or record['error']}"
    times = f"{head} {record['median_ms']:>10.3f} ms ({record['p20_ms']:.3f} to {record['p80_ms']:.3f})"
    if record["tflops"] is None:
        return f"{times} {record['tokens_per_s']:,.0f} tokens/s"
    peak = "matmul" if record["fma_peak_tflops"] is None else "FMA"
    return f"{times} {record['tflops']:.3f} TFLOP/s, {record['fraction_of_peak']:.0%} of {peak}"
