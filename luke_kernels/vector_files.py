"""A file of texts -> files of their vectors: JSON lines, or shards of safetensors; interrupted work can be resumed."""

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from luke_kernels.config import LukeConfig
from luke_kernels.encode import Text, TextEncoder, TextVectors, choose_device, text_progress
from luke_kernels.model import LukeModel
from luke_kernels.ops.backends import cpu_kernels_missing
from luke_kernels.sources import ARCHIVES
from luke_kernels.tokenizer import LukeTokenizer

# Significant digits from which each number is read back exactly.
DIGITS = {torch.float64: 17, torch.float32: 9, torch.float16: 5, torch.bfloat16: 4}

# Names of files that are not written, and which a directory of shards should not have.
OTHER_FORMATS = (".json", ".gz", ".safetensors")

GZIP = b"\x1f\x8b"


class Record(NamedTuple):
    """A text, its id, None where it has none, and the SHA-256 of all texts up to it, which tells whether they changed.

    It is of a JSON list [text, entity_spans, entities, id] a text.
    """

    text: Text
    identity: Any
    digest: str


Encoded = tuple[Record, TextVectors]


@dataclass
class Counts:
    """What `encode_file` wrote: texts, their words and entities; what truncation took; what it cost.

    Attributes:
        words: Special tokens included.
        cut: Texts that lost words.
        dropped: Entities that are not among `entities`.
        found: Texts that the output had before.
        seconds: Without the loading of the model.
    """

    texts: int = 0
    words: int = 0
    entities: int = 0
    cut: int = 0
    dropped: int = 0
    found: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = f", {self.texts / self.seconds:.1f} texts/s" if self.texts and self.seconds else ""
        parts = [f"encoded {self.texts} texts: {self.words} words, {self.entities} entities"]
        parts += [f"{self.cut} texts cut, {self.dropped} entities dropped"] if self.cut or self.dropped else []
        parts += [f"{self.found} texts were there"] if self.found else []
        return f"{'; '.join(parts)}; {self.seconds:.1f} s{rate}"


def encode_file(
    texts: str | Path,
    output: str | Path,
    model: str | Path,
    tokenizer: str | Path | None = None,
    *,
    layer: int = -1,
    max_tokens: int = 8192,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    truncation: bool = False,
    shard_size: int = 1000,
    resume: bool = False,
) -> Counts:
    """Encode a file of texts into a file or a directory of vectors.

    Texts are encoded in blocks of `shard_size`, each on its own, so that what is in a batch, and with it the rounding,
    does not depend on where a run begins.

    Args:
        texts: JSON lines {"text": str, "entity_spans": [[start, end], ...], "entities": [title, ...], "id": any}, all
            but the text optional and others ignored; "-" for stdin.
        output: File of JSON lines, where it ends in .jsonl, else a directory of shards. One process at a time may write
            it.
        model: Directory, archive or hub id, as `LukeModel.from_pretrained` takes it.
        tokenizer: As `LukeTokenizer.from_pretrained` takes it; None: that of the model, which an archive does not have.
        layer, max_tokens, truncation: As in `luke_kernels.encode`.
        device: `"auto"`: the GPU where torch sees one.
        dtype: Of the weights and the vectors, float16, bfloat16, float32 or float64; None: as stored.
        shard_size: Texts of a block, and so of a shard, whose vectors are held in memory, twice while they are joined.
        resume: Whether to continue after the last whole line or shard that `output` has.

    Returns:
        `Counts` of what was written.

    Raises:
        ValueError, TypeError: an argument breaks its rule; `output` exists and `resume` is False, or it was made with
            other settings or of other texts, or another process writes it; a text is malformed, named by file and line.
            What was written before stays.
        FileNotFoundError: `texts` does not exist, or there is no model or tokenizer.
    """
    if type(shard_size) is not int or shard_size < 1:
        raise ValueError(f"shard_size must be a positive int, got {shard_size!r}")
    if dtype is not None and dtype not in DIGITS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DIGITS))}, got {dtype}")
    from_stdin = str(texts) == "-"
    if not from_stdin and not Path(texts).exists():
        raise FileNotFoundError(f"texts must be a file or -, got {texts}, which does not exist")
    if not from_stdin and Path(texts).is_dir():
        raise ValueError(f"texts must be a file or -, got the directory {texts}")
    if tokenizer is None and Path(model).is_file() and str(model).endswith(ARCHIVES):
        raise ValueError(f"tokenizer must be given where model is an archive, which holds none, got None for {model}")
    chosen = choose_device(device)
    target: JsonLines | Shards = JsonLines(Path(output)) if str(output).endswith(".jsonl") else Shards(Path(output))
    found = target.find()
    if found.exists and not resume:
        raise ValueError(f"output must be new, or resume (--resume) be set to continue it, got {output}")
    # All lines of a file are checked before the first is encoded; pipes can be read only once.
    total = sum(1 for _ in _same_texts(texts, found)) if not from_stdin and Path(texts).is_file() else None
    encoder = TextEncoder(
        _Encoder.from_pretrained(model, dtype=dtype, device=chosen),
        _load_tokenizer(model, tokenizer),
        max_tokens=max_tokens,
        layer=layer,
        truncation=truncation,
    )
    if (
        encoder.layer
        and chosen.type == "cpu"
        and encoder.model.dtype != torch.float64
        and cpu_kernels_missing() is None
    ):
        encoder.model.optimize_for_inference()
    # What vectors depend on beyond rounding, and the blocks, which are never mixed.
    settings = {
        "model": str(model),
        "tokenizer": str(model if tokenizer is None else tokenizer),
        "layer": encoder.layer,
        "dtype": str(encoder.model.dtype).removeprefix("torch."),
        "shard_size": shard_size,
    }
    if found.num_texts and found.settings != settings:
        others = [name for name in settings if found.settings.get(name) != settings[name]]
        made, asked = (", ".join(f"{name} {each.get(name)}" for name in others) for each in (found.settings, settings))
        raise ValueError(f"output must have been made with {asked} to be resumed, got {made}")
    counts = Counts(found=found.num_texts)
    began = time.perf_counter()
    records = _same_texts(texts, found)
    # Of a block that is there in part all texts are encoded again, if there are more.
    done = found.num_texts % shard_size
    with target, text_progress(total, found.num_texts - done) as advance:
        skipped = sum(1 for _ in islice(records, found.num_texts - done))
        begun = list(islice(records, done + 1)) if done else []
        if skipped + len(begun) < found.num_texts:
            raise ValueError(f"texts must have the {found.num_texts} that output has, got {skipped + len(begun)}")
        if not done or len(begun) > done:
            limit = encoder.model.config.max_words if truncation else None
            with closing(_encode(encoder, chain(begun, records), shard_size, advance)) as encoded:
                results = _counted(counts, islice(encoded, done, None), limit)
                size = shard_size - done
                while target.write(settings, islice(results, size)):
                    size = shard_size
                    _give_back_memory()
    counts.seconds = time.perf_counter() - began
    return counts


