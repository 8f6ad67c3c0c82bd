"""Inputs of entity-aware attention, an independent eager formula, and the rule for errors."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import luke_kernels
from luke_kernels.ops import backends

SIZES = [(1, 1), (1, 0), (0, 1), (5, 3), (63, 17), (128, 0), (130, 33)]
PATTERNS = ["none", "ragged", "holes", "left", "empty"]
BATCH, HEADS = 3, 2


@dataclass(frozen=True)
class Case:
    """Sizes, which tokens exist, head_dim and the stack of projections."""

    words: int
    entities: int
    pattern: str = "none"
    head_dim: int = 32
    stack: int = 4
    magnitude: float = 1.0
    far_off: int = 0  # +1 or -1: all scores lie near +-280

    def masks(self) -> dict[str, Tensor]:
        """Return the keyword arguments that say which tokens exist, on the default device."""
        return {name: mask.to(torch.get_default_device()) for name, mask in self._masks().items()}

    def _masks(self) -> dict[str, Tensor]:
        if self.pattern == "none":
            return {}
        generator = torch.Generator("cpu").manual_seed(1)
        kinds = {"word": self.words, "entity": self.entities}
        if self.pattern in ("ragged", "empty"):
            lengths = {
                k: torch.randint(0, n + 1, (BATCH,), generator=generator, device="cpu") for k, n in kinds.items()
            }
            for kind, n in kinds.items():
                lengths[kind][0] = n
                if self.pattern == "empty":
                    lengths[kind][1] = 0
            return {f"{k}_lengths": v.int() for k, v in lengths.items()}
        if self.pattern == "holes":
            return {
                f"{k}_mask": torch.rand(BATCH, n, generator=generator, device="cpu") < 0.6 for k, n in kinds.items()
            }
        pads = {k: torch.randint(0, n + 1, (BATCH, 1), generator=generator, device="cpu") for k, n in kinds.items()}
        return {f"{k}_mask": torch.arange(n, device="cpu") >= pads[k] for k, n in kinds.items()}

    def exists(self) -> tuple[Tensor, Tensor]:
        masks = self.masks()
        result = []
        for kind, n in (("word", self.words), ("entity", self.entities)):
            if f"{kind}_mask" in masks:
                result.append(masks[f"{kind}_mask"])
            elif f"{kind}_lengths" in masks:
                result.append(torch.arange(n) < masks[f"{kind}_lengths"][:, None])
            else:
                result.append(torch.ones(BATCH, n, dtype=torch.bool))
        return result[0], result[1]

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Return words, entities and the gradients of both outputs, rounded to dtype, on the default device."""
        generator = torch.Generator("cpu").manual_seed(2)
        shapes = [
            (BATCH, self.words, self.stack, HEADS, self.head_dim),
            (BATCH, self.entities, self.stack, HEADS, self.head_dim),
            (BATCH, self.words, HEADS, self.head_dim),
            (BATCH, self.entities, HEADS, self.head_dim),
        ]
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes]
        for stack in tensors[:2]:
            stack[:, :, :-2] *= self.magnitude
            if self.far_off:
                stack[:, :, :-2] = 5 + stack[:, :, :-2] / 16
                stack[:, :, -2] = self.far_off * (10 + stack[:, :, -2] / 16)
        return [t.to(torch.get_default_device(), dtype) for t in tensors]


def eager(words: Tensor, entities: Tensor, word_exists: Tensor, entity_exists: Tensor) -> tuple[Tensor, Tensor]:
    """The four products of LUKE's own implementation, a mask of all pairs, one softmax."""

    def heads(stack: Tensor, slot: int) -> Tensor:
        return stack[:, :, slot].transpose(1, 2)

    exists = torch.cat([word_exists, entity_exists], dim=1)[:, None]
    keys = [heads(words, -2), heads(entities, -2)]
    rows = [torch.cat([heads(t, 0) @ keys[0].mT, heads(t, -3) @ keys[1].mT], dim=-1) for t in (words, entities)]
    scores = torch.cat(rows, dim=-2) * words.shape[-1] ** -0.5
    # A row of a token that is absent attends to all, so that no softmax is empty; its output is cut below.
    scores = scores.masked_fill(exists[:, :, :, None] & ~exists[:, :, None, :], -torch.inf)
    values = torch.cat([heads(words, -1), heads(entities, -1)], dim=-2)
    out = (scores.softmax(dim=-1) @ values) * exists[..., None]
    out_words, out_entities = out.transpose(1, 2).split([words.shape[1], entities.shape[1]], dim=1)
    return out_words, out_entities


