"""Models as programs of plain operations, for other runtimes: torch.export and ONNX.

A program computes on padded batches: every slot goes through the encoder, those where no token exists are not attended
to, and rows of theirs come out as the model gives them. Shapes depend on the inputs' shapes alone, never on values, and
no operation is ours, so that it runs anywhere.
"""

import copy
import importlib.util
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from luke_kernels.heads import (
    SPANS,
    LukeForEntityClassification,
    LukeForEntityPairClassification,
    LukeForEntitySpanClassification,
    LukeForMultipleChoice,
    LukeHead,
)
from luke_kernels.model import Encoded, EntityEmbeddings, LukeModel, LukePreTrainedModel
from luke_kernels.packing import PackedBatch, PackedLengths

NEED_ENTITIES = (LukeForEntityClassification, LukeForEntityPairClassification, LukeForEntitySpanClassification)
# The dimensions of each input; of multiple choice, "choices" comes second.
SHAPES = {
    "input_ids": ("batch", "words"),
    "attention_mask": ("batch", "words"),
    "entity_ids": ("batch", "entities"),
    "entity_attention_mask": ("batch", "entities"),
    "entity_position_ids": ("batch", "entities", "mention_words"),
    "entity_start_positions": ("batch", "entities"),
    "entity_end_positions": ("batch", "entities"),
}
# Of the batch that is traced. None may be 0 or 1, which torch.export takes for constants, nor two be equal.
EXAMPLE = {"batch": 2, "choices": 3, "words": 7, "entities": 5, "mention_words": 4}


def export_program(model: LukePreTrainedModel, *, entities: bool = True) -> ExportedProgram:
    """Export a model with torch.export, for padded batches of any size.

    The program takes by name, as int64, what tokenizers give: input_ids and attention_mask (B, W), entity_ids and
    entity_attention_mask (B, E), entity_position_ids (B, E, M); for span classification also entity_start_positions and
    entity_end_positions (B, E); for multiple choice all as (B, choices, ...). Token types are 0. Masks may be of any
    pattern. It returns a dict of the model's outputs, by name, without hidden states and attentions.

    Args:
        model: `LukeModel` or a head, in evaluation mode. It is not changed, and shares its weights with the program.
        entities: Whether the program takes entities; False: words alone.

    Returns:
        The program; `.module()` is called as the model is. Where the model would raise, for ids out of range or too few
        entities, it is undefined.

    Raises:
        ValueError: the model is in training mode, or needs the entities that are left out.
        TypeError: it is none of ours.
    """
    shapes = _shapes(model, entities)
    sizes = {name: Dim(name, min=1, max=model.config.max_words if name == "words" else None) for name in EXAMPLE}
    inputs = {
        name: torch.ones([EXAMPLE[size] for size in shape], dtype=torch.int64, device=model.device)
        for name, shape in shapes.items()
    }
    dynamic = {name: [sizes[size] for size in shape] for name, shape in shapes.items()}
    return torch.export.export(PaddedModel(model).eval(), (), inputs, dynamic_shapes=dynamic)


def export_onnx(model: LukePreTrainedModel, path: str | Path, *, entities: bool = True) -> None:
    """Export a model as an ONNX file: the program of `export_program`, its inputs and outputs by the same names.

    The file is written aside and then moved into place. Weights of more than 1.5 GiB, for which ONNX files are too
    small, lie in `path` with .data appended, which must stay beside it.

    Args:
        model, entities: As in `export_program`.
        path: The file, which must not exist; its folder is made.

    Raises:
        ValueError, TypeError: as in `export_program`, or there is such a file.
        RuntimeError: onnx or onnxscript is not installed.
    """
    path = Path(path).absolute()
    weights = path.with_name(path.name + ".data")
    for file in (path, weights):
        if file.exists():
            raise ValueError(f"path must be a new file, got {file}, which exists")
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise RuntimeError(f"onnx and onnxscript must be installed to export as ONNX, got no {name}")
    program = export_program(model, entities=entities)
    with warnings.catch_warnings():
        # Of torch about itself; and that inputs share their dimensions' names, as they should.
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", ".*The axis name", UserWarning)
        onnx = torch.onnx.export(
            program,
            output_names=program.call_spec.out_spec.context,
            dynamic_shapes={name: dict(enumerate(shape)) for name, shape in _shapes(model, entities).items()},
            verbose=False,
        )
    assert onnx is not None  # since it is not told to write
    for node in onnx.model.graph:
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".exporting-", dir=path.parent) as aside:
        onnx.save(Path(aside) / path.name)
        # The weights first: without the other file there is no model yet.
        for file in (weights, path):
            if (Path(aside) / file.name).exists():
                os.replace(Path(aside) / file.name, file)


