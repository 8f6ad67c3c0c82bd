"""The attention benchmark: a gate on correctness, then times of those who passed it."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import records, timing
from benchmarks.cases import Case
from benchmarks.contenders import ENTITY_AWARE, Contender, Inputs, Prepared, contenders, draw_inputs, prepare_ours

Record = dict[str, Any]
# Scores of the float64 reference: 128 MiB on the CPU, 1 GiB on a GPU. Beyond, the gate looks at the last heads only.
GATE_SCORES = {"cpu": 2**24, "cuda": 2**27}


class Gate:
    """The truth (float64) of a case, and how far the reference formula run in the input dtype is from it."""

    def __init__(self, inputs: Inputs):
        case, dtype = inputs.case, inputs.words.dtype
        scores = len(case.lengths) * (case.num_words + case.num_entities) ** 2
        self.present = inputs.present
        self.num_heads = min(case.num_heads, max(1, GATE_SCORES[inputs.words.device.type] // scores))
        exact = inputs.part(self.num_heads, torch.float64)
        reference = partial(prepare_ours, backend="reference")
        self.truth = self._quantities(reference(exact), "both")
        self.eager_error = self.errors(reference(inputs.part(self.num_heads, dtype)), "both")
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        largest_value = max(t[:, :, 3].abs().max() for t in (exact.words, exact.entities) if t.numel())
        product = torch.finfo(accumulator).eps * (exact.dout.abs().max() * largest_value).item()
        self.bound = {
            name: (2 if name == "out" else 3) * self.eager_error[name] + _rounding(value.to(dtype)) + product
            for name, value in self.truth.items()
        }

    def errors(self, prepared: Prepared, direction: str) -> dict[str, float]:
        """Return the largest absolute error of out and of each gradient, NaN where one is."""
        return {
            name: (value.double() - self.truth[name]).abs().max().item()
            for name, value in self._quantities(prepared, direction).items()
        }

    def passes(self, errors: dict[str, float]) -> bool:
        return all(error <= self.bound[name] for name, error in errors.items())

    def _quantities(self, prepared: Prepared, direction: str) -> dict[str, Tensor]:
        """Return out and the gradients at real tokens and checked heads."""
        outs, gradients = prepared.run(direction)
        found = {"out": torch.cat(list(outs), dim=1)}
        if direction == "both":
            assert prepared.unpack is not None
            names = ("dq_to_words", "dq_to_entities", "dk", "dv")
            found |= zip(names, prepared.unpack(*gradients).unbind(2), strict=True)
        return {name: value[self.present][:, -self.num_heads :] for name, value in found.items()}


def _rounding(value: Tensor) -> float:
    return 2 * ((value + 0.3) - 0.3 - value).abs().max().item()


def run_case(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    directions: Iterable[str],
    repeats: int,
    peak_tflops: float,
    run: Record,
    choose: Callable[[Inputs], Sequence[Contender]] = contenders,
) -> list[Record]:
    """Gate and time all contenders of one case.

    Args:
        peak_tflops: `timing.measure_peak` of the same run.
        run: What all records of a run share, from `records.describe_run`.

    Returns:
        A record a contender and direction. `gate` is "pass"; "none" where another thing is computed on purpose;
        "wrong" or "failed" (with its message), both without a time.
    """
    inputs = draw_inputs(case, dtype, device)
    gate = Gate(inputs)
    found = []
    for direction in directions:
        rows = {}
        calls = {}
        for contender in choose(inputs):
            row = rows[contender.name] = records.blank() | run
            row |= {"op": contender.op, "contender": contender.name, "backend": contender.backend}
            row |= {"direction": direction, "case": case.name, "shape": case.shape}
            row |= {"dtype": str(dtype).removeprefix("torch."), "matmul_peak_tflops": peak_tflops}
            try:
                prepared = contender.prepare(inputs)
                row |= _judge(gate, contender, prepared, direction)
                if row["gate"] != "wrong":
                    call = partial(prepared.run, direction)
                    call()
                    row["peak_memory_bytes"] = timing.peak_memory_bytes(call, device)
                    calls[contender.name] = call
            except timing.failures() as error:
                row |= {"gate": "failed", "message": timing.described(error)}
        samples, failed = timing.interleave(calls, repeats, device)
        for name, message in failed.items():
            rows[name] |= {"gate": "failed", "message": message, "peak_memory_bytes": None}
        for name, times in samples.items():
            row = rows[name] | timing.quantiles(times)
            row["tflops"] = case.flops(direction) / row["median_ms"] / 1e9
            row |= {"repeats": repeats, "fraction_of_peak": row["tflops"] / peak_tflops}
            rows[name] = row
        found += rows.values()
    return found


def _judge(gate: Gate, contender: Contender, prepared: Prepared, direction: str) -> Record:
    if contender.op != ENTITY_AWARE:
        return {"gate": "none"}
    errors = gate.errors(prepared, direction)
    return {
        "gate": "pass" if gate.passes(errors) else "wrong",
        "gate_heads": gate.num_heads,
        # JSON knows no NaN.
        "error": {name: error if error == error else None for name, error in errors.items()},
        "eager_error": {name: gate.eager_error[name] for name in errors},
    }


def summary(record: Record) -> str:
    """Return a record as a line for people."""
    head = f"{record['case']:<18} {record['dtype']:<9} {record['direction']:<8} {record['contender']:<22}"
    if record["median_ms"] is None:
        return f"{head} {record['gate']} {record['message'] or record['error']}"
    return (
        f"{head} {record['median_ms']:>10.3f} ms ({record['p20_ms']:.3f} to {record['p80_ms']:.3f}) "
        f"{record['tflops']:.3f} TFLOP/s, {record['fraction_of_peak']:.0%} of matmul"
    )
