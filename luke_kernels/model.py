"""LUKE: RoBERTa with entities as tokens and entity-aware self-attention. Source: Yamada et al. 2020, section 3.

The encoder runs on one buffer of all tokens of a batch, words first, without padding: (Tw + Te, C). Padded inputs are
packed before it and outputs padded after it. Parameters bear the names of transformers' LUKE.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from luke_kernels import checkpoint as checkpoints
from luke_kernels.attention import PackedSelfAttention
from luke_kernels.config import ACTIVATIONS, LukeConfig
from luke_kernels.ops.attention import described
from luke_kernels.ops.backends import cpu_kernels_missing
from luke_kernels.ops.layout import Layout
from luke_kernels.packing import PackedBatch, check_range
from luke_kernels.plain import need_gradients
from luke_kernels.sources import Source

if TYPE_CHECKING:
    from luke_kernels.graphs import GraphedLayers
    from luke_kernels.inference import PackedLayers

Model = TypeVar("Model", bound="LukePreTrainedModel")


@dataclass
class ModelOutput:
    """What a model returns: attributes, by name or by place as in transformers, those that are None left out."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self[name] for name in self.keys())

    def keys(self) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def values(self) -> list[Any]:
        return list(self.to_tuple())

    def items(self) -> list[tuple[str, Any]]:
        return list(zip(self.keys(), self.to_tuple(), strict=True))

    def get(self, key: str, default: Any = None) -> Any:
        return dict(self.items()).get(key, default)

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@dataclass
class LukeModelOutput(ModelOutput):
    """Outputs of `LukeModel`.

    For padded inputs (B, W, C) and (B, E, C), zero where no token exists; for a `PackedBatch` (Tw, C) and (Te, C).

    `hidden_states` and `entity_hidden_states` hold the embeddings and the output of each layer; `attentions` the
    probabilities of each layer, (B, H, W + E, W + E).
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    entity_last_hidden_state: Tensor | None = None
    entity_hidden_states: tuple[Tensor, ...] | None = None


class Embeddings(nn.Module):
    """Word + position + type."""

    def __init__(self, config: LukeConfig):
        super().__init__()
        size, pad = config.hidden_size, config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=pad)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size, padding_idx=pad)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, batch: PackedBatch) -> Tensor:
        words = self.word_embeddings(batch.input_ids) if batch.inputs_embeds is None else batch.inputs_embeds
        types = _types(self.token_type_embeddings, batch.token_type_ids)
        return self.dropout(self.LayerNorm(words + self.position_embeddings(batch.position_ids) + types))


class EntityEmbeddings(nn.Module):
    """Entity, projected from its smaller size (B * U), + mean position of the mention's words + type.

    The entity table has no padding row: pads never come here, and id 0 may be [MASK].
    """

    def __init__(self, config: LukeConfig):
        super().__init__()
        size, emb_size = config.hidden_size, config.entity_emb_size
        assert emb_size is not None
        self.entity_embeddings = nn.Embedding(config.entity_vocab_size, emb_size)
        self.entity_embedding_dense = nn.Linear(emb_size, size, bias=False) if emb_size != size else None
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, batch: PackedBatch) -> Tensor:
        entities = self.entity_embeddings(batch.entity_ids)
        if self.entity_embedding_dense is not None:
            entities = self.entity_embedding_dense(entities)
        types = _types(self.token_type_embeddings, batch.entity_token_type_ids)
        positions = mean_positions(self.position_embeddings.weight, batch.entity_position_ids)
        return self.dropout(self.LayerNorm(entities + positions + types))


def mean_positions(table: Tensor, position_ids: Tensor) -> Tensor:
    """Average the rows of positions that are not -1, (..., M) -> (..., C), with nothing of size (..., M, C)."""
    bags = position_ids.flatten(0, -2)
    exists = (bags != -1).to(table.dtype)
    shares = exists / exists.sum(dim=1, keepdim=True).clamp(min=1)
    means = F.embedding_bag(bags.clamp(min=0), table, mode="sum", per_sample_weights=shares)
    return means.unflatten(0, position_ids.shape[:-1])


def _types(table: nn.Embedding, ids: Tensor | None) -> Tensor:
    """Return (T, C), or (C,) where all tokens are of type 0."""
    return table.weight[0] if ids is None else table(ids)


class ResidualNorm(nn.Module):
    """The end of a sublayer: project, drop, add, normalise."""

    def __init__(self, in_size: int, config: LukeConfig):
        super().__init__()
        self.dense = nn.Linear(in_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Layer(nn.Module):
    """Attention, then feed-forward, over words and entities alike."""

    def __init__(self, config: LukeConfig, backend: str):
        super().__init__()
        size = config.hidden_size
        attention = PackedSelfAttention(
            size,
            config.num_attention_heads,
            dropout=config.attention_probs_dropout_prob,
            entity_aware=config.use_entity_aware_attention,
            backend=backend,
        )
        self.attention = nn.ModuleDict({"self": attention, "output": ResidualNorm(size, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(size, config.intermediate_size)})
        self.output = ResidualNorm(config.intermediate_size, config)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor, num_words: int, layout: Layout, rows: Tensor | None = None) -> Tensor:
        """Run the layer, (Tw + Te, C) -> the same, or (R, C) where only `rows` (R,) are asked for."""
        return self.after_attention(hidden, self.attention["self"](hidden, num_words, layout), rows)

    def after_attention(self, hidden: Tensor, context: Tensor, rows: Tensor | None = None) -> Tensor:
        if rows is not None:
            hidden, context = hidden.index_select(0, rows), context.index_select(0, rows)
        hidden = self.attention["output"](context, hidden)
        return self.output(self.activation(self.intermediate["dense"](hidden)), hidden)


@dataclass
class Encoded:
    """What the encoder gives to a head: packed hidden states, and how to return results as the caller's batch came."""

    batch: PackedBatch
    is_packed: bool
    words: Tensor
    entities: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    entity_hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    # Rows of words, and of entities, that have labels, where these alone are scored.
    labelled: tuple[Tensor, Tensor] | None = None

    def rows_of_first_words(self) -> Tensor:
        """Return the row of each sequence's first word, (B,); some row of words for a sequence without any."""
        return self.batch.lengths.cu_words[:-1].long().clamp(max=max(self.batch.num_words - 1, 0))

    def first_words(self) -> Tensor:
        """Return the state of each sequence's first word, (B, C); zero for a sequence without words."""
        if self.batch.num_words == 0:
            return self.words.new_zeros(self.batch.batch_size, self.words.shape[1])
        firsts = self.words.index_select(0, self.rows_of_first_words())
        return firsts * (self.batch.lengths.cu_words.diff() > 0)[:, None]

    def rows_of_first_entities(self, count: int) -> Tensor:
        """Return the rows of each sequence's first entities, which it must have, among all entities, (B * count,)."""
        starts = self.batch.lengths.cu_entities[:-1, None]
        return (starts + torch.arange(count, device=starts.device)).flatten()

    def first_entities(self, count: int) -> Tensor:
        """Return the states of each sequence's first entities, which it must have, (B, count, C)."""
        return self.entities.index_select(0, self.rows_of_first_entities(count)).unflatten(0, (-1, count))

    def rows_of_words(self, ranks: Tensor) -> Tensor:
        """Return the row of a word of each entity's sequence, by its rank (Te,) there, (Te,)."""
        return self.batch.lengths.cu_words[self.batch.sequence_of_entity()] + ranks

    def words_of_entities(self, ranks: Tensor) -> Tensor:
        """Return the state of a word of each entity's sequence, by its rank (Te,) there, (Te, C)."""
        return self.words.index_select(0, self.rows_of_words(ranks))

    def as_words(self, packed: Tensor, fill: float = 0) -> Tensor:
        """Return something of each word as the caller's batch came: (Tw, ...) or (B, W, ...)."""
        return packed if self.is_packed else self.batch.pad_words(packed, fill)

    def as_entities(self, packed: Tensor) -> Tensor:
        """Return something of each entity as the caller's batch came: (Te, ...) or (B, E, ...)."""
        return packed if self.is_packed else self.batch.pad_entities(packed)

    def take_words(self, given: Tensor, name: str = "labels") -> Tensor:
        """Take something of each word, given as the batch came, to (Tw, ...); errors call it `name`."""
        if not self.is_packed:
            return self.batch.pack_words(given, name).to(self.words.device)
        _check_rows(name, given, self.batch.num_words, "pack_words")
        return given.to(self.words.device)

    def take_entities(self, given: Tensor, name: str = "labels") -> Tensor:
        """Take something of each entity, given as the batch came, to (Te, ...)."""
        if not self.is_packed:
            return self.batch.pack_entities(given, name).to(self.words.device)
        _check_rows(name, given, self.batch.num_entities, "pack_entities")
        return given.to(self.words.device)


