"""The files of a tokenizer, as the Hugging Face hub has them: read and written."""

import contextlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from luke_kernels.config import read_json
from luke_kernels.entity_vocab import read_entity_vocab
from luke_kernels.sources import download

_WORD_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "vocab.txt")
_ENTITY_FILES = ("entity_vocab.json", "entity_vocab.tsv", "entity_vocab.jsonl")
_CONFIG_FILES = ("special_tokens_map.json", "tokenizer_config.json")
_ADDED_FILE = "added_tokens.json"
_SENTENCEPIECE_FILES = ("sentencepiece.bpe.model", "sentencepiece.model", "spiece.model")
# What BERT's files leave out.
_BERT_SETTINGS = {
    "tokenizer_class": "BertTokenizer",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}


def find_folder(name_or_path: str | Path, **hub: Any) -> Path:
    """Return the folder, or one with the files of the hub's repository of that name.

    Raises:
        FileNotFoundError: there is neither.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if Path(name_or_path).is_file():
        raise FileNotFoundError(f"{name_or_path} must be a directory or an id on the hub, got a file")
    return download(str(name_or_path), (*_WORD_FILES, *_ENTITY_FILES, *_CONFIG_FILES, _ADDED_FILE), **hub)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings as the files of a folder have them.

    Raises:
        ValueError: a file holds no JSON object.
    """
    settings: dict[str, Any] = {}
    for path in (folder / name for name in _CONFIG_FILES):
        if path.exists():
            settings |= read_json(path)
    return settings


