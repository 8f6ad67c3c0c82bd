"""The sizes and settings of a LUKE model."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

# By the names that checkpoints use. "gelu" is the exact one, x * Phi(x).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": F.tanh,
}


@dataclass
class LukeConfig:
    """Configure a LUKE model; the defaults are those of the released luke-base.

    Args:
        vocab_size: Number V of word ids, `<ent>` and `<ent2>` included.
        entity_vocab_size: Number N of entity ids.
        hidden_size: Size C of the hidden states.
        entity_emb_size: Size of an entity's embedding before it is projected to C; None for C.
        num_hidden_layers, num_attention_heads, intermediate_size: Size of the encoder.
        hidden_act: Activation of the feed-forward layers and of entity prediction, a key of `ACTIVATIONS`.
        hidden_dropout_prob, attention_probs_dropout_prob: Dropout of hidden states and of attention probabilities.
        classifier_dropout: Dropout before the classifier of sequences, tokens and choices; None: hidden_dropout_prob.
        max_position_embeddings: Rows of the position tables; the longest sequence has pad_token_id + 1 fewer words.
        type_vocab_size: Number of token types.
        initializer_range: Standard deviation of new weights.
        layer_norm_eps: Epsilon of the layer norms.
        use_entity_aware_attention: Whether each pair of kinds has its own query.
        pad_token_id, bos_token_id, eos_token_id: Special word ids.
        tie_word_embeddings: Whether word prediction uses the word table; entity prediction always uses its own.
        num_labels: Number of labels of a head; None: as many as `id2label` has, or 2.
        id2label: Names of the labels; None: LABEL_0, LABEL_1, ...
        problem_type: Loss of sequence classification: "regression", "single_label_classification",
            "multi_label_classification", or None: told from num_labels and the labels.
        output_attentions, output_hidden_states: Whether models return them unless a call says otherwise.
        extra: Keys of a checkpoint's config.json that mean nothing here, kept for saving.

    Raises:
        ValueError: a size is not positive, or sizes do not fit one another.

    Source: the stored configurations of luke-base, Yamada et al. 2020, section 3 and appendix.
    """

    vocab_size: int = 50267
    entity_vocab_size: int = 500_000
    hidden_size: int = 768
    entity_emb_size: int | None = 256
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_entity_aware_attention: bool = True
    pad_token_id: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    num_labels: int | None = None
    id2label: dict[int, str] | None = None
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the number of labels and their names together when one of them is changed later."""
        ready = "_checked" in vars(self)
        object.__setattr__(self, name, value)
        if ready and name == "num_labels" and value != len(self.id2label or ()):
            object.__setattr__(self, "id2label", None)
            self._name_labels()
        elif ready and name == "id2label" and value is not None:
            object.__setattr__(self, "num_labels", len(value))

    def __post_init__(self) -> None:
        if self.entity_emb_size is None:
            self.entity_emb_size = self.hidden_size
        if self.num_labels is None:
            self.num_labels = 2 if self.id2label is None else len(self.id2label)
        for name in _SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
            if value > LARGEST_SIZE:
                raise ValueError(f"{name} must be at most {LARGEST_SIZE}, got {value}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if type(value) is not int and (value is not None or name == "pad_token_id"):
                raise TypeError(f"{name} must be an int, got {value!r}")
        for name in ("use_entity_aware_attention", "tie_word_embeddings", "output_attentions", "output_hidden_states"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            value = getattr(self, name)
            if (value is not None or name != "classifier_dropout") and not (_is_number(value) and 0 <= value < 1):
                raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not (_is_number(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        self._name_labels()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, {self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}")
        if not 0 <= self.pad_token_id < min(self.vocab_size, self.max_position_embeddings - 1):
            raise ValueError(
                f"pad_token_id must be a word id that leaves positions free, of {self.vocab_size} ids and "
                f"{self.max_position_embeddings} positions, got {self.pad_token_id}"
            )
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(
                f"problem_type must be None or one of {', '.join(PROBLEM_TYPES)}, got {self.problem_type!r}"
            )
        object.__setattr__(self, "_checked", True)

    def _name_labels(self) -> None:
        assert self.num_labels is not None
        if self.id2label is None:
            if self.num_labels > MOST_UNNAMED_LABELS:
                raise ValueError(f"id2label must be given for more than {MOST_UNNAMED_LABELS} labels, got None")
            self.id2label = {label: f"LABEL_{label}" for label in range(self.num_labels)}
        try:
            self.id2label = {int(label): name for label, name in self.id2label.items()}
        except (AttributeError, ValueError):
            raise TypeError(f"id2label must be a dict of names by int, got {self.id2label!r}") from None
        if len(self.id2label) != self.num_labels:
            raise ValueError(
                f"id2label must name num_labels, {self.num_labels}, labels, got {len(self.id2label)} names"
            )

    @property
    def max_words(self) -> int:
        """The longest sequence, special tokens included."""
        return self.max_position_embeddings - self.pad_token_id - 1

    @property
    def label2id(self) -> dict[str, int]:
        assert self.id2label is not None
        return {name: label for label, name in self.id2label.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], **changes: Any) -> "LukeConfig":
        """Read the keys of a config.json, those of others into `extra`; `changes` come last.

        Raises:
            ValueError: `changes` holds a key that is no setting, or values do not fit.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        for name in changes:
            if name not in known:
                raise ValueError(f"{name} must be a setting of LukeConfig, got {changes[name]!r}")
        if "num_labels" in changes and "id2label" not in changes:
            changes["id2label"] = None
        elif "id2label" in changes and "num_labels" not in changes:
            changes["num_labels"] = None
        # Derived from id2label, or the model's class.
        extra = {key: value for key, value in values.items() if key not in known | {"label2id", "model_type"}}
        kept = {key: value for key, value in values.items() if key in known}
        return cls(**{**kept, **changes}, extra=extra)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **changes: Any) -> "LukeConfig":
        """Read `directory`/config.json.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no JSON object, of another model, or its values do not fit.
        """
        path = Path(directory) / "config.json"
        values = read_json(path)
        if values.get("model_type", "luke") not in ("luke", "mluke"):
            raise ValueError(
                f"{path} must be of a LUKE model, got model_type {values['model_type']!r} (from_encoder starts a LUKE "
                "from other encoders)"
            )
        return cls.from_dict(values, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds, for transformers and for us."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["extra"], values["num_labels"]
        return {**self.extra, **values, "label2id": self.label2id, "model_type": "luke"}


# The product of two, in bytes, is still a size torch can count.
LARGEST_SIZE = 2**30
# A damaged file must not fill the memory with names.
MOST_UNNAMED_LABELS = 2**20
_SIZES = (
    "vocab_size",
    "entity_vocab_size",
    "hidden_size",
    "entity_emb_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "num_labels",
)
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must exist, got no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold JSON, got an error: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values
