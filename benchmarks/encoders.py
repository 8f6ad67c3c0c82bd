"""Who competes in the model benchmark: transformers' LUKE, the same accelerated, and ours. All share their weights."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.batches import Batch
from luke_kernels import LukeConfig, LukeModel, accelerate

TRANSFORMERS = "transformers"
ACCELERATED = "accelerated"
OURS = "luke_kernels"
PACKED = "luke_kernels-packed"
SEED = 0

SIZES = {
    "tiny": {
        "hidden_size": 32,
        "entity_emb_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    },
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
# As in fine-tuning, which keeps the entities it needs: the gradient of 500,000 would drown the rest.
ENTITY_VOCAB_SIZE = 10_000


def config_of(size: str) -> LukeConfig:
    """Return the settings of a size, without dropout: its numbers are drawn in other ways."""
    return LukeConfig(
        **{"entity_vocab_size": ENTITY_VOCAB_SIZE, **SIZES[size]}, hidden_dropout_prob=0, attention_probs_dropout_prob=0
    )


@dataclass(frozen=True, eq=False)
class Contender:
    """A model bound to its inputs; `douts` is the gradient of the loss, 0 at pads, in the form of its outputs."""

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    douts: Sequence[Tensor]

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def run(self, direction: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the states of words and entities and, where direction is "both", the gradients of the parameters."""
        if direction == "forward":
            with torch.no_grad():
                return self._states(), ()
        states = self._states()
        return states, torch.autograd.grad(states, list(self.parameters.values()), self.douts)

    def _states(self) -> Sequence[Tensor]:
        output = self.model(**self.inputs)
        return output.last_hidden_state, output.entity_last_hidden_state


def draw_model(config: LukeConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Make transformers' eager LukeModel, all weights drawn: attention far from uniform, no two queries alike."""
    settings = transformers.LukeConfig(**config.to_dict(), attn_implementation="eager")
    model = transformers.LukeModel(settings, add_pooling_layer=False).to(device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.2
            parameter.normal_(std=std, generator=generator)
            if name.endswith("LayerNorm.weight"):
                parameter += 1
    return model.to(dtype)


def draw_douts(batch: Batch, model: nn.Module) -> list[Tensor]:
    """Draw the gradient of the loss, a random weighting of all states, (Tw, C) and (Te, C)."""
    like = next(model.parameters())
    generator = torch.Generator(like.device).manual_seed(SEED)
    lengths = batch.packed.num_words, batch.packed.num_entities
    size = model.config.hidden_size
    return [torch.randn(n, size, generator=generator, device=like.device, dtype=like.dtype) for n in lengths]


def contenders(model: nn.Module, batch: Batch, douts: Sequence[Tensor]) -> list[Contender]:
    """Return who competes with `model`, transformers' own, which comes first."""
    accelerated = accelerate(copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}))
    with torch.device("meta"):
        ours = LukeModel(LukeConfig.from_dict(model.config.to_dict()), add_pooling_layer=False)
    ours.load_state_dict(model.state_dict(), assign=True)
    words, entities = douts
    padded_douts = batch.packed.pad_words(words), batch.packed.pad_entities(entities)
    return [
        Contender(TRANSFORMERS, model, batch.padded, padded_douts),
        Contender(ACCELERATED, accelerated, batch.padded, padded_douts),
        Contender(OURS, ours, batch.padded, padded_douts),
        Contender(PACKED, ours, {"input_ids": batch.packed}, douts),
    ]
