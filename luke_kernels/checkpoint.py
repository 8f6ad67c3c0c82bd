"""Checkpoints in and out: ours and transformers' (the same), the original repository's, RoBERTa's and BERT's.

Headers are read first: names and shapes are compared with those of the model, which has no memory yet, and only then
are tensors taken.
"""

import json
import os
import re
import secrets
import stat
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luke_kernels.config import LukeConfig, read_json
from luke_kernels.entity_vocab import read_entity_vocab
from luke_kernels.sources import Source, Stored

if TYPE_CHECKING:
    from luke_kernels.model import LukePreTrainedModel

Tensors = dict[str, Stored]

# Names in other checkpoints, and ours; applied in turn.
RENAMES = (
    (r"^module\.", ""),  # saved from a wrapped model
    (r"^(roberta|bert)\.", "luke."),
    (r"^(embeddings|entity_embeddings|encoder|pooler)\.", r"luke.\1."),  # the original repository, or a bare encoder
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"^cls\.predictions\.transform\.dense\.", "lm_head.dense."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "lm_head.layer_norm."),
    (r"^cls\.predictions\.(bias|decoder\.)", r"lm_head.\1"),
)
# Buffers of old versions, and heads that LUKE does not have.
IGNORED = re.compile(r"\.position_ids$|^cls_entity_predictions\.|^cls\.seq_relationship\.")
ENTITY_PARTS = re.compile(r"^(luke\.entity_embeddings|entity_predictions)\.")
HEADS = re.compile(r"^(lm_head|entity_predictions|classifier|qa_outputs)\.|^luke\.pooler\.")
CLASSIFIERS = ("classifier.", "qa_outputs.")
QUERIES = re.compile(r"\.(w2e|e2w|e2e)(_query\.(?:weight|bias))$")
ENTITY_SETTINGS = ("entity_vocab_size", "entity_emb_size", "use_entity_aware_attention")
# The encoders that LUKE starts from, by their config's model_type.
ENCODERS = ("roberta", "xlm-roberta", "bert")

