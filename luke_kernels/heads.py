"""LUKE with a head: masked words and entities, entity typing, relations, spans, sequences, tokens, answers, choices.

Every head takes the inputs of `LukeModel`, padded or as a `PackedBatch`; parameters, outputs and losses are those of
transformers' classes of the same names.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luke_kernels.config import ACTIVATIONS, LukeConfig
from luke_kernels.losses import candidate_cross_entropy, linear_cross_entropy
from luke_kernels.model import Encoded, LukeModel, LukePreTrainedModel, ModelOutput, resized
from luke_kernels.ops.attention import described, readable
from luke_kernels.packing import PackedBatch, check_range


@dataclass
class MaskedLMOutput(ModelOutput):
    """`loss` is the sum of both; `logits` (B, W, V) and `entity_logits` (B, E, N), packed (Tw, V) and (Te, N)."""

    loss: Tensor | None = None
    mlm_loss: Tensor | None = None
    mep_loss: Tensor | None = None
    logits: Tensor | None = None
    entity_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    entity_hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class ClassifierOutput(ModelOutput):
    """`logits` before the softmax or sigmoid, their shape as the head says."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    entity_hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """Logits of where the answer starts and ends, (B, W), the least float in the pads; packed (Tw,)."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    entity_hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# The label of what is not to be predicted.
IGNORED = -100
# Inputs that span classification alone reads.
SPANS = ("entity_start_positions", "entity_end_positions")
# What heads take beside the inputs of LukeModel, all told.
ARGUMENTS = (
    *("labels", "entity_labels", "start_positions", "end_positions"),
    *("positions", "entity_candidates", "num_choices"),
    *SPANS,
)


