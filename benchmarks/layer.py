"""The layer benchmark: attention with its projections, from hidden states to contexts, and the gradients of both."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.luke.modeling_luke import LukeSelfAttention

from benchmarks import encoders, model
from benchmarks.batches import Batch
from luke_kernels import EntityAwareSelfAttention, LukeConfig

OP = "layer"
CPU_BATCHES = ("8x128x16", "4x512x128")
GPU_BATCHES = ("32x512x128", "32x512x32", "128x128x16-ragged")
DEVICE_BATCHES = {"cpu": CPU_BATCHES, "cuda": GPU_BATCHES}


@dataclass(frozen=True, eq=False)
class Layer(encoders.Contender):
    """Self-attention bound to hidden states, of which it gives the gradients too; `inputs` say which tokens exist."""

    word_hidden: Tensor
    entity_hidden: Tensor

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        return super().parameters | {"word_hidden": self.word_hidden, "entity_hidden": self.entity_hidden}

    def _states(self) -> Sequence[Tensor]:
        return self.model(self.word_hidden, self.entity_hidden, **self.inputs)[:2]

    def double(self) -> "Layer":
        hidden = [_leaf(each.double()) for each in (self.word_hidden, self.entity_hidden)]
        inputs = {name: each.double() for name, each in self.inputs.items()}
        douts = [each.double() for each in self.douts]
        return Layer(self.name, copy.deepcopy(self.model).double(), inputs, douts, *hidden)


def contenders(batch: Batch, config: LukeConfig, dtype: torch.dtype, device: torch.device) -> list[Layer]:
    """Return transformers' eager layer, ours on the same padded states, and ours on packed ones; they share weights."""
    settings = transformers.LukeConfig(**config.to_dict(), attn_implementation="eager")
    theirs = LukeSelfAttention(settings).to(device)
    size, packed = config.hidden_size, batch.packed
    generator = torch.Generator(device).manual_seed(encoders.SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(draw(*parameter.shape) * (size**-0.5 if parameter.dim() == 2 else 0.2))
    theirs = theirs.to(dtype)
    with torch.device("meta"):
        ours = EntityAwareSelfAttention(size, config.num_attention_heads)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    hidden, douts = (
        [draw(tokens, size).to(dtype) for tokens in (packed.num_words, packed.num_entities)] for _ in range(2)
    )
    padded, padded_douts = (
        [packed.pad_words(words), packed.pad_entities(entities)] for words, entities in (hidden, douts)
    )
    exist = torch.cat([batch.padded["attention_mask"], batch.padded["entity_attention_mask"]], dim=1).bool()
    mask = torch.zeros_like(exist, dtype=dtype).masked_fill(~exist, torch.finfo(dtype).min)[:, None, None]
    # Dense batches pass no lengths, as their callers would.
    lengths: dict[str, Any] = {}
    if not exist.all():
        cu = packed.lengths
        lengths = {"word_lengths": cu.cu_words.diff(), "entity_lengths": cu.cu_entities.diff()}
    return [
        Layer(encoders.TRANSFORMERS, theirs, {"attention_mask": mask}, padded_douts, *map(_leaf, padded)),
        Layer(encoders.OURS, ours, lengths, padded_douts, *map(_leaf, padded)),
        Layer(encoders.PACKED, ours, {"packed": packed.lengths}, douts, *map(_leaf, hidden)),
    ]


def _leaf(hidden: Tensor) -> Tensor:
    return hidden.detach().clone().requires_grad_()


def flops(batch: Batch, size: int, direction: str) -> float:
    """Count what real tokens cost: two queries a token, key and value; and 4 C sum_b S_b^2 of attention."""
    products = 2 * 4 * size**2 * batch.shape["real_tokens"]
    lengths = zip(batch.word_lengths, batch.entity_lengths, strict=True)
    attention = 4 * size * sum((w + e) ** 2 for w, e in lengths)
    return products + attention if direction == "forward" else 3 * products + 3.5 * attention


def run_case(
    batch: Batch,
    size: str,
    dtype: torch.dtype,
    directions: Sequence[str],
    repeats: int,
    peak_tflops: float,
    run: dict[str, Any],
    choose: Callable[..., list[Layer]] = contenders,
) -> list[model.Record]:
    """Gate and time all contenders on one batch, as `model.run_case` does."""
    config = encoders.config_of(size)
    chosen = choose(batch, config, dtype, batch.packed.position_ids.device)
    direction = "both" if "both" in directions else "forward"
    truth = model.named_results(chosen[0].double(), direction, batch.packed)
    gate = model.Gate(truth, chosen[0], batch, dtype)
    costs = {direction: flops(batch, config.hidden_size, direction) for direction in directions}
    run = run | {"op": OP, "size": size, "dtype": str(dtype).removeprefix("torch.")}
    return model.compete(chosen, gate, batch, costs, repeats, peak_tflops, run)
