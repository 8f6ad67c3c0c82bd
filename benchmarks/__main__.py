"""`python -m benchmarks`: measure, and report what was measured."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import attention as attention_benchmark
from benchmarks import cases, console, records, timing
from benchmarks import report as report_pages
from luke_kernels import explain_backends

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Benchmarks of luke_kernels.")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
# Times on a CPU spread more, but its large cases take seconds each.
REPEATS = {"cpu": 10, "cuda": 50}


@app.command()
def attention(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16, float64; repeatable")] = None,
    case: Annotated[list[str] | None, typer.Option(help="BxWxE or BxWxE-ragged; repeatable")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="forward, or both with the backward; repeatable")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="timed calls of each contender")] = None,
    out: Annotated[Path | None, typer.Option(help="file of records to append to")] = None,
) -> None:
    """Time entity-aware attention against its peers, correctness first."""
    _check("device", [device], REPEATS)
    _check("dtype", dtype or [], DTYPES)
    _check("direction", direction or [], cases.DIRECTIONS)
    chosen = [cases.parse(name, cases.DEVICE_HEADS[device]) for name in case or cases.DEVICE_CASES[device]]
    target = torch.device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise console.CommandError("no GPU that torch can see")
    run = records.describe_run(target)
    found = []
    for dtype_name in dtype or ["float32", "bfloat16"]:
        peak_tflops = timing.measure_peak(DTYPES[dtype_name], target)
        for name, reason in explain_backends(
            torch.zeros(1, 1, 4, 1, 64, dtype=DTYPES[dtype_name], device=target)
        ).items():
            if reason is not None:
                print(f"luke_kernels:{name}: off, {reason}")
        print(f"{run['device']}: torch matmul in {dtype_name} {peak_tflops:.3f} TFLOP/s")
        for each in chosen:
            new = attention_benchmark.run_case(
                each,
                DTYPES[dtype_name],
                target,
                direction or cases.DIRECTIONS,
                repeats or REPEATS[device],
                peak_tflops,
                run,
            )
            print(*map(attention_benchmark.summary, new), sep="\n", flush=True)
            found += new
    path = out or records.RESULTS / f"attention-{device}.jsonl"
    records.append(found, path)
    print(f"{len(found)} records of run {run['run']} in {path}")


@app.command()
def report(
    records_in: Annotated[list[Path] | None, typer.Option("--records", help="files or folders; repeatable")] = None,
    out: Annotated[Path, typer.Option(help="folder of the tables and plots")] = records.RESULTS,
    baseline: Annotated[str, typer.Option(help="contender that ratios are taken of")] = "eager",
) -> None:
    """Render records as a Markdown page and plots."""
    for path in report_pages.render(records.load(records_in or [records.RESULTS]), out, baseline):
        print(path)


def _check(name: str, values, allowed) -> None:
    for value in values:
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(allowed)}, got {value!r}")


if __name__ == "__main__":
    console.run(app)
