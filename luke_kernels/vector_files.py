"""A file of texts -> files of their vectors: JSON lines, or shards of safetensors; interrupted work goes on."""

import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luke_kernels.config import LukeConfig
from luke_kernels.encode import Text, TextEncoder, TextVectors, text_progress
from luke_kernels.model import LukeModel
from luke_kernels.tokenizer import LukeTokenizer

# A text and its id, None where it has none.
Record = tuple[Text, Any]

# Significant digits from which each number is read back exactly.
DIGITS = {torch.float64: 17, torch.float32: 9, torch.float16: 5, torch.bfloat16: 4}


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
) -> None:
    """Encode a file of texts into a file or a directory of vectors.

    Texts are encoded in blocks of `shard_size`, each for itself, so that what is in a batch, and with it the rounding,
    does not depend on where a run begins.

    Args:
        texts: JSON lines {"text": str, "entity_spans": [[start, end], ...], "entities": [title, ...], "id": any}, all
            but the text optional and others ignored; "-" for stdin.
        output: File of JSON lines, where it ends in .jsonl, else a directory of shards.
        model: Directory, archive or hub id, as `LukeModel.from_pretrained` takes it.
        tokenizer: As `LukeTokenizer.from_pretrained` takes it; None: that of the model.
        layer, max_tokens, truncation: As in `luke_kernels.encode`.
        device: `"auto"`: the GPU where torch sees one.
        dtype: Of the weights and the vectors; None: as stored.
        shard_size: Texts of a shard, which is held in memory.
        resume: Whether to go on behind the last whole line or shard that `output` has.

    Raises:
        ValueError, TypeError: an argument breaks its rule; `output` exists and `resume` is False, or it was made with
            other settings; a text is malformed, named by file and line. What was written before stays.
    """
    if type(shard_size) is not int or shard_size < 1:
        raise ValueError(f"shard_size must be a positive int, got {shard_size!r}")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu where torch sees no GPU, got cuda")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(texts) != "-" and not Path(texts).exists():
        raise FileNotFoundError(f"texts must be a file or -, got {texts}, which does not exist")
    target: JsonLines | Shards = JsonLines(Path(output)) if str(output).endswith(".jsonl") else Shards(Path(output))
    found = target.find()
    if found.exists and not resume:
        raise ValueError(f"output must be new, or resume (--resume) be set to go on with it, got {output}")
    # All lines of a file are looked at before the first is encoded.
    total = sum(1 for _ in read_texts(texts)) if Path(texts).is_file() else None
    encoder = TextEncoder(
        _Encoder.from_pretrained(model, dtype=dtype, device=device),
        LukeTokenizer.from_pretrained(model if tokenizer is None else tokenizer),
        max_tokens=max_tokens,
        layer=layer,
        truncation=truncation,
    )
    # What vectors depend on beyond rounding, and only where they exist at all.
    settings = {
        "model": str(model),
        "tokenizer": str(model if tokenizer is None else tokenizer),
        "layer": encoder.layer,
        "dtype": str(encoder.model.dtype).removeprefix("torch."),
    }
    if found.num_texts and found.settings != settings:
        raise ValueError(f"output must have been made with {settings} to go on with, got {found.settings}")
    skipped = 0
    records = read_texts(texts)
    with target, text_progress(total, found.num_texts - found.num_texts % shard_size) as advance:
        while block := list(islice(records, shard_size)):
            done = min(found.num_texts - skipped, len(block))
            skipped += done
            if done < len(block):
                vectors = encoder.encode((text for text, _ in block), advance)
                target.write(settings, block[done:], islice(vectors, done, None))
    if skipped < found.num_texts:
        raise ValueError(f"texts must have the {found.num_texts} that output has, got {skipped}")


class _Encoder(LukeModel):
    """Without a pooler: nobody misses one that the checkpoint lacks."""

    def __init__(self, config: LukeConfig, *, backend: str = "auto"):
        super().__init__(config, add_pooling_layer=False, backend=backend)


def read_texts(path: str | Path) -> Iterator[Record]:
    """Yield the texts of JSON lines, named by file and line, and their ids.

    Raises:
        ValueError: a line is no JSON object with a text.
    """
    name = "stdin" if str(path) == "-" else str(path)
    with open(sys.stdin.fileno() if name == "stdin" else path, "rb", closefd=name != "stdin") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{name}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: must be a JSON object, got an error: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: must be a JSON object, got {type(record).__name__}")
            if not isinstance(record.get("text"), str):
                raise ValueError(f"{where}: text must be a string, got {record.get('text')!r}")
            yield Text(where, record["text"], record.get("entity_spans"), record.get("entities")), record.get("id")