WORDS = "luke.embeddings.word_embeddings.weight"
WORD_POSITIONS = "luke.embeddings.position_embeddings.weight"
ENTITIES = "luke.entity_embeddings.entity_embeddings.weight"
ENTITY_POSITIONS = "luke.entity_embeddings.position_embeddings.weight"
WORD_DECODER = "lm_head.decoder.weight"
ENTITY_DECODER = "entity_predictions.decoder.weight"
ENTITY_BIAS = "entity_predictions.bias"
# Tensors with one row per word.
WORD_ROWS = (WORDS, WORD_DECODER, "lm_head.bias", "lm_head.decoder.bias")
# Encoders on the hub, by their number of words and hidden size.
HUB_ENCODERS = {
    (50265, 768): "roberta-base",
    (50265, 1024): "roberta-large",
    (250002, 768): "xlm-roberta-base",
    (250002, 1024): "xlm-roberta-large",
}
# "@" and "#" in RoBERTa's vocabulary, which archives of the original repository do not hold.
ROBERTA_MARKERS = (1039, 10431)
SAVED_WEIGHTS = re.compile(r"model(-[0-9a-f]{8})?(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def kind_of(source: Source) -> str:
    """Return the kind of a checkpoint: "original", "encoder", or "luke", which is ours and transformers'.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: the config is of another model.
    """
    if _is_original(source):
        return "original"
    model_type = read_json(source.directory / "config.json").get("model_type", "luke")
    if model_type not in ("luke", "mluke", *ENCODERS):
        raise ValueError(
            f"{source.name} must be a LUKE or a roberta, xlm-roberta or bert encoder, got model_type {model_type!r}"
        )
    return "encoder" if model_type in ENCODERS else "luke"


def read_config(source: Source, changes: dict[str, Any]) -> LukeConfig:
    """Read the config of ours, of transformers or of the original repository; `changes` replace settings."""
    if not _is_original(source):
        return LukeConfig.from_pretrained(source.directory, **changes)
    values = dict(_original_config(source))
    if _lacks_markers(values):
        values["vocab_size"] += 2
    rows = _mask_rows(source, values)
    if rows is not None and rows[1] == values["entity_vocab_size"]:
        values["entity_vocab_size"] += 1
    return LukeConfig.from_dict(values, **changes)


def read_tensors(source: Source) -> Tensors:
    """Return all tensors under our names; only headers are read.

    The original repository's tables get the rows that transformers' have: two markers, and [MASK2] as [MASK].

    Raises:
        FileNotFoundError, ValueError: as `Source.tensors`; or two names mean the same tensor.
    """
    tensors: Tensors = {}
    for name, stored in source.tensors():
        if rename(name) in tensors:
            raise ValueError(f"{source.name} must hold each tensor once, got {rename(name)} twice")
        tensors[rename(name)] = stored
    if "lm_head.bias" not in tensors and "lm_head.decoder.bias" in tensors:
        tensors["lm_head.bias"] = tensors["lm_head.decoder.bias"]
    if not _is_original(source):
        return tensors
    values = _original_config(source)
    if _lacks_markers(values):
        tensors = with_markers(tensors, ROBERTA_MARKERS)
    if (rows := _mask_rows(source, values)) is not None:
        mask, mask2 = rows
        for name in (ENTITIES, ENTITY_DECODER, ENTITY_BIAS):
            if name in tensors:
                tensors[name] = _with_row(tensors[name], mask2, mask)
    return tensors


def _is_original(source: Source) -> bool:
    return (source.directory / "metadata.json").is_file() and not (source.directory / "config.json").is_file()


def _original_config(source: Source) -> dict[str, Any]:
    path = source.directory / "metadata.json"
    values = read_json(path).get("model_config")
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object model_config, got {values!r}")
    _check_ints(path, values, "vocab_size", "entity_vocab_size")
    return values


def _check_ints(path: Path, values: dict[str, Any], *names: str) -> None:
    for name in names:
        if type(values.get(name)) is not int:
            raise ValueError(f"{path}: {name} must be a positive int, got {values.get(name)!r}")


def _mask_rows(source: Source, values: dict[str, Any]) -> tuple[int, int] | None:
    """Return the rows of [MASK] and [MASK2] in the entity table: as its vocabulary says, or one more for [MASK2]."""
    for name in ("entity_vocab.tsv", "entity_vocab.jsonl"):
        if (source.directory / name).is_file():
            vocabulary = read_entity_vocab(source.directory / name)
            size = values["entity_vocab_size"]
            # Titles may bear a language, "en:[MASK]".
            rows = {title.rpartition(":")[2]: row for title, row in vocabulary.items() if "[MASK" in title}
            mask, mask2 = rows.get("[MASK]"), rows.get("[MASK2]", size)
            if mask is None:
                return None
            if not (mask < size and mask2 <= size):
                raise ValueError(f"{name} must have ids of {size} entities, got {mask} for [MASK], {mask2} for [MASK2]")
            return mask, mask2
    return None


def rename(name: str) -> str:
    """Return our name of a tensor."""
    for pattern, ours in RENAMES:
        name = re.sub(pattern, ours, name)
    return name


def load(
    model: "LukePreTrainedModel",
    name: str,
    stored: Tensors,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    entities_are_new: bool = False,
) -> None:
    """Fill a model that lies on the meta device.

    Args:
        name: Name of the checkpoint in errors.
        stored: Its tensors.
        entities_are_new: Whether it comes from an encoder without entities: the entity parts it lacks are drawn, and
            its classifier, which is of another task, is left out.

    Raises:
        ValueError: tensors are missing or of other shapes; one message names them all. Or one holds no floats.
    """
    if not hasattr(model, "luke"):
        stored = {name.removeprefix("luke."): tensor for name, tensor in stored.items()}
    stored = {name: tensor for name, tensor in stored.items() if not IGNORED.search(name)}
    if entities_are_new:
        stored = {name: t for name, t in stored.items() if not name.startswith(CLASSIFIERS)}
    _untie_if_different(model, stored)
    wanted = dict(model.named_parameters())
    aliases = dict(model.named_parameters(remove_duplicate=False))
    for key in wanted:
        if key not in stored and (query := query_of(key)) in stored:
            stored[key] = stored[query]

    fresh = {key for key in wanted if key not in stored and _may_be_new(key, entities_are_new)}
    problems = {
        "missing": sorted(key for key in wanted if key not in stored and key not in fresh),
        "misshapen": [
            f"{key} {stored[key].shape} where the config says {tuple(parameter.shape)}"
            for key, parameter in wanted.items()
            if key in stored and stored[key].shape != tuple(parameter.shape)
        ],
    }
    # Weights of another head are left out without notice.
    surplus = [key for key in stored if key not in wanted | aliases and not HEADS.search(rename(key))]
    notes = {"new, to be trained": sorted(fresh), "unexpected, left out": surplus}
    if any(problems.values()):
        raise ValueError(f"{name} must fit {type(model).__name__}, got weights {_listed(problems | notes)}")

    filled = {key: _taken(name, key, stored[key], device, dtype) for key in wanted if key in stored}
    new_dtype = dtype or next((t.dtype for t in filled.values()), torch.float32)
    filled |= {key: torch.empty(wanted[key].shape, device=device, dtype=new_dtype) for key in fresh}
    addresses = set()
    for key, tensor in filled.items():
        if tensor.data_ptr() in addresses:  # a copied query has memory of its own
            tensor = tensor.clone()
        addresses.add(tensor.data_ptr())
        owner, _, attribute = key.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor))
    model.tie_weights()
    model.init_weights(fresh)
    if entities_are_new:
        notes["new, to be trained"] = [key for key in sorted(fresh) if not ENTITY_PARTS.search(rename(key))]
    if any(notes.values()):
        warnings.warn(f"{type(model).__name__} from {name}: weights {_listed(notes)}", stacklevel=3)


