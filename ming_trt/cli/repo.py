"""`ming-trt repo`: a Triton model repository from a bundle."""

from __future__ import annotations

import json as json_module
from pathlib import Path

import typer

EXAMPLES = "Examples:  ming-trt repo bundle -o repo   |   ming-trt repo bundle -o repo --allow-ungated"


def command(
    bundle: Path = typer.Argument(help="The bundle that `ming-trt build` made."),
    output: Path = typer.Option(..., "-o", "--output", help="Folder of the repository; one made before is replaced."),
    allow_ungated: bool = typer.Option(False, "--allow-ungated", help="Also if the numerics gate has not passed."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Assemble the Triton model repository of a bundle.

    The repository refers to the bundle by a relative path: move both together. Triton servers of other machines take it
    too, if ming-trt is installed in the Python of their stubs.
    """
    from dataclasses import asdict

    from ming_trt.bundle import Bundle
    from ming_trt.serving.assemble import assemble
    from ming_trt.serving.graph import left_out

    mark = assemble(bundle, output, allow_ungated)
    for sentence in left_out(Bundle.open(bundle).manifest.components):
        typer.echo(sentence, err=True)
    if json:
        typer.echo(json_module.dumps({"repository": str(output), **asdict(mark)}))
        return
    typer.echo(f"{output}: {', '.join(mark.models)} ({mark.target}, gate: {mark.gate})")
    if mark.ungated:
        typer.echo("the gate of this bundle has not passed; `ming-trt serve` asks for --allow-ungated too", err=True)
