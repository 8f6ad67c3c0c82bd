"""Checkpoints of every kind into LUKE for us, transformers, the original repository or ONNX, or its word encoder."""

import contextlib
import json
import os
import re
import tarfile
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from luke_kernels import checkpoint as checkpoints
from luke_kernels.config import LukeConfig, read_json
from luke_kernels.entity_vocab import check_entity_vocab, read_entity_vocab
from luke_kernels.export import export_onnx
from luke_kernels.heads import LukeForMaskedLM, LukeHead
from luke_kernels.model import LukeModel, LukePreTrainedModel, without_weights
from luke_kernels.sources import Source
from luke_kernels.tokenizer import LukeTokenizer
from luke_kernels.tokenizer.files import find_folder, read_settings, read_stored_entity_vocab, write_entity_vocab

KINDS = {
    "luke": "LUKE, as ours and transformers'",
    "original": "LUKE of the original repository",
    "encoder": "an encoder of words",
}
# An ONNX file is no source: it holds no checkpoint.
TARGETS = (*KINDS, "onnx")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MODELS: tuple[type[LukePreTrainedModel], ...] = (LukeModel, *LukeHead.__subclasses__())
ARCHIVE = ".tar.gz"
# Of files; who names a directory so meant a file.
FILE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".safetensors", ".bin", ".onnx")
# Of pretraining, Yamada et al. 2020; configs do not hold them.
LENGTHS = {"max_entity_length": 128, "max_mention_length": 30}
# RoBERTa's and XLM-R's words with `<ent>` and `<ent2>`, where no tokenizer tells whether these are there.
SIZES_WITH_MARKERS = (50267, 250004)
SPECIAL_TITLES = ("[PAD]", "[UNK]", "[MASK]", "[MASK2]")
# "en:Vienna", as titles of mLUKE.
IN_LANGUAGE = re.compile(r"([a-z][a-z-]*):(.+)", re.DOTALL)


@dataclass
class Conversion:
    """What `convert` found and wrote; as a str, in words.

    Args:
        source: Directory, archive or hub id, as given.
        kind: What the source is, a key of `KINDS`.
        output: Absolute path of the directory or archive that was written.
        architecture: Class of the model in the output.
        num_parameters: Number of parameters in the output; shared ones count once.
        dtype: Dtype of the weights in the output.
        tokenizer: Size of the tokenizer, or why there is none.
        sizes_bytes: Size of each file that was written, by name.
    """

    source: str
    kind: str
    output: Path
    architecture: str
    num_parameters: int
    dtype: torch.dtype
    tokenizer: str
    sizes_bytes: dict[str, int]

    def __str__(self) -> str:
        files = ", ".join(f"{name} ({size / 1e6:,.1f} MB)" for name, size in self.sizes_bytes.items())
        return "\n".join(
            (
                f"{self.source}: {KINDS[self.kind]}",
                f"model: {self.architecture}, {self.num_parameters:,} parameters, {self.dtype}",
                f"tokenizer: {self.tokenizer}",
                f"{self.output}: {files}",
            )
        )


