"""`python -m benchmarks`: measure, and report what was measured."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import attention as attention_benchmark
from benchmarks import base as base_revision
from benchmarks import cases, console, measure, records, timing
from benchmarks import report as report_pages
from benchmarks.measure import Record
from luke_kernels import LukeConfig, explain_backends

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Benchmarks of luke_kernels.")
MAIN_DTYPES = ("float32", "bfloat16")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
# Times on a CPU spread more, but its large cases take seconds each.
REPEATS = {"cpu": 10, "cuda": 50}
# Of four contenders, each comes first, second, third and last equally often.
MODEL_REPEATS = {"cpu": 8, "cuda": 40}
TRAIN_REPEATS = 6

Device = Annotated[str, typer.Option(help="cpu or cuda")]
Dtype = Annotated[list[str] | None, typer.Option(help=f"{', '.join(DTYPES)}; repeatable")]
Size = Annotated[str, typer.Option(help="tiny, base or large")]
Direction = Annotated[list[str] | None, typer.Option(help="forward, or both with the backward; repeatable")]
Repeats = Annotated[
    int | None, typer.Option(min=1, help="timed calls of each contender; fewer, 3 at least, where they take long")
]
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
        list[str] | None,
        typer.Option(
            help="BxWxE, BxWxE-ragged, or N texts: conll-N, conll-spans-N, wikipedia-N, questions-N; repeatable"
        ),
    ] = None,
    direction: Direction = None,
    contender: Annotated[
        list[str] | None, typer.Option(help="who competes with transformers, all unless given; repeatable")
    ] = None,
    repeats: Repeats = None,
    out: Out = None,
) -> None:
    """Time LUKE against transformers', eager, compiled and exported, correctness first.

    Real texts need LUKE_KERNELS_DATA; without it those that were not asked for are skipped. So are peers whose packages
    are not installed, and exports and compilers on a GPU. conll-spans-32, wikipedia-32 and questions-32 each take far
    longer on a CPU than all that is measured unless asked.
    """
    from benchmarks import encoders, peers

    everyone = peers.contenders if device == "cpu" else encoders.contenders
    for name in peers.PACKAGES if device == "cpu" else ():
        if packages := peers.missing(name):
            if name in (contender or ()):
                raise console.CommandError(f"{name} must have its packages, {', '.join(packages)} are not installed")
            print(f"{name}: left out, {', '.join(packages)} not installed")

    def choose(*arguments: Any) -> list[Any]:
        first, *others = everyone(*arguments)
        _check("contender", contender or [], [each.name for each in (first, *others)])
        return [first, *(each for each in others if not contender or each.name in contender)]

    _run_batches("model", device, size, dtype, case, direction, repeats, out, choose)


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


@app.command()
def train(
    device: Device = "cpu",
    size: Size = "base",
    entities: Annotated[int, typer.Option(min=8, help="size of the entity vocabulary")] = 500_000,
    dtype: Dtype = None,
    case: Annotated[list[str] | None, typer.Option(help="as of the model; repeatable")] = None,
    repeats: Repeats = None,
    out: Out = None,
) -> None:
    """Time steps of pretraining against transformers', each in a process of its own, correctness first.

    Where eager has too little memory, both get fewer sequences.
    """
    _need_transformers()
    from benchmarks import encoders
    from benchmarks import train as train_benchmark

    _check("size", [size], encoders.SIZES)
    target = _check_options(device, dtype, None)
    config = encoders.config_of(size, entities)
    chosen = [batch.name for batch in _load(case, train_benchmark.DEVICE_BATCHES[device], config, target)]

    def run_case(name: str, dtype: torch.dtype, peak_tflops: float, run: Record) -> list[Record]:
        count = repeats or TRAIN_REPEATS
        return train_benchmark.run_case(name, size, entities, dtype, target, count, peak_tflops, run)

    _run(train_benchmark.OP, run_case, chosen, dtype or MAIN_DTYPES[:1], target, out)


@app.command()
def memory(
    device: Device = "cpu",
    size: Size = "base",
    dtype: Dtype = None,
    case: Annotated[list[str] | None, typer.Option(help="as of the model; repeatable")] = None,
    direction: Direction = None,
    out: Out = None,
) -> None:
    """Measure the memory of calls over the length of sequences, transformers' model and ours, correctness first."""
    _need_transformers()
    from benchmarks import encoders
    from benchmarks import memory as memory_benchmark

    _check("size", [size], encoders.SIZES)
    target = _check_options(device, dtype, direction)
    chosen = _load(case, memory_benchmark.DEVICE_BATCHES[device], encoders.config_of(size), target)

    def run_case(batch: Any, dtype: torch.dtype, peak_tflops: float, run: Record) -> list[Record]:
        return memory_benchmark.run_case(batch, size, dtype, direction or cases.DIRECTIONS, peak_tflops, run)

    _run(memory_benchmark.OP, run_case, chosen, dtype or MAIN_DTYPES[:1], target, out)