def _check_rows(name: str, given: Tensor, rows: int, pack: str) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
    if given.shape[0] != rows:
        raise ValueError(
            f"{name} must have {rows} rows, those of the PackedBatch (its {pack} makes them), got {tuple(given.shape)}"
        )


class LukePreTrainedModel(nn.Module):
    """What all models share: a config, checkpoints, resizing, gradient checkpointing."""

    config: LukeConfig

    @property
    def encoder_model(self) -> "LukeModel":
        """The encoder: the model itself, or what its head stands on."""
        return self if isinstance(self, LukeModel) else self.luke  # type: ignore[return-value]

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **changes: Any,
    ) -> Model:
        """Load a checkpoint of ours, of transformers, or of the original repository, in evaluation mode.

        Weights are safetensors, or pickles read without executing them. The extra queries of entity-aware attention,
        where the checkpoint lacks them, are copies of `query`; the word decoder, where it is missing, is tied.

        Args:
            name_or_path: Directory, .tar.gz archive of the original repository, or id of a model on the hub.
            dtype: Dtype of the weights; None: as stored.
            device: Where the weights go.
            backend: As in `luke_kernels.entity_aware_attention`.
            revision, token, cache_dir, local_files_only: For the hub, as in huggingface_hub.
            **changes: Settings of `LukeConfig` that replace the stored ones; for another num_labels the classifier is
                new.

        Raises:
            FileNotFoundError: there is no such checkpoint, or a file is missing from it.
            ValueError: weights are missing, of other shapes than the config says, or unreadable; nothing is loaded.

        Warns:
            UserWarning: weights of the head are new, or weights in the checkpoint have no place here.
        """
        _check_dtype(dtype)
        with Source(name_or_path, revision, token, cache_dir, local_files_only) as source:
            config = checkpoints.read_config(source, changes)
            tensors = checkpoints.read_tensors(source)
            checkpoints.check_depth(source.name, config, tensors)
            with without_weights():
                model = cls(config, backend=backend)
            if changes.keys() & {"num_labels", "id2label"}:
                tensors = checkpoints.without_other_labels(model, tensors)
            checkpoints.load(model, source.name, tensors, dtype=dtype, device=device)
        return model.eval()

    @classmethod
    def from_encoder(
        cls: type[Model],
        name_or_path: str | Path,
        *,
        entity_vocab_size: int,
        marker_token_ids: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **changes: Any,
    ) -> Model:
        """Start a LUKE from a RoBERTa or BERT encoder.

        The extra queries are copies of `query`; two words `<ent>` and `<ent2>` are added that start as "@" and "#"; the
        positions of entities start as those of words; the rest of the entity parts is new.

        Args:
            name_or_path: Directory or hub id of a transformers checkpoint of RoBERTa, XLM-RoBERTa or BERT.
            entity_vocab_size: Number of entities.
            marker_token_ids: Ids of "@" and "#"; None: looked up in the checkpoint's vocabulary.
            others: As in `from_pretrained`.

        Raises:
            FileNotFoundError, ValueError: as in `from_pretrained`; or the markers are not in the vocabulary.
        """
        _check_dtype(dtype)
        with Source(name_or_path, revision, token, cache_dir, local_files_only) as source:
            config, tensors = checkpoints.start_from_encoder(source, marker_token_ids, entity_vocab_size, changes)
            checkpoints.check_depth(source.name, config, tensors)
            with without_weights():
                model = cls(config, backend=backend)
            checkpoints.load(model, source.name, tensors, dtype=dtype, device=device, entities_are_new=True)
        return model.eval()

    def save_pretrained(self, directory: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write config.json and the weights as safetensors, for us and for transformers.

        Files are written aside and then moved into place.

        Args:
            directory: Made if it does not exist.
            max_shard_size: Largest size of a file, in bytes or as "5GB"; more are written with an index.

        Raises:
            ValueError: `directory` is a file.
        """
        checkpoints.save(self, directory, max_shard_size)

    def tie_weights(self) -> None:
        """Share the tables that are one; heads that have such say how."""

    def init_weights(self, names: set[str] | None = None) -> None:
        """Draw new weights: N(0, initializer_range), biases 0, norms 1; `names` of parameters, or all."""
        for prefix, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                full_name = f"{prefix}.{name}" if prefix else name
                if names is None or full_name in names:
                    _initialise(module, name, parameter, self.config.initializer_range)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute each layer in the backward, to save memory; arguments of torch.utils.checkpoint may be given."""
        self.encoder_model.checkpointing = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

    def gradient_checkpointing_disable(self) -> None:
        """Keep the activations of each layer."""
        self.encoder_model.checkpointing = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.encoder_model.checkpointing is not None

    def sparse_entity_gradients(self: Model, enabled: bool = True) -> Model:
        """Let the gradient of the entity table be sparse: it holds the rows that a batch reads, and no others.

        For training where the table is read and not scored as a whole. `torch.optim.SparseAdam` then touches those rows
        alone: moments of the others do not decay, none has weight decay, and AdamW takes the rest of the parameters.

        Returns:
            The model itself.
        """
        self.get_entity_embeddings().sparse = enabled
        return self

    def optimize_for_inference(
        self: Model, *, dtype: torch.dtype | None = None, weight_dtype: torch.dtype | None = None
    ) -> Model:
        """Make calls without gradients fast, and go into evaluation mode.

        On a CPU they then run on packed weights by this CPU's own kernels: products with bias, GELU and residual in one
        pass. On a GPU those of few tokens run as CUDA graphs. Other calls, and those with `output_attentions`, run as
        before. The model keeps its weights, so that it can be saved, trained and restored; packed ones take as much
        memory again, half as much more in float32 on AMX.

        Args:
            dtype: What the layers compute in on a CPU, float32, bfloat16 or float16; None: the dtype of the weights. A
                CPU without units for bfloat16 or float16 computes in float32, and rounds.
            weight_dtype: On a CPU, torch.int8 to multiply in 8 bits, weights rounded once and rows as they come: in
                a quarter of the memory, faster where the CPU has VNNI and no units for bfloat16, and not exact
                (docs/model.md tells the error); None: `dtype`.

        Returns:
            The model itself. `restore_from_inference` undoes it; on a CPU new weights, on a GPU weights in new memory
            make its calls fail until it is optimized again.

        Raises:
            ValueError, TypeError: the model is of another dtype, or on another device; a layer has a part that is not a
                plain module (hooks, adapters, quantised weights); or `dtype` or `weight_dtype` is given on a GPU.
            NotImplementedError: there are no kernels that beat PyTorch's here, or none of int8.
        """
        _check_dtype(dtype)
        encoder = self.encoder_model
        if self.device.type == "cuda":
            if dtype not in (None, self.dtype):
                raise ValueError(f"dtype must be None or that of the weights, {self.dtype}, on a GPU, got {dtype}")
            if weight_dtype is not None:
                raise ValueError(f"weight_dtype must be None on a GPU, got {weight_dtype}")
            from luke_kernels.graphs import GraphedLayers

            encoder.optimized = GraphedLayers(encoder.layers)
            return self.eval()
        if (reason := cpu_kernels_missing()) is not None:
            raise NotImplementedError(f"optimize_for_inference must run on kernels for this CPU, got: {reason}")
        from luke_kernels.inference import PackedLayers

        encoder.optimized = PackedLayers(encoder.layers, dtype, weight_dtype)
        return self.eval()

    def restore_from_inference(self: Model) -> Model:
        """Undo `optimize_for_inference`; the model stays in evaluation mode."""
        self.encoder_model.optimized = None
        return self

    @property
    def is_optimized_for_inference(self) -> bool:
        return self.encoder_model.optimized is not None

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder_model.embeddings.word_embeddings

    def get_entity_embeddings(self) -> nn.Embedding:
        return self.encoder_model.entity_embeddings.entity_embeddings

    def resize_token_embeddings(self, vocab_size: int) -> nn.Embedding:
        """Cut or extend the word table, and what is tied to it; new rows are drawn."""
        self._resize(self.get_input_embeddings(), "vocab_size", vocab_size)
        return self.get_input_embeddings()

    def resize_entity_embeddings(self, entity_vocab_size: int) -> nn.Embedding:
        """Cut or extend the entity table, and what is tied to it; new rows are drawn."""
        self._resize(self.get_entity_embeddings(), "entity_vocab_size", entity_vocab_size)
        return self.get_entity_embeddings()

    def _resize(self, table: nn.Embedding, setting: str, size: int) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{setting} must be a positive int, got {size!r}")
        if setting == "vocab_size" and size <= self.config.pad_token_id:
            raise ValueError(f"{setting} must be more than pad_token_id, {self.config.pad_token_id}, got {size}")
        table.weight = resized(table.weight, size, self.config.initializer_range)
        table.num_embeddings = size
        setattr(self.config, setting, size)
        self._resize_outputs(setting, size)
        self.tie_weights()

    def _resize_outputs(self, setting: str, size: int) -> None:
        """Resize what a head has of the same size and does not tie."""

    @property
    def device(self) -> torch.device:
        return self.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.get_input_embeddings().weight.dtype


@contextmanager
def without_weights() -> Iterator[None]:
    """Make modules on the meta device and draw nothing: for draws there torch imports its compiler, in two seconds."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]  # of Tensor, and of nn.init
        return function(*args, **kwargs)


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")


def _initialise(module: nn.Module, name: str, parameter: nn.Parameter, std: float) -> None:
    with torch.no_grad():
        if isinstance(module, nn.LayerNorm) and name == "weight":
            parameter.fill_(1)
        elif name == "bias":
            parameter.zero_()
        else:
            parameter.normal_(std=std)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                parameter[module.padding_idx].zero_()


def resized(parameter: Tensor, size: int, std: float) -> nn.Parameter:
    """Cut or extend by rows from N(0, std)."""
    rows = parameter.new_empty(size, *parameter.shape[1:])
    kept = min(size, parameter.shape[0])
    with torch.no_grad():
        rows[:kept] = parameter[:kept]
        rows[kept:].normal_(std=std)
    return nn.Parameter(rows, requires_grad=parameter.requires_grad)


class LukeModel(LukePreTrainedModel):
    """The encoder: contextual states of words and entities.

    Args:
        config: Sizes and settings.
        add_pooling_layer: Whether to pool the first word's state, tanh(W h + b).
        backend: As in `luke_kernels.entity_aware_attention`.

    Source: Yamada et al. 2020, section 3; parameter names and outputs as transformers' LukeModel.
    """

    def __init__(self, config: LukeConfig, add_pooling_layer: bool = True, *, backend: str = "auto"):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.entity_embeddings = EntityEmbeddings(config)
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList([Layer(config, backend) for _ in range(config.num_hidden_layers)])}
        )
        dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.pooler = nn.ModuleDict({"dense": dense}) if add_pooling_layer else None
        self.checkpointing: dict[str, Any] | None = None
        self.optimized: Any = None  # PackedLayers or GraphedLayers, where the model is optimized for inference
        self.init_weights()

    @property
    def layers(self) -> list[Layer]:
        return list(self.encoder["layer"])  # type: ignore[call-overload]

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        entity_ids: Tensor | None = None,
        entity_attention_mask: Tensor | None = None,
        entity_token_type_ids: Tensor | None = None,
        entity_position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        rows_to_compute: Tensor | None = None,
    ) -> LukeModelOutput | tuple[Any, ...]:
        """Encode a batch.

        Args:
            input_ids: Word ids (B, W), or a `PackedBatch` in place of all tensors.
            attention_mask, ..., inputs_embeds: As in `PackedBatch.from_padded`.
            output_attentions: Also return the probabilities, by the reference path, in memory of that size.
            output_hidden_states: Also return the states before and after each layer.
            return_dict: False for a tuple of what is not None.
            rows_to_compute: Rows of the packed batch to compute in the last layer, int64 (R,): word t is row t,
                entity u row Tw + u. The other rows of the outputs are zero. None: all.

        Returns:
            `LukeModelOutput`.

        Raises:
            ValueError, TypeError: as in `PackedBatch.from_padded`; or a sequence is too long, or an id out of range.
        """
        encoded = self.encode(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            entity_ids=entity_ids,
            entity_attention_mask=entity_attention_mask,
            entity_token_type_ids=entity_token_type_ids,
            entity_position_ids=entity_position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            rows_to_compute=rows_to_compute,
        )
        output = LukeModelOutput(
            last_hidden_state=encoded.as_words(encoded.words),
            pooler_output=self.pool(encoded) if self.pooler is not None else None,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            entity_last_hidden_state=(encoded.as_entities(encoded.entities) if encoded.batch.padded_entities else None),
            entity_hidden_states=encoded.entity_hidden_states,
        )
        return output.to_tuple() if return_dict is False else output

    def pool(self, encoded: Encoded) -> Tensor:
        """Return tanh(W h + b) of each sequence's first word, (B, C)."""
        assert self.pooler is not None
        return torch.tanh(self.pooler["dense"](encoded.first_words()))

    def encode(
        self,
        input_ids: Tensor | PackedBatch | None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        rows_to_compute: "Tensor | Callable[[Encoded], Tensor | None] | None" = None,
        num_layers: int | None = None,
        **inputs: Tensor | None,
    ) -> Encoded:
        """Encode a batch for a head: the inputs of `PackedBatch.from_padded`, or a packed batch; packed states out.

        Only the first `num_layers` run, 0 for the embeddings; None: all. `rows_to_compute` are those of the last layer
        that runs, which may repeat, or a function that says which once the batch is packed; where no layer runs, all
        rows are returned, and so they are with `output_hidden_states`.
        """
        if num_layers is not None and not 0 <= num_layers <= self.config.num_hidden_layers:
            raise ValueError(f"num_layers must lie in [0, {self.config.num_hidden_layers}], got {num_layers}")
        if isinstance(input_ids, PackedBatch):
            batch, is_packed = input_ids, True
            for name, value in inputs.items():
                if value is not None:
                    raise ValueError(f"{name} must be None where input_ids is a PackedBatch, got {described(value)}")
        else:
            is_packed = False
            batch = PackedBatch.from_padded(input_ids, **inputs, pad_token_id=self.config.pad_token_id)
        self._check(batch)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        num_words, layout = batch.num_words, batch.lengths.layout()
        hidden = torch.cat([self.embeddings(batch), self.entity_embeddings(batch)])
        encoded = Encoded(batch, is_packed, *hidden.split([num_words, batch.num_entities]))
        if callable(rows_to_compute):
            rows = rows_to_compute(encoded)
            rows_to_compute = None if output_hidden_states else rows
        states: list[tuple[Tensor, Tensor]] = []
        attentions: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            """Keep states as the batch came; the layers go on from what is kept, so that gradients reach it."""
            if not output_hidden_states:
                return hidden
            hidden = hidden.to(self.dtype)
            words, entities = encoded.as_words(hidden[:num_words]), encoded.as_entities(hidden[num_words:])
            states.append((words, entities))
            return torch.cat([encoded.take_words(words), encoded.take_entities(entities)])

        hidden = keep(hidden)
        optimized = None if output_attentions else self._optimized_layers(hidden)
        layers: list[Any] = self.layers[:num_layers]
        if optimized is not None:
            layers = optimized.choose(num_layers, one_by_one=output_hidden_states)
        for number, layer in enumerate(layers, 1):
            rows = rows_to_compute if number == len(layers) else None
            if output_attentions:
                context, probabilities = layer.attention["self"].with_probabilities(hidden, batch)
                hidden = layer.after_attention(hidden, context, rows)
                attentions.append(probabilities)
            elif self.checkpointing is not None and self.training and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, num_words, layout, rows, **self.checkpointing)
            else:
                hidden = layer(hidden, num_words, layout, rows)
            if rows is not None:
                # Each row from the place of one that is its own, or from the zeros in front.
                places = rows.new_zeros(num_words + batch.num_entities)
                places[rows] = torch.arange(1, len(rows) + 1, device=rows.device)
                hidden = F.pad(hidden, (0, 0, 1, 0)).index_select(0, places)
            hidden = keep(hidden)

        hidden = hidden.to(self.dtype)
        encoded.words, encoded.entities = hidden.split([num_words, batch.num_entities])
        if output_attentions:
            encoded.attentions = tuple(attentions)
        if output_hidden_states:
            encoded.hidden_states = tuple(words for words, _ in states)
            if batch.padded_entities:
                encoded.entity_hidden_states = tuple(entities for _, entities in states)
        return encoded

    def _optimized_layers(self, hidden: Tensor) -> "PackedLayers | GraphedLayers | None":
        """Return the optimized layers where they give what the layers would."""
        optimized = self.optimized
        if optimized is None or self.training or torch.compiler.is_compiling():
            return None
        if torch.is_autocast_enabled(hidden.device.type) or need_gradients(hidden, optimized.weights):
            return None
        optimized.check()
        return optimized

    def _check(self, batch: PackedBatch) -> None:
        config = self.config
        if batch.lengths.max_words > config.max_words:
            raise ValueError(
                f"input_ids must have at most {config.max_words} words a sequence (max_position_embeddings - "
                f"pad_token_id - 1), got {batch.lengths.max_words}"
            )
        if batch.inputs_embeds is not None and batch.inputs_embeds.shape[-1] != config.hidden_size:
            raise ValueError(
                f"inputs_embeds must have the hidden size {config.hidden_size}, got {batch.inputs_embeds.shape[-1]}"
            )
        if batch.pad_token_id not in (None, config.pad_token_id):
            raise ValueError(
                f"pad_token_id of a PackedBatch must be that of the model, {config.pad_token_id}, from which positions "
                f"are counted, got {batch.pad_token_id}"
            )
        positions, types = config.max_position_embeddings, config.type_vocab_size
        check_range("input_ids", batch.input_ids, 0, config.vocab_size)
        check_range("position_ids", batch.position_ids, 0, positions)
        check_range("token_type_ids", batch.token_type_ids, 0, types)
        check_range("entity_ids", batch.entity_ids, 0, config.entity_vocab_size)
        check_range("entity_position_ids", batch.entity_position_ids, -1, positions)
        check_range("entity_token_type_ids", batch.entity_token_type_ids, 0, types)
