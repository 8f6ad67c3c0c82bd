"""LUKE on real sentences: transformers' model and ours side by side, and which entities lie near one another."""

import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from luke_kernels.config import LukeConfig
from luke_kernels.encode import choose_device
from luke_kernels.integrations import accelerate
from luke_kernels.memory import peak_memory_bytes
from luke_kernels.model import LukeModel
from luke_kernels.ops.backends import TABLE, choose, reason_against
from luke_kernels.packing import PackedBatch
from luke_kernels.tokenizer import BUNDLED, LukeTokenizer
from luke_kernels.version import __version__

SEED = 0
REPEATS = 5
# Of the largest value. Float32 rounds by some 1e-6 of it over twelve layers; a wrong attention differs by far more.
TOLERANCE = 1e-4
# Every so many entities, one is shown with its nearest.
STEP = 6


@dataclass(frozen=True, eq=False)
class Contender:
    """A model, the backend of its attention, and the batch as it takes it."""

    name: str
    backend: str
    model: nn.Module
    inputs: Mapping[str, Any]

    def __call__(self) -> Any:
        with torch.no_grad():
            return self.model(**self.inputs)

    def states(self, batch: PackedBatch) -> Tensor:
        """Return the last hidden states of the tokens that exist, words first, (Tw + Te, C)."""
        output = self()
        words, entities = output.last_hidden_state, output.entity_last_hidden_state
        if words.dim() == 3:
            words, entities = batch.pack_words(words), batch.pack_entities(entities)
        return torch.cat([words, entities])


