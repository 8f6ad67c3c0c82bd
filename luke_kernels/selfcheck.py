"""A quick check of backends against the reference, in float64, on a small ragged batch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luke_kernels.ops import entity_aware_attention
from luke_kernels.ops.backends import reason_against

HEADS, HEAD_DIM = 2, 32
SIZES = 150, 9  # words and entities of the longer sequences
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Check:
    """Largest errors of a backend and of the reference in the same dtype, against the reference in float64."""

    backend: str
    dtype: torch.dtype
    error: float
    reference_error: float
    seconds: float

    @property
    def passed(self) -> bool:
        # A NaN must not pass.
        return self.error <= 3 * self.reference_error + 1e-6


def check_backend(
    backend: str,
    device: torch.device | str = "cpu",
    dtypes: Sequence[torch.dtype] = DTYPES,
    head_dim: int = HEAD_DIM,
    dropout_p: float = 0.0,
    sizes: tuple[int, int] = SIZES,
) -> list[Check]:
    """Run forward and backward in each dtype that the backend takes there."""
    checks = []
    for dtype in dtypes:
        if reason_against(backend, torch.device(device), dtype, head_dim) is not None:
            continue
        inputs = [t.to(device, dtype) for t in _inputs(sizes, head_dim)]
        truth = _outputs_and_gradients("reference", [t.double() for t in inputs], dropout_p)
        reference = _outputs_and_gradients("reference", inputs, dropout_p)
        start = time.perf_counter()
        results = _outputs_and_gradients(backend, inputs, dropout_p)
        seconds = time.perf_counter() - start
        checks.append(Check(backend, dtype, _distance(results, truth), _distance(reference, truth), seconds))
    return checks


def _inputs(sizes: tuple[int, int], head_dim: int) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = [(2, size, *stack) for stack in ((4,), ()) for size in sizes]
    return [torch.randn(*shape, HEADS, head_dim, generator=generator, device="cpu") for shape in shapes]


def _outputs_and_gradients(backend: str, inputs: list[Tensor], dropout_p: float) -> list[Tensor]:
    words, entities, *douts = inputs
    words, entities = words.detach().requires_grad_(), entities.detach().requires_grad_()
    long_words, long_entities = words.shape[1], entities.shape[1]
    word_lengths = torch.tensor([long_words, long_words // 4], dtype=torch.int32, device=words.device)
    entity_lengths = torch.tensor([long_entities // 2, long_entities], dtype=torch.int32, device=words.device)
    out_words, out_entities = entity_aware_attention(
        words,
        entities,
        word_lengths=word_lengths,
        entity_lengths=entity_lengths,
        dropout_p=dropout_p,
        seed=torch.zeros(2, dtype=torch.int64, device=words.device) if dropout_p else None,
        backend=backend,
    )
    assert out_entities is not None
    outs = [out_words, out_entities]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, [words, entities], douts)]


def _distance(results: list[Tensor], truth: list[Tensor]) -> float:
    # Not Python's max, which loses a NaN.
    return torch.stack([(a.double() - b).abs().max() for a, b in zip(results, truth, strict=True)]).max().item()