class Found(NamedTuple):
    """What there is of an output: whether anything, of how many texts, made with which settings."""

    exists: bool
    num_texts: int = 0
    settings: Any = None


class JsonLines:
    """A file with a line a text; each says what made it."""

    HEAD = b'{"settings": '

    def __init__(self, path: Path):
        self.path, self._size = path, 0

    def find(self) -> Found:
        """Look for whole lines; a part of one behind them is cut off when writing begins."""
        if not self.path.exists():
            return Found(False)
        if not self.path.is_file():
            raise ValueError(f"output must be a file where it ends in .jsonl, got {self.path}")
        num_texts, settings = 0, None
        with self.path.open("rb") as lines:
            for line in lines:
                if not self.HEAD.startswith(line[: len(self.HEAD)]):
                    raise ValueError(f"output must hold lines of vectors only, got {line[:60]!r} in {self.path}")
                if line.endswith(b"\n"):
                    settings = settings or json.loads(line)["settings"]
                    num_texts += 1
                    self._size += len(line)
        return Found(self.path.stat().st_size > 0, num_texts, settings)

    def __enter__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(self._size)

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, settings: dict[str, Any], records: list[Record], vectors: Iterator[TextVectors]) -> None:
        """Write a line for each text as its vectors come; when interrupted, whole lines."""
        for (text, identity), result in zip(records, vectors, strict=True):
            values = {
                "settings": json.dumps(settings),
                **({} if identity is None else {"id": json.dumps(identity)}),
                "words": _json_rows(text.name, "words", result.words),
                "entities": _json_rows(text.name, "entities", result.entities),
                "offsets": json.dumps(result.offsets.tolist()),
                "entity_span_indices": json.dumps(result.entity_span_indices),
            }
            line = ", ".join(f'"{name}": {value}' for name, value in values.items())
            self._append(f"{{{line}}}\n".encode())

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
    """A directory of 00000.safetensors and so on; each says what made it."""

    def __init__(self, path: Path):
        self.path, self._aside = path, path / ".writing"
        self._num_shards = self._num_texts = 0

    def find(self) -> Found:
        """Look for shards, which are whole: others are not moved to where they belong."""
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return Found(False)
        if not self.path.is_dir():
            raise ValueError(f"output must end in .jsonl or be a directory, got the file {self.path}")
        numbers = sorted(int(path.stem) for path in self.path.glob("*.safetensors") if path.stem.isdecimal())
        if numbers != list(range(len(numbers))):
            raise ValueError(f"output must hold all shards from 00000 on, got {numbers} in {self.path}")
        if not numbers:
            return Found(any(self.path.iterdir()))
        path = self.path / f"{numbers[-1]:05}.safetensors"
        try:
            with safe_open(path, framework="pt") as shard:
                about = json.loads(shard.metadata()["about"])
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} must be a whole shard of vectors, got an error: {error}") from None
        self._num_shards, self._num_texts = len(numbers), about["first_text"] + len(about["ids"])
        return Found(True, self._num_texts, about["settings"])

    def __enter__(self) -> None:
        self._aside.mkdir(parents=True, exist_ok=True)

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._aside)

    def write(self, settings: dict[str, Any], records: list[Record], vectors: Iterator[TextVectors]) -> None:
        """Write a shard aside, then move it into place."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        results = list(vectors)
        tensors = {
            "words": torch.cat([result.words for result in results]),
            "entities": torch.cat([result.entities for result in results]),
            "cu_words": _cumulative([len(result.words) for result in results]),
            "cu_entities": _cumulative([len(result.entities) for result in results]),
            "offsets": torch.cat([result.offsets for result in results]),
            "entity_span_indices": torch.tensor([i for r in results for i in r.entity_span_indices], dtype=torch.int64),
        }
        about = {"first_text": self._num_texts, "settings": settings, "ids": [identity for _, identity in records]}
        name = f"{self._num_shards:05}.safetensors"
        try:
            # One entry: of several the order in the file would be random.
            save_file(tensors, self._aside / name, metadata={"about": json.dumps(about)})
        except SafetensorError as error:
            raise OSError(f"{self.path / name} must be written whole, got an error: {error}") from None
        # safetensors lets nobody but the owner read.
        (self._aside / name).chmod(stat.S_IMODE(self.path.stat().st_mode) & 0o666)
        os.replace(self._aside / name, self.path / name)
        self._num_shards += 1
        self._num_texts += len(results)


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)