def sentences() -> list[dict]:
    """Return the sentences the package ships: text, and entities with title and character span."""
    lines = (files("luke_kernels") / "data/sentences.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def run(console: Console, name_or_path: str | None = None, device: str = "auto") -> bool:
    """Print how transformers' model and ours compare, and the nearest of some entities.

    Args:
        console: Where to print.
        name_or_path: A checkpoint with its tokenizer, as `LukeModel.from_pretrained` takes it; None: a model of base
            size with new weights.
        device: "auto" for a GPU where there is one; or "cpu", "cuda".

    Returns:
        Whether all hidden states are right. A contender that is wrong gets no time.

    Raises:
        ValueError: there is no such device.
        FileNotFoundError, ValueError: as in `LukeModel.from_pretrained`.
    """
    model, tokenizer = _load(name_or_path, choose_device(device))
    texts = sentences()
    encodings = tokenizer(
        [text["text"] for text in texts],
        entity_spans=[[(entity["start"], entity["end"]) for entity in text["entities"]] for text in texts],
        entities=[[entity["title"] for entity in text["entities"]] for text in texts],
    )
    batch = PackedBatch.from_encodings(encodings).to(model.device)
    padded = tokenizer.pad(encodings, return_tensors="pt").to(model.device)
    new = f"weights drawn at random (seed {SEED}), vectors mean nothing yet"
    console.print(_facts(model, batch, name_or_path or new), highlight=False, markup=False)
    contenders, of_transformers = _contenders(model, batch, padded)
    console.print(of_transformers, highlight=False, markup=False)
    console.print(f"Each model runs {1 + REPEATS} times, in turns with the others, and once more for its memory.")
    states = [contender.states(batch) for contender in contenders]
    if not _compare(console, contenders, states, batch):
        console.print("WRONG: luke-kernels doctor checks each backend by itself", highlight=False)
        return False
    console.print(_neighbours(texts, states[-1][batch.num_words :].cpu()))
    for backend in TABLE:
        reason = reason_against(backend, model.device, model.dtype, _head_dim(model))
        if reason is not None:
            console.print(f"{backend}: off, {reason}", highlight=False)
    console.print(
        "A LUKE of transformers on fused attention:\n"
        "    [bold]luke_kernels.accelerate(model)[/bold]\n"
        "Texts to vectors:\n"
        "    [bold]luke-kernels encode texts.jsonl vectors --model studio-ousia/luke-base[/bold]",
        highlight=False,
        soft_wrap=True,
    )
    return True


def nearest(vectors: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Find for each vector the nearest, by cosine, of those with other owners.

    Args:
        vectors: (N, C).
        owners: int64 (N,).

    Returns:
        The cosines and the indices, (N,); cosines of -inf where there is no other owner.
    """
    directions = F.normalize(vectors)
    cosines = directions @ directions.T
    values, indices = cosines.masked_fill(owners[:, None] == owners, -torch.inf).max(dim=1)
    return values, indices


def _load(name_or_path: str | None, device: torch.device) -> tuple[LukeModel, LukeTokenizer]:
    if name_or_path is not None:
        tokenizer = LukeTokenizer.from_pretrained(name_or_path)
        return LukeModel.from_pretrained(name_or_path, dtype=torch.float32, device=device), tokenizer
    tokenizer = LukeTokenizer.from_pretrained(BUNDLED)
    torch.manual_seed(SEED)
    config = LukeConfig(vocab_size=len(tokenizer), entity_vocab_size=len(tokenizer.entity_vocab))
    return LukeModel(config).eval().to(device), tokenizer


def _head_dim(model: LukeModel) -> int:
    return model.config.hidden_size // model.config.num_attention_heads


def _facts(model: LukeModel, batch: PackedBatch, weights: str) -> str:
    config, device = model.config, model.device
    hardware = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = batch.num_words + batch.num_entities
    padded_tokens = batch.batch_size * (batch.padded_words + batch.padded_entities)
    return (
        f"luke_kernels {__version__}, torch {torch.__version__}; {device.type}, {hardware}\n"
        f"LUKE of {config.num_hidden_layers} layers, hidden size {config.hidden_size}, {parameters / 1e6:.1f} M "
        f"parameters in float32: {weights}\n"
        f"{batch.batch_size} sentences, {batch.num_words} words + {batch.num_entities} entities = {tokens} tokens, "
        f"{padded_tokens} when padded"
    )


def _contenders(model: LukeModel, batch: PackedBatch, padded: Mapping[str, Tensor]) -> tuple[list[Contender], str]:
    """Return the contenders, all with the weights of `model`, and which transformers is among them or why none.

    The first is what the others must equal, the last is `model` itself.
    """
    backend = choose("auto", model.device, model.dtype, _head_dim(model))
    ours = Contender("luke_kernels", backend, model, {"input_ids": batch})
    try:
        import transformers
    except ImportError as error:
        with torch.device("meta"):
            reference = LukeModel(model.config, backend="reference")
        plain = Contender("luke_kernels", "reference", _share(model, reference), ours.inputs)
        return [plain, ours], f"transformers: absent, {error} (pip install transformers)"
    config = transformers.LukeConfig(**model.config.to_dict())
    with torch.device("meta"):
        eager, fused = transformers.LukeModel(config), transformers.LukeModel(config)
    return [
        Contender("transformers", "eager", _share(model, eager), padded),
        Contender("accelerated", backend, accelerate(_share(model, fused)), padded),
        ours,
    ], f"transformers {transformers.__version__}"


def _share(source: nn.Module, model: nn.Module) -> nn.Module:
    """Give the weights of `source` themselves, not copies, to a model on the meta device."""
    model.load_state_dict(source.state_dict(), assign=True)
    return model.eval()


def _compare(console: Console, contenders: Sequence[Contender], states: Sequence[Tensor], batch: PackedBatch) -> bool:
    """Print differences from the first contender, speed and memory; return whether all are right."""
    device, truth = batch.position_ids.device, states[0]
    tolerance = TOLERANCE * truth.abs().max().item()
    differences = [(found - truth).abs().max().item() for found in states]
    right = [difference <= tolerance for difference in differences]
    seconds = _median_seconds(list(itertools.compress(contenders, right)), device)
    table = Table(
        caption="difference: the largest of the last hidden states of tokens that exist, from the first row; "
        f"allowed {tolerance:.1e}"
    )
    for column in ("LUKE, forward", "attention", "difference", "sentences/s", "ratio", "peak memory"):
        table.add_column(column, justify="left" if column in ("LUKE, forward", "attention") else "right")
    for contender, difference, is_right in zip(contenders, differences, right, strict=True):
        if not is_right:
            table.add_row(contender.name, contender.backend, f"[red]WRONG[/red] {difference:.2g}")
            continue
        peak_bytes = peak_memory_bytes(contender, device)
        table.add_row(
            contender.name,
            contender.backend,
            f"{difference:.2g}",
            f"{batch.batch_size / seconds[contender]:.1f}",
            f"{seconds[contenders[0]] / seconds[contender]:.2f} x",
            "unknown" if peak_bytes is None else f"{peak_bytes / 2**20:.0f} MiB",
        )
    console.print(table)
    return all(right)


def _median_seconds(contenders: Sequence[Contender], device: torch.device) -> dict[Contender, float]:
    """Time contenders in turns; all have run before."""
    samples: dict[Contender, list[float]] = {contender: [] for contender in contenders}
    for _ in range(REPEATS):
        for contender in contenders:
            start = time.perf_counter()
            contender()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples[contender].append(time.perf_counter() - start)
    return {contender: statistics.median(seconds) for contender, seconds in samples.items()}


def _neighbours(texts: list[dict], vectors: Tensor) -> Table:
    """Show some entities, each with the nearest of the other sentences."""
    mentions = [(number, entity) for number, text in enumerate(texts) for entity in text["entities"]]
    cosines, indices = nearest(vectors, torch.tensor([number for number, _ in mentions]))
    table = Table(title="Nearest entity of another sentence, by cosine of last hidden states")
    for column in ("entity", "nearest", "cosine"):
        table.add_column(column, justify="right" if column == "cosine" else "left")
    for at in range(0, len(mentions), STEP):
        pair = mentions[at], mentions[int(indices[at])]
        table.add_row(*(_fragment(texts[number]["text"], entity) for number, entity in pair), f"{cosines[at]:.3f}")
    return table


def _fragment(text: str, entity: dict) -> Text:
    """Return a mention in brackets, and two words on each side."""
    before, mention, after = text[: entity["start"]], text[entity["start"] : entity["end"]], text[entity["end"] :]
    return Text.assemble(" ".join(before.split(" ")[-3:]), (f"[{mention}]", "bold"), " ".join(after.split(" ")[:3]))
