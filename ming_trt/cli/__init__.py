"""The `ming-trt` command.

One module per command; each module is light at import (heavy packages are imported inside the function), so that
`ming-trt --help` stays fast. Expected failures (`ming_trt.errors.MingError`) become one sentence on stderr and a
non-zero exit code; `--debug` (or `MING_TRT_DEBUG=1`) shows the traceback instead.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

import typer

from ming_trt import __version__
from ming_trt.errors import MingError

# The order of `--help`: the order in which a user meets the commands.
COMMANDS = ("mini", "plan", "build", "inspect", "verify", "golden", "repo", "serve", "ask", "bench", "doctor")

_INTERRUPTED = 130

app = typer.Typer(
    name="ming-trt",
    help="Build engines from the Ming-lite-omni v1.5 checkpoint and serve them with Triton.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ming-trt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an expected failure."),
) -> None:
    if debug:
        os.environ["MING_TRT_DEBUG"] = "1"


def _register() -> None:
    for name in COMMANDS:
        module = import_module(f"ming_trt.cli.{name}")
        app.command(name, epilog=getattr(module, "EXAMPLES", None))(module.command)


def main() -> None:
    """Entry point of the console script."""
    try:
        _register()
        app()
    except MingError as error:
        if os.environ.get("MING_TRT_DEBUG"):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if os.environ.get("MING_TRT_DEBUG") or error.filename is None:
            raise
        typer.echo(
            f"error: '{error.filename}' cannot be used ({error.strerror}): check the path, its permissions, and the "
            "room on its disk",
            err=True,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(_INTERRUPTED)
    except SystemExit as done:
        # once a command runs typer makes this of Ctrl-C, without a word
        if done.code == _INTERRUPTED:
            typer.echo("interrupted", err=True)
        raise
