"""Entity vocabularies: files of titles and ids, read into a dict."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luke_kernels.config import read_json


def read_entity_vocab(path: str | Path) -> dict[str, int]:
    """Read an entity vocabulary, title -> id.

    Args:
        path: A file in one of three forms, told apart by its suffix.
            `.json`: one object {title: id}, as LUKE's tokenizers on the hub have it; titles of one entity share its id.
            `.tsv`: lines of title, tab, count; the id is the number of the line, from 0.
            `.jsonl`: lines of {"id": int, "entities": [[title, language or null], ...], "count": int}; a title with a
            language becomes "language:title".

    Returns:
        The ids by title, in the order of the file.

    Raises:
        ValueError: the suffix is none of these, or the file is malformed; file and line are named.
        OSError: the file cannot be read.
    """
    path = Path(path)
    readers = {".json": _read_json, ".tsv": _read_tsv, ".jsonl": _read_jsonl}
    if path.suffix not in readers:
        raise ValueError(f"entity_vocab must be a file of suffix {', '.join(readers)}, got {str(path)!r}")
    return readers[path.suffix](path)


def check_entity_vocab(vocab: Any, source: str = "entity_vocab") -> dict[str, int]:
    """Return the vocabulary if it maps titles to ids.

    Raises:
        ValueError: an id is negative.
        TypeError: it is no dict, or one of something else.
    """
    if not isinstance(vocab, dict):
        raise TypeError(f"{source} must be a dict of titles and ids, got {type(vocab).__name__}")
    # Half a million titles are looked at one by one only where one of them is wrong.
    right = set(map(type, vocab)) <= {str} and set(map(type, vocab.values())) <= {int}
    if right and min(vocab.values(), default=0) >= 0:
        return vocab
    for title, index in vocab.items():
        if type(title) is not str or type(index) is not int:
            raise TypeError(f"{source} must map titles to int ids, got {title!r}: {index!r}")
        if index < 0:
            raise ValueError(f"{source} must have ids from 0, got {title!r}: {index}")
    return vocab


def _read_json(path: Path) -> dict[str, int]:
    return check_entity_vocab(read_json(path), str(path))


def _read_tsv(path: Path) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for number, line in _lines(path):
        title, tab, count = line.partition("\t")
        if not (title and tab and count.isdecimal()):
            raise ValueError(f"{path}, line {number}: must be title, tab, count, got {line!r}")
        if title in vocab:
            raise ValueError(f"{path}, line {number}: title must stand once, got {title!r} again")
        vocab[title] = number - 1
    return vocab


def _read_jsonl(path: Path) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            entry = json.loads(line)
            index, names = entry["id"], [(title, language) for title, language in entry["entities"]]
        except (ValueError, TypeError, KeyError):
            rule = 'must be {"id": int, "entities": [[title, language or null], ...]}'
            raise ValueError(f"{path}, line {number}: {rule}, got {line!r}") from None
        titles = {title if language is None else f"{language}:{title}": index for title, language in names}
        check_entity_vocab(titles, f"{path}, line {number}: entities")
        vocab |= titles
    return vocab


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Not str.splitlines, which also splits at separators that stand within titles.
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\r\n")
