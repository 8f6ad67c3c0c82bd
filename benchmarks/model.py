"""The model benchmark: all of LUKE's encoder, a gate on correctness, then times of those who passed it."""

import copy
import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import encoders, measure, records, timing
from benchmarks.batches import Batch
from benchmarks.encoders import Contender
from benchmarks.measure import Record
from luke_kernels import PackedBatch

OP = "model"
# To compile and export takes more than a minute a case, and peers compute all padding.
CPU_BATCHES = ("1x64x8", "1x512x128", "8x128x32", "conll-32", "conll-spans-8")
# Real work, measured only if asked for: a call of a peer computes 12,000 to 19,000 padded tokens.
WORKLOADS = ("conll-spans-32", "wikipedia-32", "questions-32")
# Where training is measured only if asked for: it would take the most time by far, and `train` has it.
FORWARD_ONLY = ("1x512x128", "8x128x32", "conll-32", "conll-spans-8", *WORKLOADS)
# No data there; few, since the attention takes its share of the run.
GPU_BATCHES = ("1x64x8", "32x128x16-ragged", "16x512x32", "16x512x32-ragged")
DEVICE_BATCHES = {"cpu": CPU_BATCHES, "cuda": GPU_BATCHES}
STATES = ("words", "entities")
SMALLEST = torch.finfo(torch.float64).tiny
# Of base size, what the backward keeps in float64 is 4 MB a token.
GATE_TOKENS = 1024


class Gate:
    """The truth of a case, in float64, and how far transformers' module is from it in the dtype of its weights."""

    def __init__(self, truth: dict[str, Tensor], eager: Contender, batch: Batch, dtype: torch.dtype):
        self.truth, self.packed, self.eager = truth, batch.packed, eager
        self.eager_error = self.errors(eager, "forward" if truth.keys() == {*STATES} else "both")
        self.bound = {
            name: (2 if name in STATES else 3) * self.eager_error[name] + self._floor(name, dtype)
            for name in self.truth
        }

    def errors(self, contender: Contender, direction: str) -> dict[str, float]:
        """Return the size of the error of states and of the gradient of each parameter, NaN where one is."""
        found = named_results(contender, direction, self.packed)
        return {name: _size(name, value.double() - self.truth[name]) for name, value in found.items()}

    def judge(self, contender: Contender, direction: str) -> Record:
        """Return what a record says of a contender: the errors of the states and of the worst gradient."""
        if contender is self.eager:  # known already, and the slowest
            errors = {name: error for name, error in self.eager_error.items() if direction == "both" or name in STATES}
        else:
            errors = self.errors(contender, direction)
        # NaN is beyond every bound.
        slack = contender.slack
        beyond = [name for name, error in errors.items() if slack and not error <= slack * self.bound[name]]
        gradients = [name for name in errors if name not in STATES]
        gradients.sort(key=lambda name: (name in beyond, errors[name] / max(self.bound[name], SMALLEST)))
        told = [*STATES, *gradients[-1:]]
        return {
            "gate": "none" if slack is None else "wrong" if beyond else "pass",
            "message": f"beyond its bound: {', '.join(beyond)}"[:500] if beyond else None,
            "error": measure.without_nan({name: errors[name] for name in told}),
            "eager_error": {name: self.eager_error[name] for name in told},
        }

    def _floor(self, name: str, dtype: torch.dtype) -> float:
        """Return what rounding to the dtype costs."""
        if name in STATES:
            return measure.rounding(self.truth[name].to(dtype))
        # The gradient of a score is the difference of dout . v and dout . out, of which any flash attention rounds out;
        # the gradient of the values shows their size.
        shown = re.sub(r"\b\w*(query|key)\.", "value.", name)
        return torch.finfo(dtype).eps * max(_size(each, self.truth[each]) for each in {name, shown})


def named_results(contender: Contender, direction: str, packed: PackedBatch) -> dict[str, Tensor]:
    """Run a contender; return its states and gradients by name, those of tokens without padding."""
    states, gradients = contender.run(direction)
    found = dict(zip(STATES, states, strict=True)) | dict(zip(contender.parameters, gradients, strict=False))
    return {
        # No parameter has three dimensions.
        name: value if value.dim() < 3 else (packed.pack_words if "word" in name else packed.pack_entities)(value)
        for name, value in found.items()
    }