def _shapes(model: LukePreTrainedModel, entities: bool) -> dict[str, tuple[str, ...]]:
    """Return the inputs of a model's program, and the names of their dimensions."""
    if not isinstance(model, LukeModel | LukeHead):
        raise TypeError(f"model must be a LukeModel or one of the heads on it, got {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in evaluation mode to be exported, got one in training mode")
    if not entities and isinstance(model, NEED_ENTITIES):
        raise ValueError(f"entities must be True for {type(model).__name__}, got {entities}")
    shapes = {
        name: shape
        for name, shape in SHAPES.items()
        if (entities or shape[1] == "words") and (name not in SPANS or getattr(model, "reads_spans", False))
    }
    if isinstance(model, LukeForMultipleChoice):
        return {name: (batch, "choices", *rest) for name, (batch, *rest) in shapes.items()}
    return shapes


class PaddedModel(nn.Module):
    """A model on the modules of another: it computes every slot of a padded batch, and gives a dict of its outputs."""

    def __init__(self, model: LukePreTrainedModel):
        super().__init__()
        luke = PaddedLuke(model.encoder_model)
        if isinstance(model, LukeHead):
            self.model: LukePreTrainedModel = copy.copy(model)
            self.model._modules = {**model._modules, "luke": luke}
        else:
            self.model = luke

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        entity_ids: Tensor | None = None,
        entity_attention_mask: Tensor | None = None,
        entity_position_ids: Tensor | None = None,
        entity_start_positions: Tensor | None = None,
        entity_end_positions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        spans = {SPANS[0]: entity_start_positions, SPANS[1]: entity_end_positions}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            entity_ids=entity_ids,
            entity_attention_mask=entity_attention_mask,
            entity_position_ids=entity_position_ids,
            **{name: columns for name, columns in spans.items() if columns is not None},
        )
        return dict(output.items())


class PaddedLuke(LukeModel):
    """A `LukeModel` on the modules of another that does not pack: its layers run on (B, W + E, C)."""

    def __init__(self, luke: LukeModel):
        nn.Module.__init__(self)
        self.config = luke.config
        self.embeddings, self.entity_embeddings = luke.embeddings, luke.entity_embeddings
        self.encoder, self.pooler = luke.encoder, luke.pooler

    def encode(self, input_ids: Any, **inputs: Any) -> "PaddedEncoded":
        batch, words_exist, entities_exist = _every_slot(input_ids, self.config.pad_token_id, **inputs)
        exist, sizes = words_exist, [words_exist.shape[1]]
        hidden = self.embeddings(batch).unflatten(0, words_exist.shape)
        if inputs["entity_ids"] is not None:
            entities = _embed_entities(self.entity_embeddings, batch).unflatten(0, entities_exist.shape)
            hidden, exist = torch.cat([hidden, entities], dim=1), torch.cat([words_exist, entities_exist], dim=1)
            sizes.append(entities_exist.shape[1])
        for layer in self.layers:
            hidden = layer.after_attention(hidden, _attend(layer.attention["self"], hidden, exist, sizes))
        # Without entities, their states are the first none of the words'.
        words, entities = (*hidden.split(sizes, dim=1), hidden[:, :0])[:2]
        return PaddedEncoded(
            batch,
            is_packed=False,
            words=words.flatten(0, 1),
            entities=entities.flatten(0, 1),
            words_exist=words_exist,
            entities_exist=entities_exist,
        )


@dataclass(kw_only=True)
class PaddedEncoded(Encoded):
    """The states of every slot, (B * W, C) and (B * E, C), as if they were a packed batch, and which slots exist."""

    words_exist: Tensor
    entities_exist: Tensor

    def rows_of_first_words(self) -> Tensor:
        return _rows_of_first(self.words_exist, 1)

    def first_words(self) -> Tensor:
        return self.words.index_select(0, self.rows_of_first_words()) * self.words_exist.any(dim=1, keepdim=True)

    def rows_of_first_entities(self, count: int) -> Tensor:
        return _rows_of_first(self.entities_exist, count)

    def rows_of_words(self, ranks: Tensor) -> Tensor:
        # Columns here, since every slot counts.
        return (ranks.unflatten(0, self.entities_exist.shape) + _starts(self.words_exist)).flatten()

    def as_words(self, packed: Tensor, fill: float = 0) -> Tensor:
        return _fill_absent(packed, self.words_exist, fill)

    def as_entities(self, packed: Tensor) -> Tensor:
        return _fill_absent(packed, self.entities_exist, 0)


def _fill_absent(packed: Tensor, exist: Tensor, fill: float) -> Tensor:
    return packed.masked_fill(~exist.flatten()[:, None], fill).unflatten(0, exist.shape)


