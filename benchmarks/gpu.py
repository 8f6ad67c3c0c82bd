"""`python -m benchmarks.gpu --out DIR`: all that waits for a GPU, in one bounded run.

Builds the extension, runs the GPU tests, looks for memory errors and races with compute-sanitizer, measures the model,
the attention layer and attention itself, writes records, logs and summary.json into DIR; `python -m benchmarks report`
makes tables of the records.
"""

import faulthandler
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import attention, batches, cases, console, encoders, layer, measure, model, records, timing
from benchmarks.contenders import OURS

app = typer.Typer(add_completion=False)
DTYPES = (torch.bfloat16, torch.float16)
SIZE, LAYER_SIZE = "base", "large"
REPEATS = 32  # of four contenders, each comes first equally often
# Kept for the report; and how long a kernel that hangs may overrun before the process ends itself.
RESERVE_S = 20
# What the sanitizer makes take longest is to compile kernels, which it does not look at.
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_S = 60
SANITIZED = """
from luke_kernels.selfcheck import check_backend
from luke_kernels.ops.backends import TABLE
for backend in ("triton", "cuda"):
    if TABLE[backend].missing(None) is None:
        for dropout_p in (0.0, 0.25):
            for head_dim in (20, 32, 64, 128):
                checks = check_backend(backend, "cuda", head_dim=head_dim, dropout_p=dropout_p)
                assert checks and all(check.passed for check in checks), checks
"""


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="folder for at most 6 files")],
    minutes: Annotated[float, typer.Option(min=1, help="bound of the whole run")] = 8,
) -> None:
    """Build, test and measure on a GPU. Ends with 0 where tests ran, all passed, and no gate of ours failed."""
    if not torch.cuda.is_available():
        raise console.CommandError("no GPU that torch can see")
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    deadline = begin + 60 * minutes - RESERVE_S
    faulthandler.dump_traceback_later(60 * minutes + RESERVE_S, exit=True)
    device = torch.device("cuda")
    summary: dict[str, Any] = {"complete": False} | records.describe_run(device)

    def note(**entries: Any) -> None:
        """Add to summary.json at once: a run that is cut short leaves what it knows."""
        summary.update(entries, seconds=round(time.monotonic() - begin, 1))
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    note()
    # For this GPU alone: the build must leave time.
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    os.environ.setdefault("LUKE_KERNELS_CUDA_ARCHS", "90a" if capability == "90" else capability)
    note(build=_run([sys.executable, "setup.py", "build_ext", "--inplace"], out / "build.log", deadline))
    # Half of what is left: the benchmark needs its share.
    half = (time.monotonic() + deadline) / 2
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", *_parallel(), "tests"]
    note(tests=_tests_status(_run(tests, out / "pytest.log", half), out))
    for tool in SANITIZERS:
        note(**{tool: _sanitize(tool, out / f"{tool}.log", deadline)})
    found = _measure(device, out, deadline, summary)
    ours = (OURS, encoders.ACCELERATED)
    bad = [r for r in found if r["gate"] == "wrong" or (r["gate"] == "failed" and r["contender"].startswith(ours))]
    note(
        gates={gate: sum(r["gate"] == gate for r in found) for gate in ("pass", "none", "wrong", "failed")},
        bad=[measure.summary(r) for r in bad],
        peers_failed=sorted({f"{r['contender']}: {r['message']}" for r in found if r["gate"] == "failed"}),
        complete=True,
    )
    print(json.dumps(summary, indent=2))
    clean = {summary[step] for step in ("build", *SANITIZERS)} == {"rc 0"} and summary["tests"] == "passed"
    if not (clean and found and not bad and not summary["errors"]):
        raise typer.Exit(1)


def _run(command: list[str], log: Path, deadline: float) -> str:
    """Run a command in the root of the repository; return "rc N" or "timed out"."""
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command,
                cwd=records.ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=max(deadline - time.monotonic(), 1),
            )
        except subprocess.TimeoutExpired:
            return "timed out"
    return f"rc {done.returncode}"


def _sanitize(tool: str, log: Path, deadline: float) -> str:
    """Run each Triton kernel on a small batch under a tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        return "no compute-sanitizer"
    options = ["--tool", tool, "--target-processes", "application-only", "--error-exitcode", "9"]
    return _run(
        [program, *options, sys.executable, "-c", SANITIZED], log, min(deadline, time.monotonic() + SANITIZER_S)
    )


def _parallel() -> list[str]:
    """Spread the tests over processes where pytest-xdist can: most of their time goes into compiling kernels."""
    if importlib.util.find_spec("xdist") is None:
        return []
    # Where pytest-benchmark is installed, it warns of xdist, and warnings are errors.
    return ["-n", str(min(12, os.cpu_count() or 1)), "-p", "no:benchmark"]


def _tests_status(ended: str, out: Path) -> str:
    """Return "passed" only where at least one test ran: pytest ends with 0 also where all were skipped."""
    ran = re.search(r"\b[1-9]\d* passed", (out / "pytest.log").read_text())
    if ended == "rc 5" or (ended == "rc 0" and not ran):
        return "no tests ran"
    return "passed" if ended == "rc 0" else f"failed ({ended})"


def _measure(device: torch.device, out: Path, deadline: float, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Run what fits before the deadline; note in the summary what was skipped and what broke a whole case."""
    run = {name: summary[name] for name in records.FIELDS if name in summary}
    found, longest_s = [], 0.0
    skipped = summary["skipped"] = []
    errors = summary["errors"] = []

    def run_model(name: str, dtype: torch.dtype, peak_tflops: float) -> list[dict[str, Any]]:
        batch = batches.load(name, encoders.config_of(SIZE), device)
        return model.run_case(batch, SIZE, dtype, cases.DIRECTIONS, REPEATS, peak_tflops, run)

    def run_layer(name: str, dtype: torch.dtype, peak_tflops: float) -> list[dict[str, Any]]:
        batch = batches.load(name, encoders.config_of(LAYER_SIZE), device)
        return layer.run_case(batch, LAYER_SIZE, dtype, cases.DIRECTIONS, REPEATS, peak_tflops, run)

    def run_attention(name: str, dtype: torch.dtype, peak_tflops: float) -> list[dict[str, Any]]:
        case = cases.parse(name, cases.DEVICE_HEADS["cuda"])
        return attention.run_case(case, dtype, device, cases.DIRECTIONS, REPEATS, peak_tflops, run)

    # The most telling first: a run cut short has them.
    jobs = [("model", run_model, name, DTYPES[0]) for name in model.GPU_BATCHES]
    jobs += [("layer", run_layer, name, DTYPES[0]) for name in layer.GPU_BATCHES]
    jobs += [("attention", run_attention, name, dtype) for dtype in DTYPES for name in cases.GPU_CASES]
    for suite, run_case, name, dtype in jobs:
        label, begin = f"{suite} {name} {dtype}", time.monotonic()
        if begin + longest_s > deadline:
            skipped.append(label)
            continue
        try:
            new = run_case(name, dtype, timing.measure_peak(dtype, device))
        except timing.failures() as error:
            errors.append(f"{label}: {timing.described(error)}")
            continue
        records.append(new, out / "gpu.jsonl")
        print(*map(measure.summary, new), sep="\n", flush=True)
        found += new
        torch.cuda.empty_cache()
        longest_s = max(longest_s, time.monotonic() - begin)
    return found


if __name__ == "__main__":
    console.run(app)
