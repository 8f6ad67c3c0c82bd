"""The op on real sentences: every backend that runs here, its error and its time."""

import json
import statistics
import time
import zlib
from collections.abc import Callable
from importlib.resources import files

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from luke_kernels.attention import EntityAwareSelfAttention
from luke_kernels.ops import available_backends, entity_aware_attention_varlen, explain_backends
from luke_kernels.ops.backends import INTERPRETING
from luke_kernels.packing import PackedLengths

HIDDEN_SIZE, NUM_HEADS = 768, 12
VOCABULARY = 4096
REPEATS = 9


def sentences() -> list[dict]:
    """Return the sentences the package ships: text, and entities with title and character span."""
    lines = (files("luke_kernels") / "data/sentences.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def embed(batch: list[dict]) -> tuple[Tensor, Tensor, PackedLengths]:
    """Embed words by a hash of their letters in a random table, entities by their title and the words they span.

    Returns:
        Hidden states of the words (Tw, C) and of the entities (Te, C), and where the sequences begin.
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, HIDDEN_SIZE, generator=generator)

    def vector(text: str) -> Tensor:
        return table[zlib.crc32(text.lower().encode()) % VOCABULARY]

    words, entities = [], []
    for sentence in batch:
        words += [vector(word) for word in sentence["text"].split()]
        for entity in sentence["entities"]:
            mention = sentence["text"][entity["start"] : entity["end"]].split()
            entities.append((vector(entity["title"]) + torch.stack([vector(w) for w in mention]).mean(0)) / 2**0.5)
    lengths = PackedLengths.from_lengths([len(s["text"].split()) for s in batch], [len(s["entities"]) for s in batch])
    return torch.stack(words), torch.stack(entities), lengths


def run(console: Console) -> None:
    """Run every available backend on the projections of a random layer and print errors and times."""
    torch.manual_seed(0)
    batch = sentences()
    word_hidden, entity_hidden, lengths = embed(batch)
    layer = EntityAwareSelfAttention(HIDDEN_SIZE, NUM_HEADS).eval()
    with torch.no_grad():
        words = layer.project_words(word_hidden)
        entities = layer.project_entities(entity_hidden)
    console.print(
        f"{len(batch)} sentences, {len(word_hidden)} words, {len(entity_hidden)} entities, packed; a random layer of "
        f"{NUM_HEADS} heads of {HIDDEN_SIZE // NUM_HEADS}; {torch.get_num_threads()} threads",
        highlight=False,
    )

    def attend(w: Tensor, e: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
        return entity_aware_attention_varlen(
            w, e, lengths.cu_words, lengths.cu_entities, lengths.max_words, lengths.max_entities, backend=backend
        )

    truth = attend(words.double(), entities.double(), "reference")
    runs: dict[tuple[str, torch.dtype], Callable[[], tuple[Tensor, Tensor | None]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        w, e = words.to(dtype), entities.to(dtype)
        reasons = explain_backends(w, e)
        for backend in available_backends():
            # Triton's interpreter takes minutes.
            if reasons[backend] is None and not (backend == "triton" and INTERPRETING):
                runs[backend, dtype] = lambda w=w, e=e, backend=backend: attend(w, e, backend)  # type: ignore[misc]
    errors, times = _compare(runs, truth)
    table = Table(title="Entity-aware attention, forward")
    for column in ("backend", "dtype", "largest error", "time", "against the reference"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for (backend, dtype), seconds in times.items():
        ratio = times["reference", dtype] / seconds
        table.add_row(
            backend,
            str(dtype).removeprefix("torch."),
            f"{errors[backend, dtype]:.1e}",
            f"{seconds * 1000:.2f} ms",
            f"{ratio:.1f} x",
        )
    console.print(table)
    for backend, reason in explain_backends(words, entities).items():
        if reason is not None:
            console.print(f"{backend}: off, {reason}", highlight=False)


def _compare(runs: dict, truth: tuple[Tensor, Tensor | None]) -> tuple[dict, dict]:
    """Return the largest error of each run, and the median time of runs taken in turn."""
    errors, seconds = {}, {key: [] for key in runs}  # type: ignore[var-annotated]
    for key, call in runs.items():
        errors[key] = max((a.double() - b).abs().max().item() for a, b in zip(call(), truth, strict=True))
    for _ in range(REPEATS):
        for key, call in runs.items():
            start = time.perf_counter()
            call()
            seconds[key].append(time.perf_counter() - start)
    return errors, {key: statistics.median(values) for key, values in seconds.items()}