class LukeHead(LukePreTrainedModel):
    """A head on `self.luke`: a subclass gives `score`, which turns packed states and labels into its output."""

    score: Callable[..., Any]
    reads_spans = False
    takes: ClassVar[set[str]]  # of ARGUMENTS

    def __init__(self, config: LukeConfig, *, pools: bool = False, backend: str = "auto"):
        super().__init__()
        self.config = config
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.luke = LukeModel(config, add_pooling_layer=pools, backend=backend)

    def __init_subclass__(cls) -> None:
        """Give the class a `forward` whose signature names what it takes: trainers read labels and columns there."""
        super().__init_subclass__()
        if "score" not in vars(cls) or "forward" in vars(cls):
            return
        names = [*list(inspect.signature(cls.score).parameters)[2:], *(SPANS if cls.reads_spans else ())]
        own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
        shared = inspect.signature(LukeHead.forward)
        kept = [p for p in shared.parameters.values() if p.kind is not p.VAR_KEYWORD]

        def forward(self: LukeHead, *args: Any, **kwargs: Any) -> Any:
            return LukeHead.forward(self, *args, **kwargs)

        forward.__doc__ = LukeHead.forward.__doc__
        forward.__signature__ = shared.replace(parameters=[*kept, *own])  # type: ignore[attr-defined]
        cls.forward, cls.takes = forward, set(names)  # type: ignore[method-assign]

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
        **arguments: Any,
    ) -> Any:
        """Encode a batch and score it; with labels, also the loss.

        Args:
            input_ids, ..., return_dict: As in `LukeModel`.
            arguments: What the class says it takes; labels of words and entities as the batch came.

        Returns:
            The output the class names.

        Raises:
            ValueError, TypeError: as in `LukeModel`; or an argument that this head does not take is given.
        """
        for name in arguments:
            if name not in ARGUMENTS:
                raise TypeError(f"{name} must be an argument of a head, got {name}={described(arguments[name])}")
        arguments = {name: value for name, value in arguments.items() if value is not None}
        for name, value in arguments.items():
            if name not in self.takes:
                raise ValueError(f"{name} must be None for {type(self).__name__}, got {described(value)}")
        inputs = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "entity_ids": entity_ids,
            "entity_attention_mask": entity_attention_mask,
            "entity_token_type_ids": entity_token_type_ids,
            "entity_position_ids": entity_position_ids,
            "inputs_embeds": inputs_embeds,
            **{name: arguments.pop(name) for name in SPANS if name in arguments},
        }
        if not isinstance(input_ids, PackedBatch):
            inputs["input_ids"] = input_ids
            inputs, arguments = self.arrange(inputs, arguments)
            input_ids = inputs.pop("input_ids")
        encoded = self.luke.encode(
            input_ids,
            **inputs,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            rows_to_compute=partial(self.rows_read, **arguments),
        )
        output = self.score(encoded, **arguments)
        output.hidden_states, output.entity_hidden_states = encoded.hidden_states, encoded.entity_hidden_states
        output.attentions = encoded.attentions
        return output.to_tuple() if return_dict is False else output

    def rows_read(self, encoded: Encoded, **arguments: Any) -> Tensor | None:
        """Return which rows of the last layer `score` reads, int64 (R,), words first; None: all.

        `encoded` holds the batch, and no states yet.
        """
        return None

    def init_head(self) -> None:
        """Draw the weights of the head; the encoder has drawn its own."""
        self.init_weights({name for name, _ in self.named_parameters() if not name.startswith("luke.")})

    def arrange(self, inputs: dict[str, Any], arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Bring padded inputs into the shapes that `LukeModel` takes."""
        return inputs, arguments


class LMHead(nn.Module):
    """Word prediction; the activation is gelu whatever the config says, as in every checkpoint."""

    def __init__(self, config: LukeConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # Tied by the model: no memory of its own.
        device = "meta" if config.tie_word_embeddings else None
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, device=device)
        self.bias = self.decoder.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, words: Tensor) -> Tensor:
        return self.decoder(self.transform(words))

    def transform(self, words: Tensor) -> Tensor:
        """Return what the decoder scores, (Tw, C)."""
        return self.layer_norm(F.gelu(self.dense(words)))


class EntityPredictions(nn.Module):
    """Entity prediction in the smaller size of the entity table."""

    def __init__(self, config: LukeConfig):
        super().__init__()
        emb_size = config.entity_emb_size
        assert emb_size is not None
        norm = nn.LayerNorm(emb_size, eps=config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, emb_size), "LayerNorm": norm})
        self.activation = ACTIVATIONS[config.hidden_act]
        self.decoder = nn.Linear(emb_size, config.entity_vocab_size, bias=False, device="meta")  # tied by the model
        self.bias = nn.Parameter(torch.zeros(config.entity_vocab_size))
        self.sparse = False  # whether candidates give the table a sparse gradient

    def forward(self, entities: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Score entities (Te, C) against all (Te, N), candidates (K,) for all, or candidates (Te, K) for each."""
        hidden = self.transformed(entities)
        if candidates is None:
            return self.decoder(hidden) + self.bias
        # Pads read a candidate of theirs, so that a sparse gradient has no row of another.
        padded = candidates.where(candidates >= 0, candidates.amax(dim=-1, keepdim=True)).clamp(min=0)
        table, bias = F.embedding(padded, self.decoder.weight, sparse=self.sparse), self.bias[padded]
        if candidates.dim() == 1:
            return F.linear(hidden, table, bias)
        return (torch.einsum("ed,ekd->ek", hidden, table) + bias).masked_fill(candidates < 0, -torch.inf)

    def transformed(self, entities: Tensor) -> Tensor:
        """Return what the decoder scores, (Te, D)."""
        return self.transform["LayerNorm"](self.activation(self.transform["dense"](entities)))


class LukeForMaskedLM(LukeHead):
    """Prediction of masked words and masked entities. Source: Yamada et al. 2020, section 3.3.

    `score` takes labels (B, W) and entity_labels (B, E), -100 where nothing is to be predicted; or, to score few:
    positions (B, P), columns of the padded batch whose words to score, -1 pads (packed: rows (P,)), giving logits
    (B, P, V); and entity_candidates, entity ids (K,), or (B, E, K) with -1 pads (packed: (Te, K)), giving
    entity_logits (B, E, K). entity_labels are ids too, which must be among the candidates where these are given: one
    that is not makes the loss infinite. Returns `MaskedLMOutput`; in training with labels the losses alone, of what has
    labels, without the logits of whole vocabularies in memory.
    """

    def __init__(self, config: LukeConfig, *, backend: str = "auto"):
        super().__init__(config, pools=True, backend=backend)
        self.lm_head = LMHead(config)
        self.entity_predictions = EntityPredictions(config)
        self.tie_weights()
        self.init_head()
        self.register_load_state_dict_pre_hook(_check_ties)
        self.register_load_state_dict_post_hook(_tie_again)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LukeForMaskedLM":
        # to_empty gives each use of a tied table memory of its own.
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.decoder.weight = self.get_input_embeddings().weight
        self.lm_head.decoder.bias = self.lm_head.bias
        self.entity_predictions.decoder.weight = self.get_entity_embeddings().weight

    def sparse_entity_gradients(self, enabled: bool = True) -> "LukeForMaskedLM":
        """As of every model; in training entity_labels then need entity_candidates."""
        self.entity_predictions.sparse = enabled
        return super().sparse_entity_gradients(enabled)

    def _resize_outputs(self, setting: str, size: int) -> None:
        std = self.config.initializer_range
        if setting == "entity_vocab_size":
            self.entity_predictions.bias = resized(self.entity_predictions.bias, size, 0.0)
            self.entity_predictions.decoder.out_features = size
            return
        self.lm_head.decoder.out_features = size
        self.lm_head.bias = resized(self.lm_head.bias, size, 0.0)
        if not self.config.tie_word_embeddings:
            self.lm_head.decoder.weight = resized(self.lm_head.decoder.weight, size, std)

    def score(
        self,
        encoded: Encoded,
        labels: Tensor | None = None,
        entity_labels: Tensor | None = None,
        positions: Tensor | None = None,
        entity_candidates: Tensor | None = None,
    ) -> MaskedLMOutput:
        for name, value in (("labels", labels), ("entity_labels", entity_labels)):
            if positions is not None and value is not None and (self.training or name == "labels"):
                raise ValueError(f"positions must be None where {name} is given, got {described(positions)}")
        candidates = None if entity_candidates is None else self._candidates(encoded, entity_candidates)
        if self.training and (labels is not None or entity_labels is not None):
            return self._losses(encoded, labels, entity_labels, candidates)
        output = MaskedLMOutput()
        if positions is None:
            logits = self.lm_head(encoded.words)
            if labels is not None:
                output.mlm_loss = F.cross_entropy(logits, encoded.take_words(labels))
            output.logits = encoded.as_words(logits)
        else:
            output.logits = self._score_positions(encoded, positions)
        if encoded.batch.padded_entities:
            entity_logits = self.entity_predictions(encoded.entities, candidates)
            if entity_labels is not None:
                targets = encoded.take_entities(entity_labels, "entity_labels")
                output.mep_loss = _entity_loss(entity_logits, targets, candidates)
            output.entity_logits = encoded.as_entities(entity_logits)
        losses = [loss for loss in (output.mlm_loss, output.mep_loss) if loss is not None]
        output.loss = sum(losses[1:], losses[0]) if losses else None
        return output

    def _candidates(self, encoded: Encoded, candidates: Tensor) -> Tensor:
        """Return candidates as (K,) or (Te, K)."""
        if not isinstance(candidates, Tensor):
            raise TypeError(f"entity_candidates must be a tensor, got {type(candidates).__name__}")
        check_range("entity_candidates", candidates, 0 if candidates.dim() == 1 else -1, self.config.entity_vocab_size)
        if candidates.dim() == 0 or candidates.shape[-1] == 0:
            raise ValueError(f"entity_candidates must hold one at least, got {tuple(candidates.shape)}")
        if candidates.dim() == 1:
            return candidates.to(encoded.words.device)
        candidates = encoded.take_entities(candidates, "entity_candidates")
        if candidates.dim() != 2 or candidates.shape[0] != encoded.batch.num_entities:
            raise ValueError(
                f"entity_candidates must be (K,), (B, E, K) or packed (Te, K), got {tuple(candidates.shape)} packed"
            )
        return candidates

    def rows_read(
        self,
        encoded: Encoded,
        labels: Tensor | None = None,
        entity_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor | None:
        if not self.training or (labels is None and entity_labels is None):
            return None
        words, entities = encoded.labelled = _labelled(encoded, labels, entity_labels)
        return torch.cat([words, entities + encoded.batch.num_words])

    def _losses(
        self, encoded: Encoded, labels: Tensor | None, entity_labels: Tensor | None, candidates: Tensor | None
    ) -> MaskedLMOutput:
        """Return the losses alone, of the words and entities that have labels."""
        assert encoded.labelled is not None
        words, entities = encoded.labelled
        output = MaskedLMOutput()
        if labels is not None:
            hidden = self.lm_head.transform(encoded.words.index_select(0, words))
            decoder, targets = self.lm_head.decoder, encoded.take_words(labels).index_select(0, words)
            output.mlm_loss = linear_cross_entropy(hidden, decoder.weight, self.lm_head.bias, targets)
        if entity_labels is not None and encoded.batch.padded_entities:
            predictions, hidden = self.entity_predictions, encoded.entities.index_select(0, entities)
            targets = encoded.take_entities(entity_labels, "entity_labels").index_select(0, entities)
            if candidates is not None:
                candidates = candidates if candidates.dim() == 1 else candidates.index_select(0, entities)
                output.mep_loss = _entity_loss(predictions(hidden, candidates), targets, candidates)
            elif predictions.sparse:
                raise ValueError(
                    "entity_candidates must be given in training with entity_labels where the table of entities has a "
                    "sparse gradient (sparse_entity_gradients), got None"
                )
            else:
                hidden, table = predictions.transformed(hidden), predictions.decoder.weight
                output.mep_loss = linear_cross_entropy(hidden, table, predictions.bias, targets)
        losses = [loss for loss in (output.mlm_loss, output.mep_loss) if loss is not None]
        output.loss = sum(losses[1:], losses[0]) if losses else None
        return output

    def _score_positions(self, encoded: Encoded, positions: Tensor) -> Tensor:
        if encoded.is_packed:
            if positions.dim() != 1:
                raise ValueError(f"positions must be rows (P,) of a packed batch, got {tuple(positions.shape)}")
            check_range("positions", positions, 0, len(encoded.words))
            return self.lm_head(encoded.words.index_select(0, positions))
        words = encoded.as_words(encoded.words)
        if positions.dim() != 2 or positions.shape[0] != words.shape[0]:
            raise ValueError(f"positions must be (B, P) with B = {words.shape[0]}, got {tuple(positions.shape)}")
        check_range("positions", positions, -1, words.shape[1])
        inside = positions.clamp(min=0)
        exists = encoded.as_words(torch.ones_like(encoded.batch.word_rows, dtype=torch.bool)).gather(1, inside)
        logits = self.lm_head(words.gather(1, inside[..., None].expand(-1, -1, words.shape[-1])))
        return logits.masked_fill(((positions < 0) | ~exists)[..., None], 0)


def _entity_loss(logits: Tensor, labels: Tensor, candidates: Tensor | None) -> Tensor:
    if candidates is None:
        return F.cross_entropy(logits, labels)
    candidates = candidates.to(labels.device)
    missing = (labels != IGNORED) & (candidates != labels[:, None]).all(dim=1)
    if readable(missing) and missing.any():
        raise ValueError(f"entity_labels must be among entity_candidates, got {labels[missing][0].item()}")
    return candidate_cross_entropy(logits, candidates, labels, IGNORED)


def _labelled(encoded: Encoded, labels: Tensor | None, entity_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the rows of the words, and of the entities, that have labels. Labels on the CPU wait for no device."""
    device = encoded.batch.position_ids.device
    found = []
    for given, take, name in (
        (labels, encoded.take_words, "labels"),
        (entity_labels, encoded.take_entities, "entity_labels"),
    ):
        taken = torch.empty(0, dtype=torch.int64) if given is None else take(given, name)
        found.append((taken != IGNORED).nonzero().squeeze(1).to(device))
    return found[0], found[1]


def _tie_again(module: nn.Module, _: Any) -> None:
    """Make one table of what `assign=True` put in its places."""
    assert isinstance(module, LukeForMaskedLM)
    module.tie_weights()


def _check_ties(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Fill what a state dict leaves out because it is tied; refuse one whose tied tables differ.

    That of a fresh LukeForMaskedLM of transformers 5 does: its decoder would overwrite the word table.
    """
    assert isinstance(module, LukeForMaskedLM)
    ties = {
        "entity_predictions.decoder.weight": "luke.entity_embeddings.entity_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }
    if module.config.tie_word_embeddings:
        ties["lm_head.decoder.weight"] = "luke.embeddings.word_embeddings.weight"
    for alias, table in ((prefix + alias, prefix + table) for alias, table in ties.items()):
        if table in state and alias not in state:
            state[alias] = state[table]
        elif table in state and not torch.equal(state[alias], state[table]):
            raise ValueError(
                f"{alias} must equal {table} in a model that ties them, got a state dict where they differ"
            )


class LukeForEntityClassification(LukeHead):
    """Typing of each sequence's first entity, as for Open Entity.

    labels: (B,) of classes, or (B, num_labels) of 0 and 1 where several may hold. logits (B, num_labels).
    """

    def __init__(self, config: LukeConfig, *, backend: str = "auto"):
        super().__init__(config, pools=True, backend=backend)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.init_head()

    def rows_read(self, encoded: Encoded, **_: Any) -> Tensor:
        return _rows_of_first_entities(encoded, 1)

    def score(self, encoded: Encoded, labels: Tensor | None = None) -> ClassifierOutput:
        logits = self.classifier(self.dropout(encoded.first_entities(1).flatten(1)))
        return ClassifierOutput(_one_or_several(logits, labels), logits)


class LukeForEntityPairClassification(LukeHead):
    """Relation between each sequence's first two entities, as for TACRED.

    labels: (B,) of classes, or (B, num_labels) of 0 and 1 where several may hold. logits (B, num_labels).
    """

    def __init__(self, config: LukeConfig, *, backend: str = "auto"):
        super().__init__(config, pools=True, backend=backend)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(2 * config.hidden_size, self.num_labels, bias=False)
        self.init_head()

    def rows_read(self, encoded: Encoded, **_: Any) -> Tensor:
        return _rows_of_first_entities(encoded, 2)

    def score(self, encoded: Encoded, labels: Tensor | None = None) -> ClassifierOutput:
        logits = self.classifier(self.dropout(encoded.first_entities(2).flatten(1)))
        return ClassifierOutput(_one_or_several(logits, labels), logits)


class LukeForEntitySpanClassification(LukeHead):
    """Classification of every entity by its first word, its last word and itself, as for named entity recognition.

    Needs entity_start_positions and entity_end_positions (B, E), first and last column of each mention.
    labels: (B, E) of classes, -100 ignored, or (B, E, num_labels) of 0 and 1; packed (Te, ...).
    logits (B, E, num_labels); packed (Te, num_labels).
    """

    reads_spans = True

    def __init__(self, config: LukeConfig, *, backend: str = "auto"):
        super().__init__(config, pools=True, backend=backend)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(3 * config.hidden_size, self.num_labels)
        self.init_head()

    def rows_read(self, encoded: Encoded, **_: Any) -> Tensor | None:
        num_words, num_entities = encoded.batch.num_words, encoded.batch.num_entities
        boundaries = _boundaries(encoded)
        # Words that bound several spans would be computed for each.
        if 2 * num_entities >= num_words:
            return None
        entities = torch.arange(num_words, num_words + num_entities, device=boundaries[0].device)
        return torch.cat([*(encoded.rows_of_words(ranks) for ranks in boundaries), entities])

    def score(self, encoded: Encoded, labels: Tensor | None = None) -> ClassifierOutput:
        features = [encoded.words_of_entities(ranks) for ranks in _boundaries(encoded)]
        logits = self.classifier(self.dropout(torch.cat([*features, encoded.entities], dim=1)))
        loss = None
        if labels is not None:
            loss = _one_or_several(logits, encoded.take_entities(labels))
        return ClassifierOutput(loss, encoded.as_entities(logits))


class LukeForSequenceClassification(LukeHead):
    """Classification or regression of the pooled first word.

    labels: (B,), or (B, num_labels); the loss is that of config.problem_type. logits (B, num_labels).
    """

    def __init__(self, config: LukeConfig, *, backend: str = "auto"):
        super().__init__(config, pools=True, backend=backend)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.init_head()

    def rows_read(self, encoded: Encoded, **_: Any) -> Tensor | None:
        return _rows_of_first_words(encoded)

    def score(self, encoded: Encoded, labels: Tensor | None = None) -> ClassifierOutput:
        logits = self.classifier(self.dropout(self.luke.pool(encoded)))
        if labels is None:
            return ClassifierOutput(None, logits)
        labels = labels.to(logits.device)
        problem_type = self.config.problem_type
        if problem_type is None:
            if self.num_labels == 1:
                problem_type = "regression"
            elif labels.dtype.is_floating_point:
                problem_type = "multi_label_classification"
            else:
                problem_type = "single_label_classification"
        if problem_type == "regression":
            loss = F.mse_loss(logits.view_as(labels), labels)
        elif problem_type == "single_label_classification":
            loss = F.cross_entropy(logits, labels.flatten())
        else:
            loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return ClassifierOutput(loss, logits)


class LukeForTokenClassification(LukeHead):
    """Classification of every word.

    labels: (B, W) of classes, -100 ignored. logits (B, W, num_labels); packed (Tw, ...).
    """

    def __init__(self, config: LukeConfig, *, backend: str = "auto"):
        super().__init__(config, backend=backend)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.init_head()

    def rows_read(self, encoded: Encoded, **_: Any) -> Tensor | None:
        return _rows_of_words(encoded)

    def score(self, encoded: Encoded, labels: Tensor | None = None) -> ClassifierOutput:
        logits = self.classifier(self.dropout(encoded.words))
        loss = None if labels is None else F.cross_entropy(logits, encoded.take_words(labels))
        return ClassifierOutput(loss, encoded.as_words(logits))


class LukeForQuestionAnswering(LukeHead):
    """Where an answer starts and ends, as for SQuAD.

    start_positions, end_positions: (B,), columns of the words; those outside the sequence are ignored. Pads take no
    part: their logits are the least float.
    """

    def __init__(self, config: LukeConfig, *, backend: str = "auto"):
        super().__init__(config, backend=backend)
        if self.num_labels != 2:
            raise ValueError(f"num_labels must be 2, start and end, for question answering, got {self.num_labels}")
        self.qa_outputs = nn.Linear(config.hidden_size, self.num_labels)
        self.init_head()

    def rows_read(self, encoded: Encoded, **_: Any) -> Tensor | None:
        return _rows_of_words(encoded)

    def score(
        self, encoded: Encoded, start_positions: Tensor | None = None, end_positions: Tensor | None = None
    ) -> QuestionAnsweringOutput:
        logits = self.qa_outputs(encoded.words)
        lowest = torch.finfo(logits.dtype).min
        losses = []
        if start_positions is not None and end_positions is not None:
            padded = encoded.batch.pad_words(logits, lowest)
            ignored = padded.shape[1]
            exists = F.pad(encoded.batch.pad_words(torch.ones_like(encoded.batch.word_rows, dtype=torch.bool)), (0, 1))
            for slot, targets in enumerate((start_positions, end_positions)):
                targets = targets.to(padded.device).flatten().clamp(0, ignored)
                targets = targets.where(exists.gather(1, targets[:, None]).squeeze(1), ignored)
                losses.append(F.cross_entropy(padded[..., slot], targets, ignore_index=ignored))
        start_logits, end_logits = encoded.as_words(logits, lowest).unbind(dim=-1)
        return QuestionAnsweringOutput(torch.stack(losses).mean() if losses else None, start_logits, end_logits)


class LukeForMultipleChoice(LukeHead):
    """Choice among several sequences by their pooled first words.

    Inputs are (B, choices, ...); packed, the B * num_choices sequences one after another, with num_choices given.
    labels: (B,). logits (B, choices).
    """

    def __init__(self, config: LukeConfig, *, backend: str = "auto"):
        super().__init__(config, pools=True, backend=backend)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.init_head()

    def arrange(self, inputs: dict[str, Any], arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        given = {name: value for name, value in inputs.items() if value is not None}
        for name, value in given.items():
            if value.dim() < 3:
                raise ValueError(f"{name} must be (B, choices, ...), got {tuple(value.shape)}")
        flat = {name: value.flatten(0, 1) for name, value in given.items()}
        # Shapes that disagree are found when the batch is packed.
        choices = [value.shape[1] for value in given.values()]
        return {**inputs, **flat}, {**({"num_choices": choices[0]} if choices else {}), **arguments}

    def rows_read(self, encoded: Encoded, **_: Any) -> Tensor | None:
        return _rows_of_first_words(encoded)

    def score(self, encoded: Encoded, labels: Tensor | None = None, num_choices: int | None = None) -> ClassifierOutput:
        if num_choices is None or num_choices < 1 or encoded.batch.batch_size % num_choices:
            raise ValueError(
                f"num_choices must divide the number of sequences, {encoded.batch.batch_size}, got {num_choices}"
            )
        logits = self.classifier(self.dropout(self.luke.pool(encoded))).view(-1, num_choices)
        loss = None if labels is None else F.cross_entropy(logits, labels.to(logits.device))
        return ClassifierOutput(loss, logits)


def _rows_of_first_entities(encoded: Encoded, count: int) -> Tensor:
    """Return the rows of the first entities of every sequence, (B * count,)."""
    lengths = encoded.batch.lengths
    cu_entities, fewest = lengths.cu_entities, lengths.min_entities
    if fewest is None and readable(cu_entities):
        fewest = int(cu_entities.diff().min())
    if encoded.batch.batch_size and fewest is not None and fewest < count:
        raise ValueError(f"entity_ids must hold at least {count} entities in each sequence, got one with {fewest}")
    return encoded.batch.num_words + encoded.rows_of_first_entities(count)


def _rows_of_words(encoded: Encoded) -> Tensor | None:
    if not encoded.batch.num_entities:
        return None
    return torch.arange(encoded.batch.num_words, device=encoded.batch.position_ids.device)


def _rows_of_first_words(encoded: Encoded) -> Tensor | None:
    return encoded.rows_of_first_words() if encoded.batch.num_words else None


def _boundaries(encoded: Encoded) -> tuple[Tensor, Tensor]:
    starts, ends = encoded.batch.entity_start_positions, encoded.batch.entity_end_positions
    if starts is None or ends is None:
        raise ValueError("entity_start_positions and entity_end_positions must be given for span classification")
    return starts, ends


def _one_or_several(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Cross-entropy where labels name one class of each row, binary cross-entropy where they hold 0 and 1 for each."""
    if labels is None:
        return None
    labels = labels.to(logits.device)
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _classifier_dropout(config: LukeConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
