"""Encode Wikipedia for minutes, killed and resumed: python scripts/soak_encode.py --minutes 30

Runs `luke-kernels encode` on the articles of LUKE_KERNELS_DATA with a small model of random weights. In the first half
of the time it is killed, by SIGKILL and SIGINT in turn, and resumed; in the second half it is left alone, and its
resident memory must not grow. At the end the shards must hold all texts up to the last, once and in order. Exit code 1
where memory grew; what is wrong otherwise is raised.
"""

import argparse
import functools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from luke_kernels import LukeConfig, LukeModel, LukeTokenizer
from luke_kernels.tokenizer import BUNDLED

ARTICLES = "wikipedia/enwiki-plain-text.tar.xz"
ARTICLE = re.compile(r'<doc [^>]*title="([^"]*)">\n(.*?)\n</doc>', re.DOTALL)
# All 96,000 articles then take 5 GB: 49 words each, cut to 128, of 256 float32 and two int64.
HIDDEN_SIZE, MAX_WORDS = 256, 128
FREE_BYTES = 7 * 10**9
# Small, so that what a shard takes while it is written is little beside what is there always.
SHARD_SIZE = 250
SIGNALS = (signal.SIGKILL, signal.SIGINT)
SAMPLE_S = 1.0
# Of the time left alone: until the allocator has met the longest windows.
WARM_UP = 0.2
MAX_GROWTH = 0.05
START_S = 300
# Left alone for no less, so that a short trial has something to show.
LEAST_S = 30.0


def articles(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield title and text of each article."""
    with tarfile.open(folder / ARTICLES) as archive:
        for member in archive:
            if (file := archive.extractfile(member)) is not None:
                for title, text in ARTICLE.findall(file.read().decode()):
                    yield title, " ".join(text.split())


def write_texts(path: Path, folder: Path) -> int:
    """Write JSON lines, each with its number as id; return how many. An article's entity is its title."""
    number = 0
    with path.open("w", encoding="utf-8") as file:
        for title, text in articles(folder):
            spans = [[0, len(title)]] if title and text.startswith(title) else []
            file.write(json.dumps({"text": text, "entity_spans": spans, "id": number}) + "\n")
            number += 1
    return number


def write_model(folder: Path, layers: int) -> None:
    """Save a narrow model of random weights, and the tokenizer that the package ships."""
    tokenizer = LukeTokenizer.from_pretrained(BUNDLED)
    torch.manual_seed(0)
    config = LukeConfig(
        vocab_size=len(tokenizer),
        entity_vocab_size=len(tokenizer.entity_vocab),
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=layers,
        num_attention_heads=HIDDEN_SIZE // 64,
        intermediate_size=4 * HIDDEN_SIZE,
        max_position_embeddings=MAX_WORDS + 2,
    )
    LukeModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Run:
    """A process that encodes, its resident memory sampled until it ends."""

    def __init__(self, texts: Path, vectors: Path, model: Path, log: Path):
        self.vectors, self.log, self.log_start = vectors, log, log.stat().st_size if log.exists() else 0
        command = [sys.executable, "-m", "luke_kernels.cli", "encode", str(texts), str(vectors)]
        command += ["--model", str(model), "--resume", "--truncation", "--shard-size", str(SHARD_SIZE)]
        # What runs in the background of a shell ignores SIGINT, and its children with it.
        listens = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr, preexec_fn=listens)
        self.rss_bytes: list[int] = []

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def watch(self, seconds: float) -> bool:
        """Sample for so long; return whether the process still runs."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                self.process.wait(min(SAMPLE_S, left))
                return False
            except subprocess.TimeoutExpired:
                pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
                self.rss_bytes.append(pages * os.sysconf("SC_PAGE_SIZE"))
        return True

    def start(self) -> bool:
        """Wait until a shard was written; return whether the process still runs."""
        before, deadline = shards_of(self.vectors), time.monotonic() + START_S
        while len(shards_of(self.vectors)) == len(before):
            if not self.watch(SAMPLE_S / 2):
                return False
            if time.monotonic() > deadline:
                raise RuntimeError(f"a shard must be written in {START_S} s, got none; see {self.log}")
        self.rss_bytes.clear()
        return True

    def end(self, number: int) -> None:
        """End the process by a signal, which it must obey at once."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        expected = 130 if number == signal.SIGINT else -number
        if code != expected:
            raise RuntimeError(f"the exit code must be {expected} after signal {number}, got {code}; see {self.log}")
        if number == signal.SIGINT:
            said = self.log.read_bytes()[self.log_start :].decode()
            if said != "interrupted; run the same command with --resume to continue\n":
                raise RuntimeError(f"SIGINT must be answered by one line, got {said!r}")


def shards_of(vectors: Path) -> list[Path]:
    """Return the shards in order."""
    return sorted(vectors.glob("*.safetensors"))


