"""Records: one JSON line a measurement, with all that is needed to judge and to repeat it."""

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_MEASURED = ("median_ms", "p20_ms", "p80_ms", "repeats", "tflops", "matmul_peak_tflops")
_PEAKS = ("fma_peak_tflops", "fraction_of_peak")
_RATES = ("tokens_per_s", "sequences_per_s", "joules", "waiting")
_JUDGED = ("gate", "gate_heads", "message", "error", "eager_error", "bound", "peak_memory_bytes")
_RUN = ("run", "device", "versions", "commit", "dirty", "date", "command")
_WHAT = ("op", "direction", "contender", "backend", "size", "case", "shape", "dtype")
FIELDS = (*_WHAT, *_MEASURED, *_PEAKS, *_RATES, *_JUDGED, *_RUN)


def blank() -> dict[str, Any]:
    """Return a record whose fields are all None."""
    return dict.fromkeys(FIELDS)


def describe_run(device: torch.device) -> dict[str, Any]:
    """Return what the records of one run share; `run` is drawn. Ratios hold within a run only."""
    commit, dirty = _git_state()
    return {
        "run": uuid.uuid4().hex[:12],
        "device": describe_device(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "transformers": _version("transformers"),
            "onnxruntime": _version("onnxruntime"),
            "openvino": _version("openvino"),
        },
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *_module(), *sys.argv[1:]]),
    }


def describe_device(device: torch.device) -> str:
    """Return kind and name of the device, for a CPU with the number of threads."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    sets = torch.backends.cpu.get_cpu_capability() + (" with AMX" if torch.cpu._is_amx_tile_supported() else "")
    return f"cpu: {name}, {torch.get_num_threads()} threads, {sets}"


def append(found: Iterable[dict[str, Any]], path: Path) -> None:
    """Append records to a file: all of them or, if anything fails, none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [path.read_text()] if path.exists() else []
    lines += [json.dumps(record, allow_nan=False) + "\n" for record in found]
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text("".join(lines))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read records from files and from the *.jsonl of folders, oldest first.

    Raises:
        ValueError: a line is no record, or there is none at all.
    """
    found = []
    for path in paths:
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            for number, line in enumerate(file.read_text().splitlines(), start=1):
                try:
                    found.append(blank() | json.loads(line))
                except (json.JSONDecodeError, TypeError) as error:
                    raise ValueError(f"{file}:{number} must hold a JSON object, got {error}") from error
    if not found:
        raise ValueError(f"records must hold at least one record, got none in {', '.join(map(str, paths))}")
    return sorted(found, key=lambda record: record["date"])


def _git_state() -> tuple[str | None, bool | None]:
    """Return the commit and whether files differ from it; None, None outside a checkout of this repository."""
    state = _git("rev-parse", "--show-toplevel", "HEAD")
    if state is None or Path(state[0]).resolve() != ROOT:
        return None, None
    # Results are what runs write: they make no code dirty.
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return state[1], None if changes is None else bool(changes)


def _git(*arguments: str) -> list[str] | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None


def _module() -> list[str]:
    """Return how this process was started: -m benchmarks, -m benchmarks.gpu or a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [sys.argv[0]] if spec is None else ["-m", spec.name.removesuffix(".__main__")]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