def with_gradients(function, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Run function(words, entities) and its backward; return outputs, and gradients slot by slot."""
    words, entities, *douts = inputs
    words, entities = words.detach().requires_grad_(), entities.detach().requires_grad_()
    outs = function(words, entities)
    dwords, dentities = torch.autograd.grad(outs, (words, entities), douts)
    results = {"out_words": outs[0].detach(), "out_entities": outs[1].detach()}
    for kind, gradient in (("words", dwords), ("entities", dentities)):
        for slot in range(gradient.shape[2]):
            results[f"d{kind}[{slot}]"] = gradient[:, :, slot]
    return results


def truth_and_eager(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what eager gives in float64, and in dtype, on the default device."""
    return _truth_and_eager(case, dtype, torch.get_default_device())


@functools.lru_cache(maxsize=64)
def _truth_and_eager(
    case: Case, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    inputs, exists = case.inputs(dtype), case.exists()
    truth = with_gradients(lambda w, e: eager(w, e, *exists), [t.double() for t in inputs])
    return truth, with_gradients(lambda w, e: eager(w, e, *exists), inputs)


def rounding_floor(
    truth: Tensor, dtype: torch.dtype, douts: list[Tensor], values: list[Tensor], factors: list[Tensor] | None = None
) -> float:
    """Return the error that no implementation in dtype can be blamed for.

    `factors`: for gradients, the queries and keys. The softmax's gradient is the difference of two sums of D products,
    dout . v and dout . out, equal but for eps * sqrt(D) * |dout| * |v| where they are added in another order; a query
    or key and the scale D ** -0.5 multiply it.
    """
    if truth.numel() == 0:
        return 0.0
    rounded = truth.to(dtype)
    rounding = ((rounded + 0.3) - 0.3 - rounded).abs().max().item()
    accumulator = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = accumulator * _largest(douts) * _largest(values)
    return 2 * rounding + (bound if factors is None else bound * max(1.0, _largest(factors)))


def _largest(tensors: list[Tensor]) -> float:
    return max((t.abs().max().item() for t in tensors if t.numel()), default=0.0)


def assert_as_exact_as_eager(
    results: dict[str, Tensor],
    case: Case,
    dtype: torch.dtype,
    merges: bool = False,
    pooled: bool = False,
    against: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None,
) -> None:
    """Assert: error of out at most twice, of gradients at most three times that of eager in the same dtype.

    `merges`: the output is weighed by log-sum-exps, as gradients always are, and their rounding counts twice.
    `pooled`: eager's largest error of any output, or gradient, counts; that of one that is a few numbers is chance.
    `against`: what is true, and what eager gives in `dtype`, where it is not of `case` alone.
    """
    truth, reference = against or truth_and_eager(case, dtype)
    words, entities, *douts = case.inputs(dtype)
    eager_errors = {name: _largest([reference[name].double() - expected]) for name, expected in truth.items()}
    for name, expected in truth.items():
        if expected.numel() == 0:
            assert results[name].shape == expected.shape
            continue
        error = (results[name].double() - expected).abs().max().item()
        eager_error = eager_errors[name]
        if pooled:
            eager_error = max(error for other, error in eager_errors.items() if other[0] == name[0])
        factor = 2 if name.startswith("out") else 3
        factors = None if factor == 2 else [words[:, :, :-1], entities[:, :, :-1]]
        floor = rounding_floor(expected, dtype, douts, [words[:, :, -1], entities[:, :, -1]], factors)
        if (case.magnitude != 1 or case.far_off) and (factor == 3 or merges):
            floor += (1 + merges) * _floor_of_big_scores(case, expected)
        bound = factor * eager_error + floor
        # Not `error > bound`: a NaN must fail.
        assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g} ({factor} x eager's {eager_error:.3g})"


def _floor_of_big_scores(case: Case, result: Tensor) -> float:
    """Return what one float32 log-sum-exp a row costs: it holds probabilities to eps * |score|, relative."""
    words, entities, *_ = case.inputs(torch.float64)
    queries, keys = (_largest([t[:, :, slot] for t in (words, entities)]) for slot in (0, -2))
    return torch.finfo(torch.float32).eps * queries * keys * case.head_dim**-0.5 * _largest([result])


def run(case: Case, dtype: torch.dtype, backend: str, **options) -> dict[str, Tensor]:
    """Run the op forward and backward on a case."""
    return with_gradients(
        lambda w, e: luke_kernels.entity_aware_attention(w, e, **case.masks(), backend=backend, **options),
        case.inputs(dtype),
    )


INTERPRETED = pytest.mark.skipif(
    not backends.INTERPRETING, reason="Triton's interpreter is off: its kernels run on a GPU in this process"
)
# Every backend where it runs. Tests marked gpu make their tensors there.
BACKENDS = [
    "reference",
    "sdpa",
    "cpu",
    pytest.param("triton", marks=INTERPRETED),
    pytest.param("cuda", id="cuda-emulated"),
    pytest.param("sdpa", id="sdpa-cuda", marks=pytest.mark.gpu),
    pytest.param("triton", id="triton-cuda", marks=pytest.mark.gpu),
    pytest.param("cuda", id="cuda-cuda", marks=pytest.mark.gpu),
]
