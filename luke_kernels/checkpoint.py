"""Checkpoints in and out: ours and transformers' (the same), the original repository's, RoBERTa's and BERT's.

Its header is read first: names and shapes are compared with those of the model, which has no memory yet, and only then
are tensors taken. Pickles are read as tensors only; nothing in them is executed.
"""

import json
import os
import pickle
import re
import shutil
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luke_kernels.config import LukeConfig, read_json

if TYPE_CHECKING:
    from luke_kernels.model import LukePreTrainedModel

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
# Buffers of old versions, and heads that LUKE has not.
IGNORED = re.compile(r"\.position_ids$|^cls_entity_predictions\.|^cls\.seq_relationship\.")
HEADS = re.compile(r"^(lm_head|entity_predictions|classifier|qa_outputs)\.|^luke\.pooler\.")

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ARCHIVES = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar")
# Weights barely compress; what unpacks to more than this many times its size is no checkpoint.
MOST_EXPANSION = 20

WORDS = "luke.embeddings.word_embeddings.weight"
WORD_POSITIONS = "luke.embeddings.position_embeddings.weight"
ENTITIES = "luke.entity_embeddings.entity_embeddings.weight"
ENTITY_POSITIONS = "luke.entity_embeddings.position_embeddings.weight"
WORD_DECODER = "lm_head.decoder.weight"
ENTITY_DECODER = "entity_predictions.decoder.weight"
ENTITY_BIAS = "entity_predictions.bias"
# "@" and "#" in RoBERTa's vocabulary, which archives of the original repository do not hold.
ROBERTA_MARKERS = (1039, 10431)


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its shape is known, its values are read when asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Source:
    """A checkpoint where it lies: a directory, an archive, or a repository on the hub. Use it in a `with`."""

    def __init__(
        self,
        name_or_path: str | Path,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ):
        self.name = str(name_or_path)
        self._hub: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        self._exits = ExitStack()

    def __enter__(self) -> "Source":
        path = Path(self.name)
        if path.is_dir():
            self.directory = path
        elif path.is_file() and path.name.endswith(ARCHIVES):
            self.directory = Path(self._exits.enter_context(tempfile.TemporaryDirectory()))
            try:
                _extract(path, self.directory)
            except BaseException:
                self._exits.close()
                raise
        else:
            self.directory = download(self.name, ("*.json", "*.txt", "*.safetensors"), **self._hub)
            if not any((self.directory / file).is_file() for file in WEIGHT_FILES[:2]):
                self.directory = download(self.name, ("*.bin",), **self._hub)
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    @property
    def is_original(self) -> bool:
        """Whether the original repository wrote it."""
        return (self.directory / "metadata.json").is_file() and not (self.directory / "config.json").is_file()

    def config(self, changes: dict[str, Any]) -> LukeConfig:
        if not self.is_original:
            return LukeConfig.from_pretrained(self.directory, **changes)
        path = self.directory / "metadata.json"
        values = read_json(path).get("model_config")
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold an object model_config, got {values!r}")
        values = dict(values)
        if _lacks_markers(values):
            values["vocab_size"] += 2
        if self.mask2_row(values) == values.get("entity_vocab_size"):
            values["entity_vocab_size"] += 1
        return LukeConfig.from_dict(values, **changes)

    def mask2_row(self, values: dict[str, Any]) -> int | None:
        """Return the row of [MASK2] in an archive's entity table: the one its vocabulary names, or one more row."""
        rows = _special_entities(self.directory)
        if "[MASK]" not in rows:
            return None
        return rows.get("[MASK2]", values.get("entity_vocab_size"))

    def tensors(self) -> dict[str, Stored]:
        """Return all tensors under our names; only headers are read.

        Raises:
            FileNotFoundError: there are no weights.
            ValueError: a file cannot be read, or two names mean the same tensor.
        """
        path = next((self.directory / name for name in WEIGHT_FILES if (self.directory / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{self.name} must hold one of {', '.join(WEIGHT_FILES)}, got none of them")
        tensors: dict[str, Stored] = {}
        for file in _shards(path) if path.suffix == ".json" else [path]:
            reader = _safetensors if file.suffix == ".safetensors" else _pickled
            for name, stored in reader(file):
                renamed = rename(name)
                if renamed in tensors:
                    raise ValueError(f"{file} must name each tensor once, got {renamed} twice")
                tensors[renamed] = stored
        return self._with_added_rows(tensors) if self.is_original else tensors

    def _with_added_rows(self, tensors: dict[str, Stored]) -> dict[str, Stored]:
        """Add to the original repository's tables what transformers' have: two markers, and [MASK2] as [MASK]."""
        values = read_json(self.directory / "metadata.json")["model_config"]
        if _lacks_markers(values):
            tensors = with_markers(tensors, ROBERTA_MARKERS)
        mask2, mask = self.mask2_row(values), _special_entities(self.directory).get("[MASK]")
        if mask2 is not None and mask is not None:
            for name in (ENTITIES, ENTITY_BIAS):
                if name in tensors:
                    tensors[name] = _with_row(tensors[name], mask2, mask)
        return tensors


def rename(name: str) -> str:
    """Return our name of a tensor."""
    for pattern, ours in RENAMES:
        name = re.sub(pattern, ours, name)
    return name


def download(name: str, patterns: tuple[str, ...], **hub: Any) -> Path:
    """Fetch files of a repository on the hub.

    Raises:
        FileNotFoundError: `name` is no directory, and no id of a repository that the hub gives out.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **hub))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{name} must be a directory, an archive or an id on the hub, got: {reason}") from error


def load(
    model: "LukePreTrainedModel",
    source: Source,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    transform: Callable[[dict[str, Stored]], dict[str, Stored]] | None = None,
) -> None:
    """Fill a model that lies on the meta device.

    Raises:
        ValueError: tensors are missing or of other shapes; one message names them all, and nothing is loaded.
    """
    stored = source.tensors()
    if transform is not None:
        stored = transform(stored)
    if not hasattr(model, "luke"):
        stored = {name.removeprefix("luke."): tensor for name, tensor in stored.items()}
    stored = {name: tensor for name, tensor in stored.items() if not IGNORED.search(name)}
    _untie_if_different(model, stored)
    wanted = dict(model.named_parameters())
    aliases = dict(model.named_parameters(remove_duplicate=False))
    if "lm_head.bias" in wanted and "lm_head.bias" not in stored and "lm_head.decoder.bias" in stored:
        stored["lm_head.bias"] = stored["lm_head.decoder.bias"]
    for name in wanted:
        if name not in stored and (match := re.fullmatch(r"(.*\.)(?:w2e|e2w|e2e)(_query\..*)", name)):
            query = match[1] + match[2].removeprefix("_")
            if query in stored:
                stored[name] = stored[query]

    fresh = {name for name in wanted if name not in stored and _may_be_new(name, transform is not None)}
    missing = sorted(name for name in wanted if name not in stored and name not in fresh)
    misshapen = [
        f"{name} {stored[name].shape} where the config says {tuple(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in stored and stored[name].shape != tuple(parameter.shape)
    ]
    # Another head's weights have no place here, and nobody expects them to.
    unexpected = sorted(name for name in stored if name not in wanted | aliases and not HEADS.search(rename(name)))
    problems = [
        f"{what}: {', '.join(names)}" for what, names in (("missing", missing), ("misshapen", misshapen)) if names
    ]
    others = [
        f"{what}: {', '.join(names)}"
        for what, names in (("new, to be trained", sorted(fresh)), ("unexpected, left out", unexpected))
        if names
    ]
    if problems:
        raise ValueError(f"{source.name} must fit {type(model).__name__}, got weights " + "; ".join(problems + others))

    filled: dict[str, Tensor] = {}
    for name in wanted:
        if name in stored:
            tensor = stored[name].read()
            # A query that is copied to others must not share their memory.
            shared = any(tensor is other for other in filled.values())
            filled[name] = tensor.to(device, dtype or tensor.dtype, copy=shared)
    new_dtype = dtype or next((t.dtype for t in filled.values()), torch.float32)
    for name in fresh:
        filled[name] = torch.empty(wanted[name].shape, device=device, dtype=new_dtype)
    for name, tensor in filled.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor.contiguous()))
    model.tie_weights()
    model.init_weights(fresh)
    if others and transform is None:
        warnings.warn(f"{type(model).__name__} from {source.name}: weights " + "; ".join(others), stacklevel=3)


def _may_be_new(name: str, starts_from_encoder: bool) -> bool:
    name = rename(name)
    return bool(HEADS.search(name)) or (starts_from_encoder and name.startswith("luke.entity_embeddings."))


def _untie_if_different(model: "LukePreTrainedModel", stored: dict[str, Stored]) -> None:
    """Heed decoders in the checkpoint that are not the tables: transformers 5 trains the word decoder apart."""
    if not hasattr(model, "lm_head"):
        return
    if ENTITY_DECODER in stored and not _equal(stored[ENTITY_DECODER], stored.get(ENTITIES)):
        raise ValueError(f"{ENTITY_DECODER} must equal {ENTITIES}, got a checkpoint where they differ")
    untied = WORD_DECODER in stored and not _equal(stored[WORD_DECODER], stored.get(WORDS))
    if untied and model.config.tie_word_embeddings:
        warnings.warn(f"{WORD_DECODER} differs from {WORDS} in this checkpoint: they are kept apart", stacklevel=4)
    if untied or (not model.config.tie_word_embeddings and WORD_DECODER not in stored):
        model.config.tie_word_embeddings = not untied
    if untied:
        decoder = model.lm_head.decoder  # type: ignore[union-attr]
        decoder.weight = nn.Parameter(torch.empty_like(decoder.weight))  # type: ignore[union-attr, arg-type]


def _equal(a: Stored, b: Stored | None) -> bool:
    return b is not None and a.shape == b.shape and torch.equal(a.read(), b.read())


def save(model: "LukePreTrainedModel", directory: str | Path, max_shard_size: int | str) -> None:
    """Write config and weights aside, then move them into place."""
    from huggingface_hub import save_torch_state_dict

    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory must be a directory, got the file {directory}")
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if hasattr(model, "lm_head"):
        # transformers 5 does not tie the word decoder: without a copy of its own it would be random there.
        for alias in (WORD_DECODER, "lm_head.decoder.bias"):
            state[alias] = model.get_parameter(alias).detach().clone()
        if not model.config.tie_word_embeddings:
            state[ENTITY_DECODER] = model.get_parameter(ENTITY_DECODER).detach().clone()
    config = {
        **model.config.to_dict(),
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as aside:
        save_torch_state_dict(state, aside, max_shard_size=max_shard_size, metadata={"format": "pt"})
        (Path(aside) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        written = sorted(Path(aside).iterdir())
        names = {path.name for path in written}
        for path in written:
            os.replace(path, directory / path.name)
    for path in directory.glob("model*.safetensors*"):
        if path.name not in names:
            path.unlink()


def start_from_encoder(
    source: Source, marker_token_ids: tuple[int, int] | None, entity_vocab_size: int, changes: dict[str, Any]
) -> tuple[LukeConfig, Callable[[dict[str, Stored]], dict[str, Stored]]]:
    """Return the config of a LUKE on an encoder of RoBERTa or BERT, and what makes its tensors from the encoder's."""
    values = read_json(source.directory / "config.json")
    model_type = values.get("model_type")
    if model_type not in ("roberta", "xlm-roberta", "bert"):
        raise ValueError(f"{source.name} must be a roberta, xlm-roberta or bert encoder, got model_type {model_type!r}")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"{source.name} must have absolute positions, got position_embedding_type "
            f"{values['position_embedding_type']!r}"
        )
    markers = _marker_ids(source.directory) if marker_token_ids is None else marker_token_ids
    for marker in markers:
        if not 0 <= marker < values["vocab_size"]:
            raise ValueError(f"marker_token_ids must lie in [0, {values['vocab_size'] - 1}], got {marker}")
    pad = values.get("pad_token_id", 0 if model_type == "bert" else 1)
    # LUKE counts words from pad + 1 on; BERT from 0.
    shift = pad + 1 if model_type == "bert" else 0
    values = {
        **values,
        "pad_token_id": pad,
        "vocab_size": values["vocab_size"] + 2,
        "entity_vocab_size": entity_vocab_size,
        "max_position_embeddings": values["max_position_embeddings"] + shift,
    }

    def transform(tensors: dict[str, Stored]) -> dict[str, Stored]:
        tensors = with_markers(tensors, markers)
        if (positions := tensors.get(WORD_POSITIONS)) is not None:
            tensors[WORD_POSITIONS] = _shifted(positions, shift)
            # Entities are placed by the rank of their words, from 0 on.
            tensors[ENTITY_POSITIONS] = _shifted(tensors[WORD_POSITIONS], -(pad + 1))
        return tensors

    return LukeConfig.from_dict(values, **changes), transform


def with_markers(tensors: dict[str, Stored], markers: tuple[int, int]) -> dict[str, Stored]:
    """Append the rows of `<ent>` and `<ent2>` to the word table and what has its rows."""
    tensors = dict(tensors)
    for name in (WORDS, WORD_DECODER, "lm_head.bias", "lm_head.decoder.bias"):
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
        lines = (directory / "vocab.txt").read_text(encoding="utf-8").splitlines()
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


def _special_entities(directory: Path) -> dict[str, int]:
    """Return the rows of [MASK] and [MASK2] that an archive's entity vocabulary names."""
    rows = {}
    for name in ("entity_vocab.tsv", "entity_vocab.jsonl"):
        path = directory / name
        if not path.is_file():
            continue
        with path.open(encoding="utf-8") as lines:
            for row, line in enumerate(lines):
                if "[MASK" not in line:
                    continue
                if name.endswith("tsv"):
                    titles = [(line.split("\t")[0], row)]
                else:
                    entry = json.loads(line)
                    titles = [(title, entry["id"]) for title, _ in entry["entities"]]
                rows.update({title: r for title, r in titles if title in ("[MASK]", "[MASK2]")})
    return rows


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} must hold an object weight_map, got {weight_map!r}")
    shards = []
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name:
            raise ValueError(f"{index} must name files beside it, got {name!r}")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} must name files that exist, got {name}, which does not")
        shards.append(index.parent / name)
    return shards


