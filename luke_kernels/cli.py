"""The command line: each command parses its arguments and calls one function."""

import sys
from typing import Annotated

import typer
from rich.console import Console

from luke_kernels.version import __version__

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
def demo() -> None:
    """Run the op on sentences that come with the package: each backend, its error and its time."""
    from luke_kernels.demo import run

    run(Console())


def main() -> None:
    """Run the command line; errors go to stderr as one line, with exit code 2."""
    try:
        app()
    except (ValueError, TypeError, NotImplementedError, RuntimeError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
