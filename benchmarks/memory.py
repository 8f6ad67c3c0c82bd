"""The memory benchmark: what a call of the model takes, from short sequences to long ones."""

from collections.abc import Sequence

import torch

from benchmarks import encoders, model
from benchmarks.batches import Batch
from benchmarks.measure import Record

OP = "memory"
# Four sequences, that what they take stands out of what the process allocates by the way; a fourth as many entities.
CPU_BATCHES = ("4x64x16", "4x128x32", "4x256x64", "4x512x128")
GPU_BATCHES = ("16x64x16", "16x128x32", "16x256x64", "16x512x128")
DEVICE_BATCHES = {"cpu": CPU_BATCHES, "cuda": GPU_BATCHES}
CONTENDERS = (encoders.TRANSFORMERS, encoders.PACKED)
# Of the times, which are by the way.
REPEATS = 1


def run_case(
    batch: Batch, size: str, dtype: torch.dtype, directions: Sequence[str], peak_tflops: float, run: Record
) -> list[Record]:
    """Gate and measure transformers' model and ours on one batch, as `model.run_case` does."""

    def choose(*arguments) -> list[encoders.Contender]:
        return [each for each in encoders.contenders(*arguments) if each.name in CONTENDERS]

    found = model.run_case(batch, size, dtype, directions, REPEATS, peak_tflops, run, choose)
    return [record | {"op": OP} for record in found]
