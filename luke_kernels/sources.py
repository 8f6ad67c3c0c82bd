"""Where checkpoints lie, and how their files are read: folders, archives, the hub; safetensors and pickles.

Nothing that comes from outside is executed or trusted: pickles are read as tensors only, archives unpack plain files to
a bounded size, and indexes name files beside them.
"""

import bz2
import contextlib
import gzip
import lzma
import pickle
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

from luke_kernels.config import read_json

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What is read of an archive; none of these has a name that needs an extended header.
ARCHIVED = {*WEIGHT_FILES, "metadata.json", "entity_vocab.tsv", "entity_vocab.jsonl"}
# The vocabularies, for encoders that LUKE starts from.
HUB_FILES = ("config.json", "vocab.json", "vocab.txt", "tokenizer.json", "model*.safetensors", WEIGHT_FILES[1])
ARCHIVES = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar")
# Weights barely compress; what unpacks to more than this many times its size is no checkpoint.
MOST_EXPANSION = 20
# What torch.load raises on damaged files, beside what it should.
UNREADABLE = (
    *(pickle.UnpicklingError, EOFError, RuntimeError, OSError, LookupError, ValueError),
    *(TypeError, AttributeError, AssertionError, struct.error),
)


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its shape is known, its values are read when asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Source:
    """A checkpoint as the folder its files lie in, for as long as a `with` lasts: archives are unpacked aside.

    Args:
        name_or_path: Folder, archive of the original repository, or id of a repository on the hub.
        revision, token, cache_dir, local_files_only: For the hub, as in huggingface_hub.
    """

    directory: Path

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
        self._exits, self._unpacked = ExitStack(), False

    def __enter__(self) -> "Source":
        path = Path(self.name)
        if path.is_dir():
            self.directory = path
        elif path.is_file() and path.name.endswith(ARCHIVES):
            with ExitStack() as exits:
                self.directory = Path(exits.enter_context(tempfile.TemporaryDirectory()))
                _extract(path, self.directory)
                self._exits, self._unpacked = exits.pop_all(), True
        else:
            self.directory = download(self.name, HUB_FILES, **self._hub)
            if not any((self.directory / file).is_file() for file in WEIGHT_FILES[:2]):
                self.directory = download(
                    self.name, ("pytorch_model*.bin", "pytorch_model.bin.index.json"), **self._hub
                )
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    def tensors(self) -> Iterator[tuple[str, Stored]]:
        """Yield the names and headers of all tensors.

        Raises:
            FileNotFoundError: there are no weights, or an index names some that are missing.
            ValueError: a file cannot be read.
        """
        path = next((self.directory / name for name in WEIGHT_FILES if (self.directory / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{self.name} must hold one of {', '.join(WEIGHT_FILES)}, got none of them")
        for file in _shards(path) if path.suffix == ".json" else [path]:
            for name, stored in (_safetensors if file.suffix == ".safetensors" else _pickled)(file):
                # Else an archive's unpacked file would be mapped, and take its place, as long as the model lives.
                yield name, Stored(stored.shape, lambda read=stored.read: read().clone()) if self._unpacked else stored  # type: ignore[misc]


def download(name: str, patterns: tuple[str, ...], **hub: Any) -> Path:
    """Fetch files of a repository on the hub.

    Raises:
        FileNotFoundError: `name` is no directory, and no id of a repository that the hub gives out.
    """
    rule = f"{name} must be a directory, an archive or an id on the hub"
    if Path(name).is_file():
        raise FileNotFoundError(f"{rule}, got a file whose name ends in none of {', '.join(ARCHIVES)}")
    if Path(name).is_absolute() or name.startswith("."):
        raise FileNotFoundError(f"{rule}, got no such directory or file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **hub))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        if isinstance(error, LocalEntryNotFoundError):
            # What it says is of several lines, the error of the network within.
            cause = error.__cause__
            reason = f"the hub cannot be reached ({first_line(cause)})" if cause else "the hub's cache does not hold it"
        raise FileNotFoundError(f"{rule}, got no such directory or file here, and {reason}") from error


def first_line(error: BaseException) -> str:
    """Return what an error says first, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
        # The reader keeps the file open; tensors are mapped into memory when read.
        for name in file.keys():  # noqa: SIM118
            yield name, Stored(tuple(file.get_slice(name).get_shape()), lambda name=name: file.get_tensor(name))  # type: ignore[misc]
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, got: {error}") from None


def _pickled(path: Path) -> Iterator[tuple[str, Stored]]:
    try:
        # Old files are no zip archives and cannot be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UNREADABLE as error:
        raise ValueError(f"{path} must be a whole pickle of tensors only, got: {first_line(error)}") from None
    if isinstance(state, dict) and isinstance(state.get("module"), dict):  # DeepSpeed
        state = state["module"]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} must hold a dict of tensors by name, got {type(state).__name__}")
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            if tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise ValueError(f"{path} must hold dense tensors, got {name} of {tensor.layout} on {tensor.device}")
            yield name, Stored(tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]


class _Bounded:
    """A stream that gives no more than so many bytes."""

    def __init__(self, stream: IO[bytes], archive: Path):
        self._stream, self._archive = stream, archive
        self._left = MOST_EXPANSION * archive.stat().st_size + 2**20

    def spend(self, size: int, where: str) -> None:
        self._left -= size
        if self._left < 0:
            raise ValueError(
                f"{self._archive} must unpack to at most {MOST_EXPANSION} times its size, got more {where}"
            )

    def read(self, size: int, where: str) -> bytes:
        self.spend(size, where)
        return self._stream.read(size)

    def read_spent(self, size: int) -> Iterator[bytes]:
        """Read what has been spent before, in pieces."""
        while size > 0:
            block = self._stream.read(min(size, 2**20))
            if not block:
                raise EOFError("it ends within a file")
            size -= len(block)
            yield block


def _extract(archive: Path, directory: Path) -> None:
    """Unpack the files that a checkpoint has, flat, from an archive of the original repository.

    Headers are read here and not by tarfile, which takes extended ones of any size, for any time.
    """
    open_stream: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(archive.suffix, open)
    try:
        with open_stream(archive, "rb") as stream:
            content = _Bounded(stream, archive)
            header = content.read(tarfile.BLOCKSIZE, "at its beginning")
            if not header:
                raise EOFError("it is empty")
            while any(header):
                _extract_member(
                    archive, tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape"), directory, content
                )
                header = content.read(tarfile.BLOCKSIZE, "in its headers")
            while content.read(2**16, "after its last file"):  # to the end, where the checksum is
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{archive} must be a whole archive, got: {error}") from None


def _extract_member(archive: Path, member: tarfile.TarInfo, directory: Path, content: _Bounded) -> None:
    path = PurePosixPath(member.name)
    extends = member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{archive} must hold relative paths, got {member.name!r}")
    if not (member.isreg() or member.isdir() or extends):
        raise ValueError(f"{archive} must hold files and no links or devices, got {member.name!r}")
    target = directory / path.name if member.isreg() and path.name in ARCHIVED else None
    if target is not None and target.exists():
        raise ValueError(f"{archive} must hold each file once, got {member.name!r} again")
    content.spend(member.size, f"at {member.name!r}")
    with target.open("wb") if target is not None else contextlib.nullcontext() as file:
        for block in content.read_spent(member.size):
            if file is not None:
                file.write(block)
    content.read(-member.size % tarfile.BLOCKSIZE, f"at {member.name!r}")