def _size(name: str, value: Tensor) -> float:
    """Return the largest number of states; of a gradient, a sum over all tokens, the norm: its largest is luck."""
    return (value.abs().max() if name in STATES else value.norm()).item()


def _truth(model: nn.Module, batch: Batch, douts: Sequence[Tensor], direction: str) -> dict[str, Tensor]:
    """Return the states that exist, (Tw, C) and (Te, C), and the gradients of the parameters.

    They are those of the same model with the same weights in float64, a part of the batch at a time: gradients add up.
    """
    exact = copy.deepcopy(model).double()
    dwords, dentities = douts[0].double().split(batch.word_lengths), douts[1].double().split(batch.entity_lengths)
    found: dict[str, list[Tensor]] = {name: [] for name in STATES}
    for rows, inputs in batch.parts(GATE_TOKENS):
        with torch.set_grad_enabled(direction == "both"):
            output = exact(**inputs)
            states = [output.last_hidden_state[inputs["attention_mask"].bool()]]
            if output.entity_last_hidden_state is not None:
                states.append(output.entity_last_hidden_state[inputs["entity_attention_mask"].bool()])
        for name, state in zip(STATES, states, strict=False):
            found[name].append(state.detach())
        if direction == "both":
            weights = [torch.cat(dwords[rows]), torch.cat(dentities[rows])][: len(states)]
            torch.autograd.backward(states, weights)
    truth = {name: torch.cat(parts) for name, parts in found.items()}
    if direction == "both":
        truth |= {name: parameter.grad for name, parameter in exact.named_parameters()}
    return truth


def run_case(
    batch: Batch,
    size: str,
    dtype: torch.dtype,
    directions: Sequence[str],
    repeats: int,
    peak_tflops: float,
    run: Record,
    choose: Callable[[nn.Module, Batch, Sequence[Tensor]], list[Contender]] = encoders.contenders,
) -> list[Record]:
    """Gate and time all contenders of one batch.

    Args:
        batch: Its tensors lie on the device to measure.
        size: A key of `encoders.SIZES`.
        peak_tflops: `timing.measure_peak` of the same run.
        run: What all records of a run share, from `records.describe_run`.
        choose: Returns the contenders, transformers' first.

    Returns:
        A record a contender and direction, as `measure.compete` makes them.
    """
    device = batch.packed.position_ids.device
    config = encoders.config_of(size)
    model = encoders.draw_model(config, dtype, device)
    douts = encoders.draw_douts(batch, model)
    chosen = choose(model, batch, douts)
    truth = _truth(chosen[0].model, batch, douts, "both" if "both" in directions else "forward")
    gate = Gate(truth, chosen[0], batch, dtype)
    flops = {direction: batch.flops(config, direction) for direction in directions}
    run = run | {"op": OP, "size": size, "dtype": str(dtype).removeprefix("torch.")}
    return compete(chosen, gate, batch, flops, repeats, peak_tflops, run)


def compete(
    chosen: Sequence[Contender],
    gate: Gate,
    batch: Batch,
    flops: dict[str, float],
    repeats: int,
    peak_tflops: float,
    run: Record,
) -> list[Record]:
    """Gate and time contenders in each direction of `flops`, which says what the batch costs."""
    device = batch.packed.position_ids.device
    shared = records.blank() | run | {"backend": "auto", "case": batch.name, "shape": batch.shape}
    found = []
    for direction, count in flops.items():
        entrants = []
        for contender in chosen:
            if direction not in contender.directions:
                continue
            row = shared | {"direction": direction, "contender": contender.name}
            entrants.append(measure.Entrant(row, partial(_enter, gate, contender, direction)))
        found += measure.compete(entrants, count, repeats, peak_tflops, device)
    for row in found:
        if row["median_ms"] is not None:
            row["tokens_per_s"] = batch.shape["real_tokens"] / row["median_ms"] * 1e3
            row["sequences_per_s"] = batch.shape["B"] / row["median_ms"] * 1e3
    return found


def _enter(gate: Gate, contender: Contender, direction: str) -> tuple[Record, timing.Call]:
    contender.prepare(direction)
    return gate.judge(contender, direction), partial(contender.run, direction)