def check(vectors: Path) -> int:
    """Return how many texts the shards hold, once and in order.

    Raises:
        ValueError: they do not, or a vector is missing or not finite.
    """
    number = 0
    for path in shards_of(vectors):
        with safe_open(path, framework="pt") as shard:
            about = json.loads(shard.metadata()["about"])
            ids, words, cu_words = about["ids"], shard.get_tensor("words"), shard.get_tensor("cu_words")
        if about["first_text"] != number or ids != list(range(number, number + len(ids))):
            raise ValueError(f"{path}: ids must go on from {number}, got {ids[:1]} to {ids[-1:]}")
        if len(cu_words) != len(ids) + 1 or int(cu_words[-1]) != len(words) or int(cu_words.diff().min()) < 2:
            raise ValueError(f"{path}: words must be those of {len(ids)} texts, got {len(words)}")
        if not words.isfinite().all():
            raise ValueError(f"{path}: words must be finite, got others")
        number += len(ids)
    return number


def growth(rss_bytes: list[int]) -> float:
    """Print quantiles of samples after the warm-up, and their slope; return by which share of the median they grew."""
    samples = rss_bytes[int(WARM_UP * len(rss_bytes)) :]
    low, *_, high = statistics.quantiles(samples, n=20)
    middle = statistics.median(samples)
    slope, _ = statistics.linear_regression(range(len(samples)), samples)
    mib = 2**20
    print(
        f"resident memory, {len(samples)} samples: p5 {low / mib:.0f}, median {middle / mib:.0f}, "
        f"p95 {high / mib:.0f}, most {max(samples) / mib:.0f} MiB; slope {slope / SAMPLE_S * 60 / mib:+.2f} MiB/min, "
        f"{100 * slope * len(samples) / middle:+.1f} % of the median in all"
    )
    return slope * len(samples) / middle


def soak(data: Path, work: Path, minutes: float, kills: int, seed: int, layers: int) -> bool:
    """Run it all in a folder; return whether memory was flat. What is wrong with the output is raised."""
    texts, vectors, model, log = work / "texts.jsonl", work / "vectors", work / "model", work / "log"
    total = write_texts(texts, data)
    write_model(model, layers)
    print(f"{total} articles; {shutil.disk_usage(work).free / 1e9:.0f} GB free in {work}", flush=True)
    chance, began = random.Random(seed), time.monotonic()
    for number in range(kills):
        with Run(texts, vectors, model, log) as run:
            going = run.start()
            left = max(minutes * 30 - (time.monotonic() - began), 0)
            # What is left of the half is shared out, at random.
            if not going or not run.watch(min(chance.uniform(0, 2 * left / (kills - number)), left)):
                if run.process.returncode:
                    raise RuntimeError(f"the exit code must be 0, got {run.process.returncode}; see {log}")
                break
            run.end(SIGNALS[number % 2])
        after = time.monotonic() - began
        print(f"{after:5.0f} s: ended by {SIGNALS[number % 2].name} after {check(vectors)} texts", flush=True)
    with Run(texts, vectors, model, log) as run:
        if run.start() and run.watch(max(minutes * 60 - (time.monotonic() - began), 2 * LEAST_S)):
            run.end(signal.SIGINT)
        elif run.process.returncode:
            raise RuntimeError(f"the exit code must be 0 at the end, got {run.process.returncode}; see {log}")
    if len(run.rss_bytes) * SAMPLE_S < LEAST_S:
        raise RuntimeError(
            f"the last process must run {LEAST_S} s for its memory to be judged, got {len(run.rss_bytes)} samples: "
            "give more --layers"
        )
    encoded = check(vectors)
    size = sum(path.stat().st_size for path in shards_of(vectors))
    if not run.process.returncode and encoded != total:
        raise ValueError(f"vectors must be of all {total} texts, got {encoded}")
    print(f"{encoded} of {total} texts, each once and in order, in {size / 1e9:.2f} GB")
    return abs(growth(run.rss_bytes)) <= MAX_GROWTH


def main() -> int:
    parser = argparse.ArgumentParser(description="Encode Wikipedia, killed and resumed; memory must stay flat.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=24, help="of the model; more where the articles end too soon")
    parser.add_argument("--folder", type=Path, help="where up to 5 GB are written, and removed; else /tmp")
    options = parser.parse_args()
    data = Path(os.environ.get("LUKE_KERNELS_DATA", ""))
    if not (data / ARTICLES).is_file():
        parser.error(f"LUKE_KERNELS_DATA must name a folder with {ARTICLES}, got {str(data)!r}")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="soak-") as work:
        if (free := shutil.disk_usage(work).free) < FREE_BYTES:
            parser.error(f"folder must have {FREE_BYTES / 1e9:.0f} GB free, got {free / 1e9:.1f}")
        return 0 if soak(data, Path(work), options.minutes, options.kills, options.seed, options.layers) else 1


if __name__ == "__main__":
    sys.exit(main())