def _listed(names: dict[str, list[str]]) -> str:
    return "; ".join(f"{what}: {', '.join(keys)}" for what, keys in names.items() if keys)


def _taken(name: str, key: str, stored: Stored, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    tensor = stored.read()
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must hold floating-point weights, got {key} of {tensor.dtype}")
    return tensor.to(device, dtype or tensor.dtype).contiguous()


def query_of(name: str) -> str | None:
    """Return the name of the query that an extra query is a copy of at first; None of another weight."""
    match = QUERIES.search(name)
    return name[: match.start() + 1] + match[2].removeprefix("_") if match else None


def has_head_of(model: "LukePreTrainedModel", stored: Tensors, entities_are_new: bool) -> bool:
    """Return whether `load` would draw nothing of a model's head, and no pooler."""
    drawn = {rename(name) for name, _ in model.named_parameters()} - stored.keys() - {WORD_DECODER}
    return not any(HEADS.search(name) and not (entities_are_new and ENTITY_PARTS.search(name)) for name in drawn)


def without_place(model: "LukePreTrainedModel", stored: Tensors) -> list[str]:
    """Return the weights of a checkpoint that a model has no place for."""
    places = {rename(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    return [name for name in stored if name not in places and not name.endswith(".position_ids")]


def without_other_labels(model: "LukePreTrainedModel", stored: Tensors) -> Tensors:
    """Leave out a classifier of another number of labels than was asked for."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {
        name: tensor
        for name, tensor in stored.items()
        if not name.startswith(CLASSIFIERS) or tensor.shape == shapes.get(name)
    }


def check_depth(name: str, config: LukeConfig, stored: Tensors) -> None:
    """Raise unless the checkpoint has as many layers as the config says: a damaged config builds no endless model."""
    depth = 1 + max((int(m[1]) for key in stored if (m := re.search(r"encoder\.layer\.(\d+)\.", key))), default=-1)
    if config.num_hidden_layers > depth:
        raise ValueError(f"{name} must hold the config's num_hidden_layers, {config.num_hidden_layers}, got {depth}")


def _may_be_new(name: str, entities_are_new: bool) -> bool:
    name = rename(name)
    return bool(HEADS.search(name) or (entities_are_new and ENTITY_PARTS.search(name)))


def _untie_if_different(model: "LukePreTrainedModel", stored: Tensors) -> None:
    """Heed a word decoder that is not the word table: transformers 5 trains it apart."""
    if not hasattr(model, "lm_head"):
        return
    for alias, table in ((ENTITY_DECODER, ENTITIES), ("lm_head.decoder.bias", "lm_head.bias")):
        if not _equal(stored.get(alias), stored.get(table)):
            raise ValueError(f"{alias} must equal {table}, got a checkpoint where they differ")
    differs = not _equal(stored.get(WORD_DECODER), stored.get(WORDS))
    untied = differs or (not model.config.tie_word_embeddings and WORD_DECODER in stored)
    if differs and model.config.tie_word_embeddings:
        warnings.warn(f"{WORD_DECODER} differs from {WORDS} in this checkpoint: they are kept apart", stacklevel=4)
    model.config.tie_word_embeddings = not untied
    if untied:
        decoder = model.get_submodule("lm_head.decoder")
        decoder.weight = nn.Parameter(torch.empty_like(model.get_parameter(WORD_DECODER)))
    model.tie_weights()


def _equal(a: Stored | None, b: Stored | None) -> bool:
    """Return whether two tensors are one, as far as both are there to tell and of one shape."""
    return a is None or b is None or a.shape != b.shape or torch.equal(a.read(), b.read())


def save(model: "LukePreTrainedModel", directory: str | Path, max_shard_size: int | str) -> None:
    """Write a model for us and for transformers."""
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if hasattr(model, "lm_head"):
        # transformers 5 does not tie the word decoder: without a copy of its own it would be random there.
        for alias in (WORD_DECODER, "lm_head.decoder.bias"):
            state[alias] = model.get_parameter(alias).detach()
        if not model.config.tie_word_embeddings:
            state[ENTITY_DECODER] = model.get_parameter(ENTITY_DECODER).detach()
    write(state, _config_of(model), directory, max_shard_size)


def check_shard_size(value: int | str) -> int | str:
    """Return a size as huggingface_hub takes it: a number of bytes as an int.

    Raises:
        ValueError: it is neither a positive number of bytes nor like 5GB.
    """
    if isinstance(value, str) and re.fullmatch(r"[1-9]\d*", value, re.ASCII):
        return int(value)
    if (type(value) is int and value > 0) or (isinstance(value, str) and re.fullmatch(r"[1-9]\d*[KMGT]B", value)):
        return value
    raise ValueError(f"max_shard_size must be a number of bytes or like 5GB, got {value!r}")


def write(state: dict[str, Tensor], config: dict[str, Any], directory: str | Path, max_shard_size: int | str) -> None:
    """Write config.json and tensors as safetensors aside, then move them into place; tied tensors are all written."""
    from huggingface_hub import save_torch_state_dict

    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory must be a directory, got the file {directory}")
    max_shard_size = check_shard_size(max_shard_size)
    # Of tensors that share memory huggingface_hub writes one.
    names_by_address: dict[int, str] = {}
    for name, tensor in state.items():
        names_by_address.setdefault(tensor.data_ptr(), name)
    state = {name: t if names_by_address[t.data_ptr()] == name else t.clone() for name, t in state.items()}
    # On the file system of `directory`, so that files can be renamed into it; an error before that leaves nothing.
    existing = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=existing) as aside:
        # Shards get names that no checkpoint in `directory` has: an index always names shards of its own.
        pattern = f"model-{secrets.token_hex(4)}{{suffix}}.safetensors"
        save_torch_state_dict(
            state, aside, filename_pattern=pattern, max_shard_size=max_shard_size, metadata={"format": "pt"}
        )
        for entry in (pattern.format(suffix=""), pattern.format(suffix="") + ".index.json"):
            if (Path(aside) / entry).exists():
                os.rename(Path(aside) / entry, Path(aside) / re.sub(r"-[0-9a-f]{8}", "", entry))
        (Path(aside) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # safetensors makes files that only their owner may read.
        mode = stat.S_IMODE((Path(aside) / "config.json").stat().st_mode)
        directory.mkdir(parents=True, exist_ok=True)
        # Shards before the files that name them: a reader in between finds the old weights or the new ones.
        names = sorted(os.listdir(aside), key=lambda name: ("-of-" not in name, name == "config.json"))
        for name in names:
            (Path(aside) / name).chmod(mode)
            os.replace(Path(aside) / name, directory / name)
    for path in directory.iterdir():
        if SAVED_WEIGHTS.fullmatch(path.name) and path.name not in names:
            path.unlink()


def _config_of(model: "LukePreTrainedModel") -> dict[str, Any]:
    config = {
        **model.config.to_dict(),
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    for key in ("torch_dtype", "auto_map"):  # the dtype as transformers 4 called it; code that is not ours
        config.pop(key, None)
    return config


def as_original(model: "LukePreTrainedModel") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and config as the original repository has them; what `read_tensors` makes up is left out.

    Raises:
        ValueError: the words are not RoBERTa's: the original repository would count their positions otherwise.

    Warns:
        UserWarning: the config does not name the encoder on the hub, whose tokenizer the original repository loads.
    """
    values = _config_of(model)
    encoder = values.setdefault("bert_model_name", "roberta" if model.config.pad_token_id == 1 else "bert")
    if "roberta" not in str(encoder):
        raise ValueError(
            f"to must be luke or encoder for a LUKE whose words are no RoBERTa's, got original of {encoder}"
        )
    if encoder in ("roberta", "xlm-roberta"):  # its kind alone, as of an encoder from a folder
        encoder = HUB_ENCODERS.get((values["vocab_size"] - 2, values["hidden_size"]), encoder)
        values["bert_model_name"] = encoder
        warnings.warn(
            f"bert_model_name in metadata.json is {encoder!r}, inferred from the model's sizes: it must be the hub id "
            "of the encoder whose tokenizer the model uses",
            stacklevel=3,
        )
    state = _named(model)
    queries = {name: query for name in state if (query := query_of(name)) is not None}
    if all(torch.equal(state[name], state[query]) for name, query in queries.items()):
        state = {name: tensor for name, tensor in state.items() if name not in queries}
    fewer = {**values, "vocab_size": values["vocab_size"] - 2}
    words = [name for name in WORD_ROWS if name in state]
    if _lacks_markers(fewer) and all(torch.equal(state[n][-2:], state[n][list(ROBERTA_MARKERS)]) for n in words):
        values = fewer
        state = _without_markers(state)
    return {name.removeprefix("luke."): tensor for name, tensor in state.items()}, values


def as_encoder(model: "LukePreTrainedModel", has_markers: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and config of a model's word encoder, as RoBERTa's in transformers.

    That counts positions from the pad on as LUKE does, and so serves one that started from BERT as well.

    Args:
        has_markers: Whether the last two words are `<ent>` and `<ent2>`, which are left out.
    """
    head = "ForMaskedLM" if hasattr(model, "lm_head") else "Model"
    left = {*model.config.extra, *ENTITY_SETTINGS} - {"architectures", "dtype"}
    values = {key: value for key, value in _config_of(model).items() if key not in left}
    values |= {"architectures": [f"Roberta{head}"], "model_type": "roberta"}
    state = {n: t for n, t in _named(model).items() if not (ENTITY_PARTS.search(n) or QUERIES.search(n))}
    if model.config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("lm_head.decoder.")}
    if classifier := [name for name in state if name.startswith(CLASSIFIERS)]:
        warnings.warn(f"Roberta{head}: weights {_listed({'left out': classifier})}", stacklevel=3)
        state = {name: tensor for name, tensor in state.items() if name not in classifier}
    if has_markers:
        values["vocab_size"] -= 2
        state = _without_markers(state)
    prefix = "roberta." if head == "ForMaskedLM" else ""
    return {re.sub(r"^luke\.", prefix, name): tensor for name, tensor in state.items()}, values


def _without_markers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the last two words, of tables that are one once."""
    tables = {name: state[name] for name in WORD_ROWS if name in state}
    cut = {table.data_ptr(): table[:-2].clone() for table in tables.values()}
    return state | {name: cut[table.data_ptr()] for name, table in tables.items()}


def _named(model: "LukePreTrainedModel") -> dict[str, Tensor]:
    """Return the tensors of a model with a head or without, by their names in one with a head; tied ones twice."""
    return {rename(name): p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


def start_from_encoder(
    source: Source, marker_token_ids: tuple[int, int] | None, entity_vocab_size: int, changes: dict[str, Any]
) -> tuple[LukeConfig, Tensors]:
    """Return the config of a LUKE on an encoder of RoBERTa or BERT, and the tensors that the encoder gives it."""
    path = source.directory / "config.json"
    values = read_json(path)
    model_type = values.get("model_type")
    if model_type not in ENCODERS:
        raise ValueError(f"{source.name} must be a roberta, xlm-roberta or bert encoder, got model_type {model_type!r}")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"{source.name} must have absolute positions, got position_embedding_type "
            f"{values['position_embedding_type']!r}"
        )
    _check_ints(path, values, "vocab_size", "max_position_embeddings")
    markers = _marker_ids(source.directory) if marker_token_ids is None else marker_token_ids
    for marker in markers:
        if not 0 <= marker < values["vocab_size"]:
            raise ValueError(f"marker_token_ids must lie in [0, {values['vocab_size'] - 1}], got {marker}")
    pad = values.get("pad_token_id")
    if pad is None:
        pad = 0 if model_type == "bert" else 1
    # LUKE counts words from pad + 1 on; BERT from 0.
    shift = pad + 1 if model_type == "bert" else 0
    values = {
        # What their configs leave out where it is their default.
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        **values,
        "pad_token_id": pad,
        "vocab_size": values["vocab_size"] + 2,
        "entity_vocab_size": entity_vocab_size,
        # As LUKE's configs name their encoder; the path of a folder means nothing on other machines.
        "bert_model_name": model_type if Path(source.name).exists() else source.name,
        "max_position_embeddings": values["max_position_embeddings"] + shift,
    }
    tensors = with_markers(read_tensors(source), markers)
    if (positions := tensors.get(WORD_POSITIONS)) is not None:
        tensors[WORD_POSITIONS] = _shifted(positions, shift)
        # Entities are placed by the rank of their words, from 0 on.
        tensors[ENTITY_POSITIONS] = _shifted(tensors[WORD_POSITIONS], -(pad + 1))
    return LukeConfig.from_dict(values, **changes), tensors


def with_markers(tensors: Tensors, markers: tuple[int, int]) -> Tensors:
    """Append the rows of `<ent>` and `<ent2>` to the word table and what has its rows."""
    tensors = dict(tensors)
    for name in WORD_ROWS:
        if name in tensors:
            for marker in markers:
                tensors[name] = _with_row(tensors[name], tensors[name].shape[0], marker)
    return tensors


def _with_row(stored: Stored, row: int, source_row: int) -> Stored:
    """Put a copy of `source_row` at `row`, which may be one beyond the last."""
    size = max(stored.shape[0], row + 1)

    def read() -> Tensor:
        tensor = stored.read()
        if row == tensor.shape[0]:
            return torch.cat([tensor, tensor[source_row : source_row + 1]])
        tensor = tensor.clone()
        tensor[row] = tensor[source_row]
        return tensor

    return Stored((size, *stored.shape[1:]), read)


def _shifted(stored: Stored, shift: int) -> Stored:
    """Move rows down by `shift`, the table longer by as much; or up within the table. Rows without source are zero."""

    def read() -> Tensor:
        tensor = stored.read()
        zeros = tensor.new_zeros(abs(shift), tensor.shape[1])
        return torch.cat([zeros, tensor] if shift >= 0 else [tensor[-shift:], zeros])

    return Stored((stored.shape[0] + max(shift, 0), *stored.shape[1:]), read)


def _marker_ids(directory: Path) -> tuple[int, int]:
    """Look up "@" and "#" in the vocabulary of a checkpoint."""
    if (directory / "vocab.txt").is_file():
        lines = (directory / "vocab.txt").read_text(encoding="utf-8").split("\n")
        vocabulary: dict[str, int] = {token: row for row, token in enumerate(lines)}
    elif (directory / "vocab.json").is_file():
        vocabulary = read_json(directory / "vocab.json")
    elif (directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        vocabulary = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
    else:
        raise ValueError(
            f"marker_token_ids must be given where {directory} holds no vocab.json, vocab.txt or tokenizer.json, "
            "got None"
        )
    ids = vocabulary.get("@"), vocabulary.get("#")
    if ids[0] is None or ids[1] is None:
        raise ValueError(f'marker_token_ids must be given where the vocabulary lacks "@" or "#", got {ids}')
    return ids[0], ids[1]


def _lacks_markers(values: dict[str, Any]) -> bool:
    return values.get("vocab_size") == 50265 and "roberta" in str(values.get("bert_model_name", "roberta"))
