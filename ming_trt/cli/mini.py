"""`ming-trt mini`: a small checkpoint in the official layout."""

from __future__ import annotations

import json as json_module
from pathlib import Path

import typer

EXAMPLES = "Examples:  ming-trt mini /tmp/mini   |   ming-trt mini /tmp/mini7 --seed 7"


def command(
    directory: Path = typer.Argument(help="Folder to make; must not exist, be empty, or hold this very checkpoint."),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the random weights."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Write a small checkpoint with random weights in the official layout, for trying everything without the download.

    Equal seeds give equal bytes. Its answers are words without sense.
    """
    from ming_trt.mini import write_mini

    written = write_mini(directory, seed)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if json:
        typer.echo(json_module.dumps({"directory": str(directory), "seed": seed, "written": written, "bytes": size}))
    elif written:
        typer.echo(f"wrote {directory} ({size / 1e6:.1f} MB, seed {seed})")
    else:
        typer.echo(f"{directory} is already this checkpoint ({size / 1e6:.1f} MB, seed {seed})")