def _give_back_memory() -> None:
    """Return to the system what is free in the heap, where the C library can.

    The vectors of a block outlive the activations that were allocated among them, so that free memory is left in pieces
    that are too small for the next ones: it doubles within some hundred blocks.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _load_tokenizer(model: str | Path, tokenizer: str | Path | None) -> LukeTokenizer:
    try:
        return LukeTokenizer.from_pretrained(model if tokenizer is None else tokenizer)
    except FileNotFoundError as error:
        if tokenizer is not None:
            raise
        raise FileNotFoundError(
            f"tokenizer (--tokenizer) must be given where model has none, got None: {error}"
        ) from None


def _same_texts(path: str | Path, found: "Found") -> Iterator[Record]:
    """Yield the texts of JSON lines; refuse those that are not what an output was made of."""
    same = 0
    for number, record in enumerate(read_texts(path), 1):
        expected = found.digests.get(number)
        if expected is not None and expected != record.digest:
            before = number - same - 1
            others = f"or one of the {before} before it, " if before else ""
            raise ValueError(
                f"texts must be those that output was made of, got {record.text.name}, {others}"
                "with another text, entity_spans, entities or id"
            )
        same = number if expected is not None else same
        yield record


def _encode(
    encoder: TextEncoder, records: Iterable[Record], block_size: int, advance: Callable[[int], None]
) -> Generator[Encoded, None, None]:
    """Encode texts in blocks; the encoder reads them ahead in a thread of its own."""
    read: deque[Record] = deque()

    def texts() -> Iterator[Text]:
        for record in records:
            read.append(record)
            yield record.text

    with closing(encoder.encode(texts(), advance, block_size)) as vectors:
        for result in vectors:
            yield read.popleft(), result


def _counted(counts: Counts, encoded: Iterable[Encoded], limit: int | None) -> Iterator[Encoded]:
    """Pass texts on and count them; those of `limit` words are cut where their last characters are in none."""
    for record, result in encoded:
        yield record, result
        counts.texts += 1
        counts.words += len(result.words)
        counts.entities += len(result.entities)
        counts.dropped += len(result.dropped_spans)
        # Offsets are of characters without the space around a word.
        counts.cut += len(result.words) == limit and int(result.offsets.max()) < len(record.text.text.rstrip())


class _Encoder(LukeModel):
    """Without a pooler, so that a checkpoint that lacks one causes no warning."""

    def __init__(self, config: LukeConfig, *, backend: str = "auto"):
        super().__init__(config, add_pooling_layer=False, backend=backend)


def read_texts(path: str | Path) -> Iterator[Record]:
    """Yield the texts of JSON lines, named by file and line.

    Raises:
        ValueError: a line is no JSON object with a text, or its text or id cannot be encoded or written.
    """
    from_stdin = str(path) == "-"
    with open(sys.stdin.fileno() if from_stdin else path, "rb", closefd=not from_stdin) as lines:
        digest = hashlib.sha256()
        for number, line in enumerate(lines, 1):
            if number == 1 and line.startswith(GZIP):
                name = "FILE" if from_stdin else path
                raise ValueError(
                    f"{'stdin' if from_stdin else path}: must be JSON lines, got gzip: "
                    f"zcat {name} | luke-kernels encode - ..."
                )
            where = f"{'stdin' if from_stdin else path}, line {number}"
            if not line.strip():
                raise ValueError(f"{where}: must be a JSON object, got an empty line")
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                start = line[:60].decode(errors="replace").strip()
                raise ValueError(f"{where}: must be a JSON object, got {start!r}: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: must be a JSON object, got {type(record).__name__}")
            text, identity = record.get("text"), record.get("id")
            if not isinstance(text, str):
                raise ValueError(f"{where}: text must be a string, got {text!r}")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{where}: text must hold no lone surrogates, got {text[error.start]!r}") from None
            try:
                json.dumps(identity, allow_nan=False)
            except ValueError:
                raise ValueError(f"{where}: id must hold finite numbers only, got {identity!r}") from None
            spans, entities = record.get("entity_spans"), record.get("entities")
            digest.update(json.dumps([text, spans, entities, identity]).encode())
            yield Record(Text(where, text, spans, entities), identity, digest.hexdigest())


def _open_alone(path: Path, output: Path) -> IO[bytes]:
    """Open a file for appending, and hold it against other processes until it is closed."""
    file = path.open("ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"output must be written by one process at a time, got {output}, which is in use") from None
    except OSError as error:  # a file system without locks
        warnings.warn(f"{output} cannot be protected from a second process: {error}", stacklevel=2)
    return file


def _check_below(output: Path) -> None:
    file = next((parent for parent in output.parents if parent.exists() and not parent.is_dir()), None)
    if file is not None:
        raise ValueError(f"output must lie in a directory, got {output}, and {file} is a file")


def _changed(output: Path) -> ValueError:
    return ValueError(f"output must be written by one process at a time, got {output}, which has changed meanwhile")


class Found(NamedTuple):
    """What there is of an output: whether anything, of how many texts, made with which settings, of which texts.

    `digests` are those of the texts before, by their number, where the output has them: after each line or shard.
    """

    exists: bool
    num_texts: int = 0
    settings: Any = None
    digests: Mapping[int, str] = MappingProxyType({})


class JsonLines:
    """A file with one line per text; each line says what made it, and of which texts up to its own."""

    HEAD = b'{"settings": '
    # Found in a line without reading its vectors; within a string of JSON the quotes would be escaped.
    DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')

    def __init__(self, path: Path):
        self.path = path
        # Of the whole lines, and of the file as it was found.
        self._size = self._found_size = 0

    def find(self) -> Found:
        """Look for whole lines; a partial one after them is cut off when writing begins."""
        _check_below(self.path)
        if not self.path.exists():
            return Found(False)
        if not self.path.is_file():
            raise ValueError(f"output must be a file where it ends in .jsonl, got {self.path}")
        digests: dict[int, str] = {}
        settings = None
        with self.path.open("rb") as lines:
            for line in lines:
                whole, digest = line.endswith(b"\n"), self.DIGEST.search(line)
                if not self.HEAD.startswith(line[: len(self.HEAD)]) or (whole and digest is None):
                    raise ValueError(f"output must hold lines of vectors only, got {line[:60]!r} in {self.path}")
                if whole and digest is not None:
                    settings = settings or json.loads(line)["settings"]
                    digests[len(digests) + 1] = digest[1].decode()
                    self._size += len(line)
                self._found_size += len(line)
        return Found(self._found_size > 0, len(digests), settings, digests)

    def __enter__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_alone(self.path, self.path)
        if os.fstat(self._file.fileno()).st_size != self._found_size:
            self._file.close()
            raise _changed(self.path)
        self._file.truncate(self._size)

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, settings: dict[str, Any], encoded: Iterable[Encoded]) -> bool:
        """Write a line for each text as it comes, when interrupted whole lines; return whether there was any text."""
        before = self._size
        for (text, identity, digest), result in encoded:
            values = {
                "settings": json.dumps(settings),
                "digest": json.dumps(digest),
                **({} if identity is None else {"id": json.dumps(identity)}),
                "words": _json_rows(text.name, "words", result.words),
                "entities": _json_rows(text.name, "entities", result.entities),
                "offsets": json.dumps(result.offsets.tolist()),
                "entity_span_indices": json.dumps(result.entity_span_indices),
            }
            line = ", ".join(f'"{name}": {value}' for name, value in values.items())
            self._append(f"{{{line}}}\n".encode())
        return self._size > before

    def _append(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:  # also Ctrl-C
            self._file.truncate(self._size)
            raise
        self._size += len(line)


def _json_rows(where: str, name: str, states: Tensor) -> str:
    if not states.isfinite().all():
        raise ValueError(f"{where}: {name} must have finite vectors for JSON, got infinite ones or NaN")
    row = f"[{', '.join([f'%.{DIGITS[states.dtype]}g'] * states.shape[1])}]"
    return f"[{', '.join(row % tuple(values) for values in states.tolist())}]"


class Shards:
    """A directory of 00000.safetensors and so on; each shard says what made it, and of which texts up to its last."""

    def __init__(self, path: Path):
        self.path, self._aside = path, path / ".writing"
        self._num_shards = self._num_texts = 0

    def find(self) -> Found:
        """Look for shards, which are whole: a partial one is never moved into place."""
        from safetensors import SafetensorError, safe_open

        _check_below(self.path)
        if not self.path.exists():
            if self.path.name.endswith(OTHER_FORMATS):
                raise ValueError(f"output must end in .jsonl or be a directory, got {self.path}")
            return Found(False)
        if not self.path.is_dir():
            raise ValueError(f"output must end in .jsonl or be a directory, got the file {self.path}")
        numbers = sorted(int(path.stem) for path in self.path.glob("*.safetensors") if path.stem.isdecimal())
        if numbers != list(range(len(numbers))):
            raise ValueError(f"output must hold all shards from 00000 on, got {numbers} in {self.path}")
        shards = [self.path / f"{number:05}.safetensors" for number in numbers]
        foreign = sorted({path.name for path in self.path.iterdir()} - {path.name for path in (*shards, self._aside)})
        if foreign:
            raise ValueError(f"output must be a directory of shards and nothing else, got {foreign[0]} in {self.path}")
        digests: dict[int, str] = {}
        num_texts, settings = 0, None
        for path in shards:
            try:
                with safe_open(path, framework="pt") as shard:
                    about = json.loads(shard.metadata()["about"])
                num_texts, settings = about["first_text"] + len(about["ids"]), dict(about["settings"])
                digests[num_texts] = about["digest"]
            except (SafetensorError, TypeError, KeyError, ValueError) as error:
                raise ValueError(f"output must hold whole shards of vectors, got {path}: {error!r}") from None
        self._num_shards, self._num_texts = len(numbers), num_texts
        return Found(bool(shards) or self._aside.exists(), num_texts, settings, digests)

    def __enter__(self) -> None:
        self._aside.mkdir(parents=True, exist_ok=True)
        self._lock = _open_alone(self._aside / "lock", self.path)
        num_texts = self._num_texts
        self.find()
        if self._num_texts != num_texts:
            self.__exit__()
            raise _changed(self.path)

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._aside)
        self._lock.close()

    def write(self, settings: dict[str, Any], encoded: Iterable[Encoded]) -> bool:
        """Write a shard aside, then move it into place; return whether there was any text."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        parts: dict[str, list[Tensor]] = {"words": [], "entities": [], "offsets": [], "entity_span_indices": []}
        ids: list[Any] = []
        for record, result in encoded:
            ids.append(record.identity)
            parts["words"].append(result.words)
            parts["entities"].append(result.entities)
            parts["offsets"].append(result.offsets)
            parts["entity_span_indices"].append(torch.tensor(result.entity_span_indices, dtype=torch.int64))
        if not ids:
            return False
        tensors = {
            "cu_words": _cumulative([len(words) for words in parts["words"]]),
            "cu_entities": _cumulative([len(entities) for entities in parts["entities"]]),
        }
        for name in list(parts):
            # Popped, so that the parts are freed before the next are joined and the file is written.
            tensors[name] = torch.cat(parts.pop(name))
        about = {
            "first_text": self._num_texts,
            "settings": settings,
            "digest": record.digest,
            "ids": ids,
        }
        name = f"{self._num_shards:05}.safetensors"
        try:
            # One entry: of several the order in the file would be random.
            save_file(tensors, self._aside / name, metadata={"about": json.dumps(about)})
        except SafetensorError as error:
            raise OSError(f"{self.path / name} could not be written: {error}") from None
        # safetensors lets nobody but the owner read.
        (self._aside / name).chmod(stat.S_IMODE(self.path.stat().st_mode) & 0o666)
        os.replace(self._aside / name, self.path / name)
        self._num_shards += 1
        self._num_texts += len(ids)
        return True


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)
