"""Small, quick cases for pytest-benchmark: `pytest benchmarks --benchmark-only`, `--benchmark-compare` with before.

They show what became slower on one machine; what is claimed comes from `python -m benchmarks`, which judges first.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from benchmarks import batches, cases, contenders, encoders
from luke_kernels import LukeTokenizer
from luke_kernels.tokenizer import BUNDLED

CPU = torch.device("cpu")
# Tiny: what is measured is what surrounds the products.
SIZE, BATCH = "tiny", "4x32x8-ragged"
ATTENTION = "2x128x16-ragged"
TEXT = "Ada Lovelace worked with Charles Babbage on the Analytical Engine. "


TRAINED = (encoders.ACCELERATED, encoders.OURS, encoders.PACKED)


@pytest.mark.parametrize(
    ("name", "direction"),
    [(name, direction) for name in TRAINED for direction in cases.DIRECTIONS] + [(encoders.OPTIMIZED, "forward")],
)
def test_model(benchmark, name, direction):
    config = encoders.config_of(SIZE)
    batch = batches.load(BATCH, config, CPU)
    model = encoders.draw_model(config, torch.float32, CPU)
    chosen = {each.name: each for each in encoders.contenders(model, batch, encoders.draw_douts(batch, model))}
    chosen[name].prepare(direction)
    benchmark(chosen[name].run, direction)


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
def test_attention(benchmark, direction):
    inputs = contenders.draw_inputs(cases.parse(ATTENTION), torch.float32, CPU)
    benchmark(contenders.prepare_ours(inputs, backend="auto").run, direction)


def test_tokenizer(benchmark):
    tokenizer = LukeTokenizer.from_pretrained(BUNDLED)
    benchmark(tokenizer, [TEXT * 8] * 8, entity_spans=[[(0, 12), (25, 40)]] * 8)
