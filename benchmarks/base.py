"""Compare with a revision: the same suite, of today, on the luke_kernels of then and of now, by turns."""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import console, records

# Now, then, then, now: what the machine does by the way hits both.
TURNS = ("now", "base", "base", "now")
SUITES = ("attention", "layer", "model", "train", "memory", "tokenizer")
# What a row of the table is of.
KEY = ("case", "dtype", "direction", "contender")


@contextmanager
def installed(revision: str) -> Iterator[Path]:
    """Build a revision; yield a folder of its luke_kernels and today's benchmarks.

    Raises:
        CommandError: there is no such revision, or it does not build.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "installed"
        _run(["git", "-C", str(records.ROOT), "worktree", "add", "--detach", str(source), revision])
        try:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            _run([*pip, "--no-deps", "--target", str(target), str(source)])
        finally:
            _run(["git", "-C", str(records.ROOT), "worktree", "remove", "--force", str(source)])
        shutil.copytree(
            records.ROOT / "benchmarks", target / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__")
        )
        yield target


def compare(revision: str, suite: str, options: Sequence[str], root: Path = records.ROOT) -> str:
    """Run a suite on both by TURNS; return a table of the medians and of how many times as fast it is now."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with installed(revision) as base, tempfile.TemporaryDirectory() as folder:
        for turn, name in enumerate(TURNS):
            out = Path(folder) / f"{turn}.jsonl"
            # From the folder of each: it shadows what is installed.
            command = [sys.executable, "-m", "benchmarks", suite, *options, "--out", str(out)]
            _run(command, {"now": root, "base": base}[name])
            found[name] += records.load([out])
    return table(found["base"], found["now"], revision)


def table(base: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], revision: str) -> str:
    """Return a Markdown table of the medians over all runs; a gate that did not pass stands in place of a time."""
    lines = [
        f"| {' | '.join(KEY)} | {revision}, ms | now, ms | ratio |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    before, after = _medians(base), _medians(now)
    for key in before.keys() | after.keys():
        then, today = before.get(key, ""), after.get(key, "")
        both = isinstance(then, float) and isinstance(today, float)
        cells = [f"{value:.4g}" if isinstance(value, float) else value for value in (then, today)]
        lines.append(f"| {' | '.join([*key, *cells])} | {f'{then / today:.2f}x' if both else ''} |")
    return "\n".join([*lines[:2], *sorted(lines[2:])])


def _medians(found: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], float | str]:
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in found:
        rows[tuple(record[name] for name in KEY)].append(record)
    medians: dict[tuple[str, ...], float | str] = {}
    for key, row in rows.items():
        untimed = [record["gate"] for record in row if record["median_ms"] is None]
        medians[key] = untimed[0] if untimed else statistics.median(record["median_ms"] for record in row)
    return medians


def _run(command: list[str], folder: Path | None = None) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise console.CommandError(f"{' '.join(command)} must succeed, got {done.returncode}: {done.stdout[-2000:]}")