def _rows_of_first(exist: Tensor, count: int) -> Tensor:
    """Return the rows of the first slots of each sequence that exist, (B, N) -> (B * count,); of any where fewer do."""
    wanted = torch.arange(1, count + 1, device=exist.device)[:, None]
    chosen = (exist.cumsum(dim=1)[:, None] == wanted) & exist[:, None]
    return (chosen.to(torch.int32).argmax(dim=2) + _starts(exist)).flatten()


def _starts(exist: Tensor) -> Tensor:
    """Return the row of the first slot of each sequence, (B, N) -> (B, 1)."""
    return torch.arange(exist.shape[0], device=exist.device)[:, None] * exist.shape[1]


def _every_slot(
    input_ids: Tensor,
    pad_token_id: int,
    *,
    attention_mask: Tensor,
    entity_ids: Tensor | None,
    entity_attention_mask: Tensor | None,
    entity_position_ids: Tensor | None,
    entity_start_positions: Tensor | None = None,
    entity_end_positions: Tensor | None = None,
    **_: Any,
) -> tuple[PackedBatch, Tensor, Tensor]:
    """Return a padded batch as a packed one in which all slots are tokens, and which of the words and entities exist.

    Slots that do not exist may hold any id.
    """
    if entity_ids is None or entity_attention_mask is None or entity_position_ids is None:
        entity_ids = entity_attention_mask = input_ids[:, :0]
        entity_position_ids = entity_ids[..., None]
    words_exist, entities_exist = attention_mask.bool(), entity_attention_mask.bool()
    # All words are counted, those that do not exist too, as `PackedBatch.from_padded` does.
    counted = (input_ids != pad_token_id).to(torch.int64)
    position_ids = counted.cumsum(dim=1) * counted + pad_token_id

    def of_entities(ids: Tensor | None) -> Any:
        return None if ids is None else ids.where(entities_exist, 0).flatten()

    (batch_size, num_words), num_entities = words_exist.shape, entities_exist.shape[1]
    numbers = torch.arange(batch_size + 1, dtype=torch.int32, device=input_ids.device)
    batch = PackedBatch(
        lengths=PackedLengths(numbers * num_words, numbers * num_entities, num_words, num_entities),
        input_ids=input_ids.where(words_exist, 0).flatten(),
        position_ids=position_ids.flatten(),
        entity_ids=of_entities(entity_ids),
        entity_position_ids=entity_position_ids.where(entities_exist[..., None], -1).flatten(0, 1),
        word_rows=torch.arange(batch_size * num_words, device=input_ids.device),
        entity_rows=torch.arange(batch_size * num_entities, device=input_ids.device),
        padded_words=num_words,
        padded_entities=num_entities,
        entity_start_positions=of_entities(entity_start_positions),
        entity_end_positions=of_entities(entity_end_positions),
    )
    return batch, words_exist, entities_exist


def _embed_entities(embeddings: EntityEmbeddings, batch: PackedBatch) -> Tensor:
    """Embed as `EntityEmbeddings` does, without its bags, which ONNX has only as loops."""
    entities = embeddings.entity_embeddings(batch.entity_ids)
    if embeddings.entity_embedding_dense is not None:
        entities = embeddings.entity_embedding_dense(entities)
    exists = (batch.entity_position_ids != -1).to(entities.dtype)
    shares = exists / exists.sum(dim=1, keepdim=True).clamp(min=1)
    positions = shares[:, None] @ embeddings.position_embeddings(batch.entity_position_ids.clamp(min=0))
    return embeddings.LayerNorm(entities + positions.squeeze(1) + embeddings.token_type_embeddings.weight[0])


def _attend(attention: Any, hidden: Tensor, exist: Tensor, sizes: list[int]) -> Tensor:
    """Attend to what exists, (B, W + E, C) -> contexts of the same shape; `sizes` are W and, with entities, E."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    keys, values = heads(attention.key(hidden)), heads(attention.value(hidden))
    if attention.entity_aware and len(sizes) == 2:
        words, entities = hidden.split(sizes, dim=1)
        to_words = torch.cat([attention.query(words), attention.e2w_query(entities)], dim=1)
        to_entities = torch.cat([attention.w2e_query(words), attention.e2e_query(entities)], dim=1)
        queries = zip((to_words, to_entities), keys.split(sizes, dim=2), strict=True)
        scores = torch.cat([heads(q) @ k.transpose(-1, -2) for q, k in queries], dim=-1)
    else:
        scores = heads(attention.query(hidden)) @ keys.transpose(-1, -2)
    # Not -inf: a sequence without tokens would be NaN.
    lowest = torch.finfo(scores.dtype).min
    scores = (scores * values.shape[-1] ** -0.5).masked_fill(~exist[:, None, None], lowest)
    return (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(-2)