@app.command()
def tokenizer(
    case: Annotated[list[str] | None, typer.Option(help="N texts, as of the model; repeatable")] = None,
    repeats: Repeats = None,
    out: Out = None,
) -> None:
    """Time LukeTokenizer against transformers' on real texts and their spans, correctness first."""
    _need_transformers()
    from benchmarks import tokenizer as tokenizer_benchmark

    path = out or records.RESULTS / f"{tokenizer_benchmark.OP}-cpu.jsonl"
    run = records.describe_run(torch.device("cpu"))
    count = 0
    for name in case or tokenizer_benchmark.CASES:
        try:
            found = tokenizer_benchmark.run_case(name, repeats or REPEATS["cpu"], run)
        except FileNotFoundError as error:
            raise console.CommandError(f"case {name} must have its data, got an error: {error}") from None
        print(*map(measure.summary, found), sep="\n", flush=True)
        records.append(found, path)
        count += len(found)
    print(f"{count} records of run {run['run']} in {path}")


@app.command()
def encode(
    device: Device = "cpu",
    size: Size = "base",
    dtype: Dtype = None,
    case: Annotated[list[str] | None, typer.Option(help="N texts, as of the model; repeatable")] = None,
    repeats: Repeats = None,
    out: Out = None,
) -> None:
    """Time texts to vectors from end to end, transformers' tokenizer and model against `encode`, correctness first."""
    _need_transformers()
    from benchmarks import encode as encode_benchmark
    from benchmarks import encoders

    _check("size", [size], encoders.SIZES)
    target = _check_options(device, dtype, None)

    def run_case(name: str, dtype: torch.dtype, peak_tflops: float, run: Record) -> list[Record]:
        try:
            return encode_benchmark.run_case(name, size, dtype, target, repeats or REPEATS[device], run)
        except FileNotFoundError as error:
            raise console.CommandError(f"case {name} must have its data, got an error: {error}") from None

    dtypes = dtype or _usual_dtypes(target)
    _run(encode_benchmark.OP, run_case, case or encode_benchmark.CASES, dtypes, target, out)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def base(
    context: typer.Context,
    revision: Annotated[str, typer.Argument(help="of git")],
    suite: Annotated[str, typer.Argument(help="any of these commands that measures; its options may follow")],
) -> None:
    """Compare a suite with a revision of git, built in a folder of its own. Records are not kept."""
    _check("suite", [suite], base_revision.SUITES)
    print(base_revision.compare(revision, suite, context.args))


def _need_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise console.CommandError("transformers must be installed")


def _load(names: list[str] | None, usual: Sequence[str], config: LukeConfig, device: torch.device) -> list[Any]:
    """Load batches, leaving out those that nobody asked for and whose data is not here."""
    from benchmarks import batches

    chosen = []
    for name in names or usual:
        try:
            chosen.append(batches.load(name, config, device))
        except FileNotFoundError as error:
            if names:
                raise console.CommandError(f"case {name} must have its data, got an error: {error}") from None
            print(f"{name}: skipped, {error}")
    return chosen


def _run_batches(
    suite: str,
    device: str,
    size: str,
    dtypes: list[str] | None,
    names: list[str] | None,
    directions: list[str] | None,
    repeats: int | None,
    out: Path | None,
    choose: Callable[..., Any] | None = None,
) -> None:
    _need_transformers()
    from benchmarks import batches, encoders

    module = importlib.import_module(f"benchmarks.{suite}")
    _check("size", [size], encoders.SIZES)
    target = _check_options(device, dtypes, directions)
    chosen = _load(names, module.DEVICE_BATCHES[device], encoders.config_of(size), target)

    def run_case(batch: batches.Batch, dtype: torch.dtype, peak_tflops: float, run: Record) -> list[Record]:
        usual = ("forward",) if batch.name in getattr(module, "FORWARD_ONLY", ()) else cases.DIRECTIONS
        options = {} if choose is None else {"choose": choose}
        return module.run_case(
            batch, size, dtype, directions or usual, repeats or MODEL_REPEATS[device], peak_tflops, run, **options
        )

    _run(suite, run_case, chosen, dtypes or _usual_dtypes(target), target, out)


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


def _usual_dtypes(device: torch.device) -> Sequence[str]:
    """Return MAIN_DTYPES, on a CPU only those it has units for: without, bfloat16 takes some 20 times as long."""
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return [name for name in MAIN_DTYPES if name != "bfloat16"]
    return MAIN_DTYPES


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
