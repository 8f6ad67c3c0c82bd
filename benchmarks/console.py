"""How the commands of this package end: status 0, or `error: ...` on stderr and status 2."""

import sys

import typer

# typer carries its own copy of click in some versions and imports click in others.
UsageError = typer.BadParameter.__bases__[0]


class CommandError(Exception):
    """A command cannot run here; the message says why."""


def run(app: typer.Typer) -> None:
    """Run a command line and exit. A traceback only with --debug."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        sys.exit(app(args=arguments, standalone_mode=False))
    except (UsageError, CommandError, ValueError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        message = error.format_message() if isinstance(error, UsageError) else error
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