def _safetensors(path: Path) -> Iterator[tuple[str, Stored]]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        # The index keeps the file open; tensors are mapped into memory when read.
        for name in file.keys():  # noqa: SIM118
            yield name, Stored(tuple(file.get_slice(name).get_shape()), lambda name=name: file.get_tensor(name))  # type: ignore[misc]
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, got: {error}") from None


def _pickled(path: Path) -> Iterator[tuple[str, Stored]]:
    try:
        # Old files are no zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} must be a whole pickle of tensors only, got: {reason}") from None
    if isinstance(state, dict) and isinstance(state.get("module"), dict):  # DeepSpeed
        state = state["module"]
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(state).__name__}")
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            yield name, Stored(tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]


def _extract(archive: Path, directory: Path) -> None:
    """Unpack the files of an archive of the original repository, flat; what no such archive holds is refused."""
    budget = MOST_EXPANSION * archive.stat().st_size + 2**20
    try:
        with tarfile.open(archive) as members:
            for member in members:
                parts = PurePosixPath(member.name)
                if parts.is_absolute() or ".." in parts.parts:
                    raise ValueError(f"{archive} must hold relative paths, got {member.name!r}")
                if member.isdir():
                    continue
                if not member.isreg():
                    raise ValueError(f"{archive} must hold files and no links or devices, got {member.name!r}")
                budget -= member.size
                if budget < 0:
                    raise ValueError(
                        f"{archive} must unpack to at most {MOST_EXPANSION} times its size, got more at {member.name!r}"
                    )
                content = members.extractfile(member)
                assert content is not None
                with (directory / parts.name).open("wb") as file:
                    shutil.copyfileobj(content, file, 2**24)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} must be a whole archive, got: {error}") from None
