"""Who competes in the model benchmark: transformers' LUKE, the same accelerated, and ours. All share their weights.

`peers` adds transformers' LUKE compiled and exported.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from benchmarks.batches import Batch
from benchmarks.cases import DIRECTIONS
from luke_kernels import LukeConfig, LukeModel, accelerate

TRANSFORMERS = "transformers"
ACCELERATED = "accelerated"
OURS = "luke_kernels"
PACKED = "luke_kernels-packed"
OPTIMIZED = "luke_kernels-optimized"
INT8 = "luke_kernels-int8"
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


def config_of(size: str, entity_vocab_size: int = ENTITY_VOCAB_SIZE) -> LukeConfig:
    """Return the settings of a size, without dropout: its numbers are drawn in other ways."""
    return LukeConfig(
        **{"entity_vocab_size": entity_vocab_size, **SIZES[size]}, hidden_dropout_prob=0, attention_probs_dropout_prob=0
    )


@dataclass(frozen=True, eq=False)
class Contender:
    """A model bound to its inputs; `douts` is the gradient of the loss, 0 at pads, in the form of its outputs."""

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    douts: Sequence[Tensor]
    directions: ClassVar[Sequence[str]] = DIRECTIONS
    # How many times the bound of the gate its error may be; None: it is not bounded, and told.
    slack: ClassVar[int | None] = 1

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def prepare(self, direction: str) -> None:
        """Make ready for calls in a direction; what it takes is not timed."""
        self.model.train(direction == "both")

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


class Optimized(Contender):
    """Ours, its weights packed for this CPU or its layers in CUDA graphs: a model of its own, of the same weights."""

    directions = ("forward",)

    def prepare(self, direction: str) -> None:
        self.model.optimize_for_inference()


class Int8(Optimized):
    """The same, its weights rounded to 8 bits: not exact, and so judged by no bound."""

    slack = None

    def prepare(self, direction: str) -> None:
        self.model.optimize_for_inference(weight_dtype=torch.int8)


def draw_model(config: LukeConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Make transformers' eager LukeModel, its weights drawn."""
    settings = transformers.LukeConfig(**config.to_dict(), attn_implementation="eager")
    model = transformers.LukeModel(settings, add_pooling_layer=False).to(device)
    draw_weights(model, device)
    return model.to(dtype)


def draw_weights(model: nn.Module, device: torch.device) -> None:
    """Draw all weights of a model: attention far from uniform, no two queries alike."""
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.2
            parameter.normal_(std=std, generator=generator)
            if name.lower().endswith(("layernorm.weight", "layer_norm.weight")):
                parameter += 1


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
    mine = ours(model)
    words, entities = douts
    padded_douts = batch.packed.pad_words(words), batch.packed.pad_entities(entities)
    chosen = [
        Contender(TRANSFORMERS, model, batch.padded, padded_douts),
        Contender(ACCELERATED, accelerated, batch.padded, padded_douts),
        Contender(OURS, mine, batch.padded, padded_douts),
        Contender(PACKED, mine, {"input_ids": batch.packed}, douts),
    ]
    # Older revisions, which are compared with, lack it.
    can = hasattr(LukeModel, "optimize_for_inference")
    if can and (words.is_cuda or words.dtype in (torch.float32, torch.bfloat16, torch.float16)):
        chosen.append(Optimized(OPTIMIZED, ours(model), {"input_ids": batch.packed}, douts))
    can = can and "weight_dtype" in inspect.signature(LukeModel.optimize_for_inference).parameters
    if can and words.device.type == "cpu" and words.dtype in (torch.float32, torch.bfloat16):
        chosen.append(Int8(INT8, ours(model), {"input_ids": batch.packed}, douts))
    return chosen


def ours(model: nn.Module) -> LukeModel:
    """Make our model of transformers', of the same weights."""
    with torch.device("meta"):
        mine = LukeModel(LukeConfig.from_dict(model.config.to_dict()), add_pooling_layer=False)
    mine.load_state_dict(model.state_dict(), assign=True)
    return mine
