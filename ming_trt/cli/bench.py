"""`ming-trt bench`: latency benchmark of a running server."""

from __future__ import annotations

from pathlib import Path

import typer

from ming_trt.errors import UnavailableError

EXAMPLES = "Examples:  ming-trt bench --url localhost:8001 -o report/   |   ming-trt bench --compare A B"


def command(
    url: str = typer.Option("localhost:8001", "--url", help="gRPC address of the server."),
    output: Path = typer.Option(None, "-o", "--output", help="Folder for report.html and report.json."),
    compare: tuple[Path, Path] = typer.Option(None, "--compare", help="Two reports to compare."),
) -> None:
    """Measure the latency of a running server (not there yet)."""
    raise UnavailableError(
        "`ming-trt bench` is not written yet: `ming-trt ask --json` prints the timings of one request"
    )
