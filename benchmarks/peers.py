"""Transformers' LUKE as others run it on the CPU: compiled, or exported, for the shape of the batch. Forward only."""

import copy
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks import encoders
from benchmarks.batches import Batch
from benchmarks.encoders import Contender

COMPILED = "transformers-compiled"
ONNXRUNTIME = "onnxruntime"
OPENVINO = "openvino"
# What each needs beside torch and transformers.
PACKAGES = {ONNXRUNTIME: ("onnxruntime", "onnx", "onnxscript"), OPENVINO: ("openvino",)}

Run = Callable[[], Sequence[Tensor]]


class Compiled(Contender):
    """The model under torch.compile with inductor, for this shape alone."""

    directions = ("forward",)

    def prepare(self, direction: str) -> None:
        super().prepare(direction)
        # Drops what was compiled for the cases before: each has its shape, and dynamo gives up after eight.
        torch._dynamo.reset()
        with _quiet():
            self.run(direction)

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self.model, dynamic=False)

    def _states(self) -> Sequence[Tensor]:
        output = self._compiled(**self.inputs)
        return output.last_hidden_state, output.entity_last_hidden_state


@dataclass(frozen=True, eq=False)
class Exported:
    """A model that another runtime runs: `export` takes it and its padded inputs, and returns what runs it on them."""

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]
    export: Callable[["Positional", dict[str, Tensor], torch.dtype], Run]
    directions: ClassVar[Sequence[str]] = ("forward",)
    # Another runtime's approximations: OpenVINO's error in float32 is 2.5 times eager's.
    slack: ClassVar[int] = 2

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {}

    def prepare(self, direction: str) -> None:
        assert direction in self.directions
        _ = self._run

    def run(self, direction: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return self._run(), ()

    @cached_property
    def _run(self) -> Run:
        dtype = next(self.model.parameters()).dtype
        # Narrow weights are exported in float32, which loses nothing: OpenVINO narrows them again; ONNX Runtime has no
        # narrow kernels for the CPU and computes in float32.
        wide = self.model if dtype.itemsize >= 4 else copy.deepcopy(self.model).float()
        with _quiet(), torch.no_grad():
            return self.export(Positional(wide.eval(), list(self.inputs)), self.inputs, dtype)


class Positional(nn.Module):
    """A model whose inputs and outputs have places, as graphs have."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(**dict(zip(self.names, inputs, strict=True)))
        return output.last_hidden_state, output.entity_last_hidden_state


def export_onnxruntime(model: Positional, inputs: dict[str, Tensor], dtype: torch.dtype) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, tuple(inputs.values()), path, dynamo=True, external_data=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    feed = dict(zip(names, (value.numpy() for value in inputs.values()), strict=True))
    return lambda: [torch.from_numpy(value) for value in session.run(None, feed)]


def export_openvino(model: Positional, inputs: dict[str, Tensor], dtype: torch.dtype) -> Run:
    import openvino

    values = tuple(inputs.values())
    graph = openvino.convert_model(model, example_input=values, input=[list(value.shape) for value in values])
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, "f32"),
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.Core().compile_model(graph, "CPU", settings).create_infer_request()
    feed = [value.numpy() for value in values]

    def run() -> Sequence[Tensor]:
        # Its outputs are overwritten by the next call.
        found = request.infer(feed, share_inputs=True, share_outputs=True)
        return [torch.from_numpy(found[place]) for place in range(2)]

    return run


def missing(name: str) -> list[str]:
    """Return the packages that a peer needs and that are not installed."""
    return [package for package in PACKAGES.get(name, ()) if importlib.util.find_spec(package) is None]


def contenders(model: nn.Module, batch: Batch, douts: Sequence[Tensor]) -> list[Contender | Exported]:
    """Return who competes with `model` on the CPU: transformers' own, the peers whose packages are here, then ours."""
    theirs, *ours = encoders.contenders(model, batch, douts)
    chosen: list[Contender | Exported] = [theirs, Compiled(COMPILED, model, theirs.inputs, theirs.douts)]
    for name, export in ((ONNXRUNTIME, export_onnxruntime), (OPENVINO, export_openvino)):
        if not missing(name):
            chosen.append(Exported(name, model, batch.padded, export))
    return [*chosen, *ours]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters from telling of their own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
