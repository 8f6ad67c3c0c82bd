"""The command line: each command parses its arguments and calls one function."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from luke_kernels.version import __version__

DTYPES = ("float16", "bfloat16", "float32")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """LUKE on fused entity-aware attention."""


@app.command()
def doctor() -> None:
    """Show versions and hardware, which backends run here and why others do not, and check those that do."""
    from luke_kernels.doctor import examine

    if not examine(Console()):
        raise typer.Exit(1)


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="A checkpoint of LUKE, on disk or on the hub.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Run LUKE on sentences that come with the package: transformers' and ours, their time, their nearest entities."""
    from luke_kernels.demo import run

    if not run(Console(), model, device):
        raise typer.Exit(1)


@app.command()
def tune(
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 64,
    num_heads: Annotated[int, typer.Option(help="Heads of the batches that are timed.")] = 16,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "bfloat16",
    dropout: Annotated[bool, typer.Option("--dropout", help="Tune the kernels that draw a mask.")] = False,
    device: Annotated[str, typer.Option(help="A GPU: cuda, cuda:1, ...")] = "cuda",
) -> None:
    """Time the Triton kernels' tiles on this GPU, each checked first, and keep the fastest. Takes minutes."""
    from luke_kernels.tuning import show

    show(Console(), head_dim, num_heads, _dtype(dtype), dropout, device)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Directory, archive or hub id: LUKE of any origin, RoBERTa or BERT.")],
    output: Annotated[str, typer.Argument(help="Directory, new or empty; of an original also a .tar.gz.")],
    to: Annotated[str, typer.Option(help="luke (ours, transformers'), original, encoder (RoBERTa), or onnx.")] = "luke",
    entity_vocab: Annotated[str | None, typer.Option(help=".json, .jsonl or .tsv, for RoBERTa and BERT.")] = None,
    entity_emb_size: Annotated[
        int | None, typer.Option(help="Size of an entity's embedding, for RoBERTa and BERT; else 256.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Directory or hub id of its tokenizer, if it is elsewhere.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; else as stored.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
) -> None:
    """Convert a checkpoint, and its tokenizer, to LUKE, the original repository's LUKE, its word encoder, or ONNX."""
    from luke_kernels.convert import convert

    conversion = convert(
        source,
        output,
        to=to,
        entity_vocab=entity_vocab,
        entity_emb_size=entity_emb_size,
        tokenizer=tokenizer,
        dtype=_dtype(dtype),
        max_shard_size=max_shard_size,
        revision=revision,
    )
    Console().print(str(conversion), markup=False, highlight=False, soft_wrap=True)


@app.command()
def encode(
    texts: Annotated[
        str, typer.Argument(help='JSON lines {"text", "entity_spans", "entities", "id"}, all but text optional; or -.')
    ],
    output: Annotated[str, typer.Argument(help="A .jsonl file, or a directory of safetensors.")],
    model: Annotated[str, typer.Option(help="A checkpoint of LUKE, on disk or on the hub.")],
    tokenizer: Annotated[str | None, typer.Option(help="Its tokenizer, if it is elsewhere.")] = None,
    layer: Annotated[int, typer.Option(help="Which layer's output: 0 for the embeddings, -1 for the last.")] = -1,
    max_tokens: Annotated[int, typer.Option(help="Most words and entities of a batch.")] = 8192,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32; else as stored.")] = None,
    truncation: Annotated[bool, typer.Option("--truncation", help="Cut texts longer than the model takes.")] = False,
    shard_size: Annotated[int, typer.Option(help="Texts per block, and so per file of safetensors.")] = 1000,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an output that was interrupted.")] = False,
) -> None:
    """Encode texts: the vectors of their words and entities."""
    from luke_kernels.vector_files import encode_file

    try:
        counts = encode_file(
            texts,
            output,
            model,
            tokenizer,
            layer=layer,
            max_tokens=max_tokens,
            device=device,
            dtype=_dtype(dtype),
            truncation=truncation,
            shard_size=shard_size,
            resume=resume,
        )
    except KeyboardInterrupt:
        print("interrupted; run the same command with --resume to continue", file=sys.stderr)
        raise typer.Exit(130) from None
    print(counts, file=sys.stderr)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print a warning as one line, without the place in the source."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _dtype(name: str | None) -> Any:
    import torch

    if name not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return None if name is None else getattr(torch, name)


def main() -> None:
    """Run the command line; an error goes to stderr as `error: ...`, with exit code 2.

    With --debug, before or after the command, it is raised.
    """
    arguments = sys.argv[1:]
    try:
        with _plain_warnings():
            app([argument for argument in arguments if argument != "--debug"])
    except (ValueError, TypeError, NotImplementedError, RuntimeError, OSError) as error:
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # outside of a command, where typer sees to it
        sys.exit(130)


if __name__ == "__main__":
    main()
