"""The attention benchmark: a gate on correctness, then times of those who passed it."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import measure, records, timing
from benchmarks.cases import Case
from benchmarks.contenders import ENTITY_AWARE, Contender, Inputs, Prepared, contenders, draw_inputs, prepare_ours
from benchmarks.measure import Record

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
            name: (2 if name == "out" else 3) * self.eager_error[name] + measure.rounding(value.to(dtype)) + product
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
        A record a contender and direction, as `measure.compete` makes them.
    """
    inputs = draw_inputs(case, dtype, device)
    gate = Gate(inputs)
    found = []
    for direction in directions:
        shared = records.blank() | run | {"direction": direction, "case": case.name, "shape": case.shape}
        shared["dtype"] = str(dtype).removeprefix("torch.")
        entrants = []
        for contender in choose(inputs):
            own = {"op": contender.op, "contender": contender.name, "backend": contender.backend}
            entrants.append(measure.Entrant(shared | own, partial(_enter, gate, contender, inputs, direction)))
        found += measure.compete(entrants, case.flops(direction), repeats, peak_tflops, device)
    return found


def _enter(gate: Gate, contender: Contender, inputs: Inputs, direction: str) -> tuple[Record, timing.Call]:
    prepared = contender.prepare(inputs)
    call = partial(prepared.run, direction)
    if contender.op != ENTITY_AWARE:
        return {"gate": "none"}, call
    errors = gate.errors(prepared, direction)
    verdict = {
        "gate": "pass" if gate.passes(errors) else "wrong",
        "gate_heads": gate.num_heads,
        "error": measure.without_nan(errors),
        "eager_error": {name: gate.eager_error[name] for name in errors},
    }
    return verdict, call