def read_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Read the tokenizer of words and what is stored with it.

    Returns:
        The tokenizer, and the settings as the files have them.

    Raises:
        FileNotFoundError, ValueError: a file is missing or malformed.
        NotImplementedError: the tokenizer is mLUKE's.
    """
    settings = read_settings(folder)
    if settings.get("tokenizer_class") == "MLukeTokenizer" or any((folder / n).exists() for n in _SENTENCEPIECE_FILES):
        raise NotImplementedError(
            f"{folder} must hold a LUKE tokenizer, got mLUKE's, of sentencepiece, which is not supported yet"
        )
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        tokenizer = read_byte_level_bpe(folder / "vocab.json", folder / "merges.txt")
        _add_stored_tokens(tokenizer, folder, settings)
        return tokenizer, settings
    if (folder / "vocab.txt").exists():
        settings = {**_BERT_SETTINGS, **settings}
    if (folder / "tokenizer.json").exists():
        tokenizer = _read_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "vocab.txt").exists():
        tokenizer = _read_word_piece(folder / "vocab.txt", settings)
        _add_stored_tokens(tokenizer, folder, settings)
    else:
        raise FileNotFoundError(
            f"{folder} must hold vocab.json and merges.txt, or tokenizer.json, or vocab.txt, got none of them"
        )
    return tokenizer, settings


def _read_word_piece(vocab: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Read BERT's WordPiece, lower-cased unless the settings say otherwise."""
    with vocab.open(encoding="utf-8", newline="\n") as file:
        ids = {line.rstrip("\r\n"): index for index, line in enumerate(file)}
    tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token=stored_options(settings, ("unk_token",))["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return tokenizer


def _read_tokenizer_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the only class of error that tokenizers raises
        raise ValueError(f"{path} must be a tokenizer of the tokenizers library, got: {error}") from None


def read_stored_entity_vocab(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Read the entity vocabulary of a folder, which transformers 5 keeps among the settings.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is malformed.
    """
    if settings.get("entity_vocab"):
        return settings["entity_vocab"]
    for path in (folder / name for name in _ENTITY_FILES):
        if path.exists():
            return read_entity_vocab(path)
    raise FileNotFoundError(f"{folder} must hold one of {', '.join(_ENTITY_FILES)}, got none of them")


def stored_options(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return those of the settings that have one of the names, as transformers 4 has them."""
    in_transformers_5 = {"entity_1_token": "entity_token_1", "entity_2_token": "entity_token_2"}
    options: dict[str, Any] = {}
    for key, value in settings.items():
        name = in_transformers_5.get(key, key)
        if name in names and value is not None:
            options[name] = value["content"] if isinstance(value, dict) else value
    # transformers writes 10**30 for None.
    if type(length := options.get("model_max_length", 0)) is not int:
        raise TypeError(f"model_max_length must be an int in the stored settings, got {length!r}")
    if length > 10**20:
        del options["model_max_length"]
    if str(settings.get("tokenizer_class")).startswith("Bert"):
        options.setdefault("pair_separators", 1)
    # These tasks force it, and so it says nothing for another task that a caller may ask for.
    if options.get("task") in ("entity_classification", "entity_pair_classification"):
        options.pop("max_entity_length", None)
    return options


def read_byte_level_bpe(vocab: Path, merges: Path) -> Tokenizer:
    """Read RoBERTa's byte-level BPE.

    Raises:
        ValueError: a file is malformed.
    """
    ids = read_json(vocab)
    if not all(type(index) is int for index in ids.values()):
        raise ValueError(f"{vocab} must map tokens to int ids")
    pairs = []
    with merges.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\r\n")
            if not line or (number == 1 and line.startswith("#version")):
                continue
            left, _, right = line.partition(" ")
            if left not in ids or right not in ids or left + right not in ids:
                raise ValueError(f"{merges}, line {number}: must be two tokens that make a third, got {line!r}")
            pairs.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, state: Mapping[str, Any], settings: Mapping[str, Any], entities: dict[str, int]
) -> None:
    """Write a tokenizer, its settings and its entity vocabulary; no file is ever half-written.

    Args:
        folder: Where; made if missing, files of another tokenizer are removed.
        tokenizer: The tokenizer of words.
        state: Its content as tokenizer.json, which is written unless vocab.json and merges.txt can express it.
        settings: Content of tokenizer_config.json.
        entities: Ids by title.
    """
    with _aside(folder) as aside:
        if _is_roberta(state):
            tokenizer.model.save(str(aside))
        else:
            _write_json(aside / "tokenizer.json", state)
        _write_json(aside / "entity_vocab.json", entities)
        _write_json(aside / "tokenizer_config.json", settings, indent=2)


def write_words(folder: Path, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Write a tokenizer of words alone and its settings; no file is ever half-written.

    Args:
        folder: Where; made if missing, files of another tokenizer are removed.
        tokenizer: The tokenizer, its post-processor included.
        settings: Content of tokenizer_config.json.
    """
    with _aside(folder) as aside:
        tokenizer.save(str(aside / "tokenizer.json"))
        _write_json(aside / "tokenizer_config.json", settings, indent=2)


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """Yield a folder to write a tokenizer's files in, then move them into `folder` in place of another tokenizer's."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as name:
        yield Path(name)
        written = os.listdir(name)
        for file in written:
            os.replace(Path(name) / file, folder / file)
    # Left from another tokenizer, they would be read along with ours.
    for file in {*_WORD_FILES, *_CONFIG_FILES, _ADDED_FILE}.difference(written):
        with contextlib.suppress(FileNotFoundError):
            (folder / file).unlink()


def write_entity_vocab(folder: Path, entities: dict[str, int]) -> None:
    """Write an entity vocabulary, for a tokenizer whose words are not there yet."""
    _write_json(folder / "entity_vocab.json", entities)


def _is_roberta(state: Mapping[str, Any]) -> bool:
    model, splitter = state["model"], state["pre_tokenizer"] or {}
    return (
        state["normalizer"] is None
        and (splitter.get("type"), splitter.get("use_regex")) == ("ByteLevel", True)
        and model["type"] == "BPE"
        and not any(model[key] for key in model.keys() - {"type", "vocab", "merges"})
    )


def _add_stored_tokens(tokenizer: Tokenizer, folder: Path, settings: Mapping[str, Any]) -> None:
    """Add the tokens after the vocabulary, which since transformers 4.34 are stored in the settings."""
    stored = {int(index): token for index, token in (settings.get("added_tokens_decoder") or {}).items()}
    if not stored and (folder / _ADDED_FILE).exists():
        stored = {index: {"content": token} for token, index in read_json(folder / _ADDED_FILE).items()}
    for index, token in sorted(stored.items()):
        tokenizer.add_tokens([AddedToken(**token)])
        if tokenizer.token_to_id(token["content"]) != index:
            raise ValueError(
                f"{folder}: added tokens must continue the vocabulary, "
                f"got {token['content']!r} as {index} for {tokenizer.token_to_id(token['content'])}"
            )


def _write_json(path: Path, value: Any, indent: int | None = None) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