def convert(
    source: str | Path,
    output: str | Path,
    *,
    to: str = "luke",
    entity_vocab: str | Path | None = None,
    entity_emb_size: int | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Conversion:
    """Convert a checkpoint, and the tokenizer and entity vocabulary that lie beside it.

    The model is of the class that the source's config names, else a LukeForMaskedLM, else a LukeModel: the first whose
    head the source holds. No head is made up, and no pooler. The entity parts of a LUKE from an encoder are new.

    Args:
        source: Directory, archive or hub id: LUKE of any origin, or an encoder, RoBERTa, XLM-RoBERTa or BERT.
        output: Directory, new or empty, an empty one is filled as it is; for "original" also a new .tar.gz.
        to: "luke", for us and transformers; "original", for studio-ousia/luke; "encoder", the words alone as a RoBERTa
            of transformers, without entities and markers; "onnx", model.onnx as `export_onnx` writes it.
        entity_vocab: File of titles as `read_entity_vocab` takes it, [PAD], [UNK] and [MASK] among them; required for
            an encoder, refused for a LUKE.
        entity_emb_size: Size of an entity's embedding in a LUKE from an encoder; None: 256, as in LUKE's. Refused for
            a LUKE, which has its own.
        tokenizer: Directory or hub id of the tokenizer of words; None: that of the source, which an archive does not
            have. The titles are those of the source, or, where it has none, of the tokenizer. Refused for "original".
        dtype: float16, bfloat16 or float32; None: as stored.
        max_shard_size: As in `LukePreTrainedModel.save_pretrained`; "original" and "onnx" have one file.
        revision, token, cache_dir, local_files_only: For the hub, as in huggingface_hub; `revision` of the source.

    Raises:
        FileNotFoundError: there is no such checkpoint, `entity_vocab` or `tokenizer`, or for "original" no entity
            vocabulary.
        ValueError: `output` exists and is no empty directory, an argument does not fit the source, or the checkpoint
            or `entity_vocab` is malformed.
        RuntimeError: onnx or onnxscript is not installed, for "onnx".
        Nothing is written then.

    Warns:
        UserWarning: weights of the source have no place in the output, or `checkpoint.as_original` warns.
    """
    output = Path(output).resolve()
    _check(output, to, dtype, max_shard_size)
    if tokenizer is not None and to == "original":
        raise ValueError(f"tokenizer (--tokenizer) must be None for original, which holds none, got {tokenizer}")
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    with _aside(output) as target, Source(source, **hub) as opened:
        kind = checkpoints.kind_of(opened)
        _check_kind(kind, to, entity_vocab, entity_emb_size)
        words = None if tokenizer is None else find_folder(tokenizer, **{**hub, "revision": None})
        folder = opened.directory if Path(opened.name).exists() else find_folder(opened.name, **hub)
        config, tensors, entities = _read(opened, kind, folder, entity_vocab, entity_emb_size)
        if to == "original":
            _check_entities(opened.name, entities, config.entity_vocab_size)
        model = _load(opened.name, config, tensors, dtype, entities_are_new=kind == "encoder")
        made, told = None, "none, the original repository loads that of bert_model_name"
        if words is not None:
            made, told = _named_tokenizer(words, str(tokenizer), entities, config)
        elif to != "original":
            made, told = _tokenizer(folder, entities, config, kind)
            told = told.replace(str(folder), opened.name)
        state: dict[str, Tensor] = dict(model.named_parameters())
        architecture = type(model).__name__
        if to in ("luke", "onnx"):
            if to == "luke":
                model.save_pretrained(target, max_shard_size)
            else:
                _write_onnx(target, model)
            if made is not None:
                made.save_pretrained(target)
            elif entities:
                write_entity_vocab(target, entities)
        elif to == "original":
            state, values = checkpoints.as_original(model)
            stated = read_json(folder / "metadata.json") if kind == "original" else {}
            lengths = {"max_seq_length": config.max_words, **LENGTHS}
            lengths = {key: stated.get(key, length) for key, length in lengths.items()}
            if kind == "luke":
                _warn_of_mask2(model, entities)
            _write_original(target, state, {"model_config": values, **lengths}, entities)
        else:
            state, values = checkpoints.as_encoder(model, _has_markers(config, made))
            architecture = values["architectures"][0]
            checkpoints.write(state, values, target, max_shard_size)
            if made is not None:
                made.save_words(target)
                told = f"{Tokenizer.from_file(str(target / 'tokenizer.json')).get_vocab_size():,} words"
    return Conversion(
        source=opened.name,
        kind=kind,
        output=output,
        architecture=architecture,
        num_parameters=sum({tensor.data_ptr(): tensor.numel() for tensor in state.values()}.values()),
        dtype=model.dtype,
        tokenizer=told,
        sizes_bytes={
            path.name: path.stat().st_size for path in ([output] if output.is_file() else sorted(output.iterdir()))
        },
    )


def _check(output: Path, to: str, dtype: torch.dtype | None, max_shard_size: int | str) -> None:
    if to not in TARGETS:
        raise ValueError(f"to must be one of {', '.join(TARGETS)}, got {to!r}")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    checkpoints.check_shard_size(max_shard_size)
    if output.suffix.lower() in FILE_SUFFIXES and not (to == "original" and output.name.endswith(ARCHIVE)):
        raise ValueError(f"output must be a directory, or for original a {ARCHIVE}, got {output}")
    if output.exists() and (not output.is_dir() or output.name.endswith(ARCHIVE) or any(output.iterdir())):
        raise ValueError(f"output must be new or an empty directory, got {output}, which exists")


def _check_kind(kind: str, to: str, entity_vocab: str | Path | None, entity_emb_size: int | None) -> None:
    given = {"entity_vocab (--entity-vocab)": entity_vocab, "entity_emb_size (--entity-emb-size)": entity_emb_size}
    for name, value in given.items():
        if kind != "encoder" and value is not None:
            raise ValueError(f"{name} must be None for a source that is a LUKE, with its own, got {value}")
    if kind == "encoder" and entity_vocab is None:
        raise ValueError(
            "entity_vocab (--entity-vocab) must be given for a source that is an encoder of words, got None"
        )
    if entity_vocab is not None and not Path(entity_vocab).is_file():
        raise FileNotFoundError(f"entity_vocab (--entity-vocab) must be a file, got {entity_vocab}, which is none")
    if kind == to == "encoder":
        raise ValueError("to must be luke, original or onnx for a source that is an encoder of words, got 'encoder'")


def _check_entities(name: str, entities: dict[str, int], size: int) -> None:
    if not entities:
        raise FileNotFoundError(f"{name} must hold an entity vocabulary, without which there is no original, got none")
    if max(entities.values()) >= size:
        raise ValueError(f"{name} must have titles of {size} entities, got the id {max(entities.values())}")


def _read(
    source: Source, kind: str, folder: Path, entity_vocab: str | Path | None, entity_emb_size: int | None
) -> tuple[LukeConfig, checkpoints.Tensors, dict[str, int]]:
    """Return a LUKE's config, tensors and entity vocabulary; {} where there is none."""
    if entity_vocab is not None:
        titles = read_entity_vocab(entity_vocab)
        entities = _with_specials(titles, max(titles.values(), default=-1) + 1)
        if missing := [title for title in SPECIAL_TITLES[:3] if title not in entities]:
            raise ValueError(
                f"{entity_vocab} must hold the titles [PAD], [UNK] and [MASK], got no {', '.join(missing)}"
            )
        changes = {} if entity_emb_size is None else {"entity_emb_size": entity_emb_size}
        config, tensors = checkpoints.start_from_encoder(source, None, max(entities.values()) + 1, changes)
        return config, tensors, entities
    config, tensors = checkpoints.read_config(source, {}), checkpoints.read_tensors(source)
    try:
        entities = check_entity_vocab(read_stored_entity_vocab(folder, read_settings(folder)))
    except FileNotFoundError:
        return config, tensors, {}
    if kind == "original":  # where it lacks [MASK2], the table has got one more row
        entities = _with_specials(entities, config.entity_vocab_size - 1)
    return config, tensors, entities


def _with_specials(entities: dict[str, int], mask2: int) -> dict[str, int]:
    """Return the vocabulary as LUKE's tokenizers have it: specials of no language, and [MASK2] among them."""
    plain = {}
    for title, index in entities.items():
        match = IN_LANGUAGE.fullmatch(title)
        plain[match[2] if match and match[2] in SPECIAL_TITLES else title] = index
    if "[MASK]" in plain:
        plain.setdefault("[MASK2]", mask2)
    return plain


def _load(
    name: str, config: LukeConfig, tensors: checkpoints.Tensors, dtype: torch.dtype | None, entities_are_new: bool
) -> LukePreTrainedModel:
    checkpoints.check_depth(name, config, tensors)
    is_aware = config.use_entity_aware_attention
    # mLUKE's checkpoints hold queries that their configs turn off.
    config.use_entity_aware_attention = is_aware or any(map(checkpoints.query_of, tensors))
    model = _empty_model(config, tensors, entities_are_new)
    lost = checkpoints.without_place(model, tensors)
    if lost:
        warnings.warn(f"{type(model).__name__} from {name}: weights left out: {', '.join(lost)}", stacklevel=3)
    kept = {key: stored for key, stored in tensors.items() if key not in lost}
    checkpoints.load(model, name, kept, dtype=dtype, device="cpu", entities_are_new=entities_are_new)
    config.use_entity_aware_attention = is_aware
    return model


def _empty_model(config: LukeConfig, tensors: checkpoints.Tensors, entities_are_new: bool) -> LukePreTrainedModel:
    """Return a model without memory, of the first class whose head the checkpoint holds."""
    named = config.extra.get("architectures")
    own = [cls for cls in MODELS if isinstance(named, list) and cls.__name__ in named]
    for cls in (*own, LukeForMaskedLM, LukeModel):
        with without_weights():
            model = cls(config)
        if "luke.pooler.dense.weight" not in tensors:
            model.encoder_model.pooler = None
        if checkpoints.has_head_of(model, tensors, entities_are_new):
            break
    return model


def _named_tokenizer(
    folder: Path, name: str, entities: dict[str, int], config: LukeConfig
) -> tuple[LukeTokenizer, str]:
    """Return the tokenizer that the user named, with these entities, and a description of it; raise if there is none.

    Without entities it is one with entities of its own.
    """
    tokenizer = LukeTokenizer.from_pretrained(folder, entity_vocab=entities or None)
    if not _has_markers(config, tokenizer):
        raise ValueError(
            f"tokenizer (--tokenizer) must have the model's {config.vocab_size} words with <ent> and <ent2>, got "
            f"{len(tokenizer)} of {name}"
        )
    _check_entities(name, tokenizer.entity_vocab, config.entity_vocab_size)
    return tokenizer, _told(tokenizer)


def _told(tokenizer: LukeTokenizer) -> str:
    return f"{len(tokenizer):,} words, {len(tokenizer.entity_vocab):,} titles"


def _tokenizer(
    folder: Path, entities: dict[str, int], config: LukeConfig, kind: str
) -> tuple[LukeTokenizer | None, str]:
    """Return the tokenizer of a folder with these entities, or None; and a description of it for the user."""
    try:
        tokenizer = LukeTokenizer.from_pretrained(folder, entity_vocab=entities or None)
    except (FileNotFoundError, NotImplementedError) as error:
        if kind == "original" and isinstance(error, FileNotFoundError):
            return None, f"none; --tokenizer names one, say {config.extra.get('bert_model_name', 'roberta-base')}"
        return None, f"none, {error}"
    if kind == "encoder" and not _has_markers(config, tokenizer):
        # Its markers would be other words of the model.
        return (
            None,
            f"none, it must have the model's {config.vocab_size} words with <ent> and <ent2>, got {len(tokenizer)}",
        )
    return tokenizer, _told(tokenizer)


def _has_markers(config: LukeConfig, tokenizer: LukeTokenizer | None) -> bool:
    """Return whether the last two words of a model are `<ent>` and `<ent2>`."""
    if tokenizer is None:
        return config.vocab_size in SIZES_WITH_MARKERS
    return (tokenizer.entity_token_1_id, tokenizer.entity_token_2_id) == (config.vocab_size - 2, config.vocab_size - 1)


def _write_onnx(folder: Path, model: LukePreTrainedModel) -> None:
    for layer in model.encoder_model.layers:
        # Loaded with all queries that the checkpoint holds, it is to run as its config says.
        layer.attention["self"].entity_aware = model.config.use_entity_aware_attention  # type: ignore[assignment]
    export_onnx(model.eval(), folder / "model.onnx")
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_original(folder: Path, state: dict[str, Tensor], metadata: dict[str, Any], entities: dict[str, int]) -> None:
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    with (folder / "entity_vocab.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in _entity_lines(entities))


def _entity_lines(entities: dict[str, int]) -> Iterable[str]:
    """Yield one line per entity; titles that all name a language are split from it, specials get every language."""
    matches = {title: IN_LANGUAGE.fullmatch(title) for title in entities if title not in SPECIAL_TITLES}
    languages = {match[1] if match else None for match in matches.values()}
    if None in languages or not languages:
        matches, languages = {}, {None}
    names: dict[int, list[tuple[str, str | None]]] = {}
    for title, index in entities.items():
        match = matches.get(title)
        in_languages = (
            [(match[2], match[1])] if match else [(title, language) for language in sorted(languages, key=str)]
        )
        names.setdefault(index, []).extend(in_languages)
    for index in sorted(names):
        yield json.dumps({"id": index, "entities": names[index], "count": 0})


def _warn_of_mask2(model: LukePreTrainedModel, entities: dict[str, int]) -> None:
    table, rows = model.get_entity_embeddings().weight, [entities.get("[MASK]"), entities.get("[MASK2]")]
    if None not in rows and not torch.equal(*table[rows]):
        warnings.warn(
            "[MASK2] has a row of its own, which readers of the original replace by that of [MASK]", stacklevel=3
        )


@contextlib.contextmanager
def _aside(output: Path) -> Iterator[Path]:
    """Yield a folder to fill; then move its files into `output`, make it `output`, or pack it into one."""
    # An existing directory keeps its owner and mode, may be mounted or entered by a shell: it must not be replaced.
    existing = next(path for path in (output, *output.parents) if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=existing) as aside:
        folder = ready = Path(aside) / "folder"
        folder.mkdir()
        yield folder
        if output.name.endswith(ARCHIVE):
            ready = Path(aside) / "archive"
            # Weights barely compress; the format has sizes of more than 8 GiB in the header itself.
            with tarfile.open(ready, "w:gz", compresslevel=1, format=tarfile.GNU_FORMAT) as archive:
                for path in sorted(folder.iterdir()):
                    archive.add(path, arcname=path.name)
        if existing == output:
            with contextlib.ExitStack() as undo:
                # config.json last: without it there is no checkpoint yet.
                for path in sorted(folder.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
                    os.replace(path, output / path.name)
                    undo.callback((output / path.name).unlink)
                undo.pop_all()
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            os.replace(ready, output)
