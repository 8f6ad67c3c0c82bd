"""`python -m benchmarks`: measure, and report what was measured."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import attention as attention_benchmark
from benchmarks import cases, console, measure, records, timing
from benchmarks import report as report_pages
from benchmarks.measure import Record
from luke_kernels import explain_backends

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Benchmarks of luke_kernels.")
MAIN_DTYPES = ("float32", "bfloat16")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
# Times on a CPU spread more, but its large cases take seconds each.
REPEATS = {"cpu": 10, "cuda": 50}
# Of four contenders, each comes first, second, third and last equally often.
MODEL_REPEATS = {"cpu": 8, "cuda": 40}

Device = Annotated[str, typer.Option(help="cpu or cuda")]
Dtype = Annotated[list[str] | None, typer.Option(help=f"{', '.join(DTYPES)}; repeatable")]
Size = Annotated[str, typer.Option(help="tiny, base or large")]
Direction = Annotated[list[str] | None, typer.Option(help="forward, or both with the backward; repeatable")]
Repeats = Annotated[int | None, typer.Option(min=1, help="timed calls of each contender")]
Out = Annotated[Path | None, typer.Option(help="file of records to append to")]


@app.command()
def attention(
    device: Device = "cpu",
    dtype: Dtype = None,
    case: Annotated[list[str] | None, typer.Option(help="BxWxE[-dD][-ragged]; repeatable")] = None,
    direction: Direction = None,
    repeats: Repeats = None,
    out: Out = None,
) -> None:
    """Time entity-aware attention against its peers, correctness first."""
    target = _check_options(device, dtype, direction)
    chosen = [cases.parse(name, cases.DEVICE_HEADS[device]) for name in case or cases.DEVICE_CASES[device]]
    for dtype_name in dtype or MAIN_DTYPES:
        for name, reason in explain_backends(
            torch.zeros(1, 1, 4, 1, 64, dtype=DTYPES[dtype_name], device=target)
        ).items():
            if reason is not None:
                print(f"luke_kernels:{name}: off in {dtype_name}, {reason}")

    def run_case(each: cases.Case, dtype: torch.dtype, peak_tflops: float, run: Record) -> list[Record]:
        directions = direction or cases.DIRECTIONS
        return attention_benchmark.run_case(
            each, dtype, target, directions, repeats or REPEATS[device], peak_tflops, run
        )

    _run("attention", run_case, chosen, dtype or MAIN_DTYPES, target, out)


@app.command()
def model(
    device: Device = "cpu",
    size: Size = "base",
    dtype: Dtype = None,
    case: Annotated[
        list[str] | None, typer.Option(help="BxWxE, BxWxE-ragged, conll-N or wikipedia-N texts; repeatable")
    ] = None,
    direction: Direction = None,
    repeats: Repeats = None,
    out: Out = None,
) -> None:
    """Time LUKE against transformers', padded, accelerated and packed, correctness first.

    Real texts need LUKE_KERNELS_DATA; without it those that were not asked for are skipped.
    """
    _run_batches("model", device, size, dtype, case, direction, repeats, out)


@app.command()
def layer(
    device: Device = "cpu",
    size: Size = "large",
    dtype: Dtype = None,
    case: Annotated[list[str] | None, typer.Option(help="as of the model; repeatable")] = None,
    direction: Direction = None,
    repeats: Repeats = None,
    out: Out = None,
) -> None:
    """Time attention with its projections against transformers', padded and packed, correctness first."""
    _run_batches("layer", device, size, dtype, case, direction, repeats, out)


def _run_batches(
    suite: str,
    device: str,
    size: str,
    dtypes: list[str] | None,
    names: list[str] | None,
    directions: list[str] | None,
    repeats: int | None,
    out: Path | None,
) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise console.CommandError("transformers must be installed")
    from benchmarks import batches, encoders

    module = importlib.import_module(f"benchmarks.{suite}")
    _check("size", [size], encoders.SIZES)
    target = _check_options(device, dtypes, directions)
    chosen = []
    for name in names or module.DEVICE_BATCHES[device]:
        try:
            chosen.append(batches.load(name, encoders.config_of(size), target))
        except FileNotFoundError as error:
            if names:
                raise console.CommandError(f"case {name} must have its data, got an error: {error}") from None
            print(f"{name}: skipped, {error}")

    def run_case(batch: batches.Batch, dtype: torch.dtype, peak_tflops: float, run: Record) -> list[Record]:
        return module.run_case(
            batch, size, dtype, directions or cases.DIRECTIONS, repeats or MODEL_REPEATS[device], peak_tflops, run
        )

    _run(suite, run_case, chosen, dtypes or MAIN_DTYPES, target, out)


@app.command()
def report(
    records_in: Annotated[list[Path] | None, typer.Option("--records", help="files or folders; repeatable")] = None,
    out: Annotated[Path, typer.Option(help="folder of the tables and plots")] = records.RESULTS,
    baseline: Annotated[str | None, typer.Option(help="contender that ratios are taken of")] = None,
) -> None:
    """Render records as Markdown pages and plots; those of this repository, also as the table of its README."""
    found = records.load(records_in or [records.RESULTS])
    for path in report_pages.render(found, out, baseline):
        print(path)
    if records_in is None and out == records.RESULTS:
        report_pages.render_readme(found)
        print(report_pages.README)


def _run(
    suite: str,
    run_case: Callable[[Any, torch.dtype, float, Record], list[Record]],
    chosen: Sequence[Any],
    dtypes: Sequence[str],
    device: torch.device,
    out: Path | None,
) -> None:
    """Measure all cases in all dtypes; what a case gave is kept though a later one is interrupted."""
    path = out or records.RESULTS / f"{suite}-{device.type}.jsonl"
    run = records.describe_run(device)
    count = 0
    for dtype in dtypes:
        peak_tflops = timing.measure_peak(DTYPES[dtype], device)
        print(f"{run['device']}: torch matmul in {dtype} {peak_tflops:.3f} TFLOP/s")
        for each in chosen:
            found = run_case(each, DTYPES[dtype], peak_tflops, run)
            print(*map(measure.summary, found), sep="\n", flush=True)
            records.append(found, path)
            count += len(found)
    print(f"{count} records of run {run['run']} in {path}")


def _check_options(device: str, dtypes: list[str] | None, directions: list[str] | None) -> torch.device:
    _check("device", [device], REPEATS)
    _check("dtype", dtypes or [], DTYPES)
    _check("direction", directions or [], cases.DIRECTIONS)
    if device == "cuda" and not torch.cuda.is_available():
        raise console.CommandError("no GPU that torch can see")
    return torch.device(device)


def _check(name: str, values, allowed) -> None:
    for value in values:
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(allowed)}, got {value!r}")


if __name__ == "__main__":
    console.run(app)
