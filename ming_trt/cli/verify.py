"""`ming-trt verify`: each engine of a bundle against its definition, on request per layer and for determinism."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from builders.audit import Audit

EXAMPLES = """Examples:

ming-trt verify bundle --checkpoint CHECKPOINT

ming-trt verify bundle --checkpoint CHECKPOINT --component llm --layers

ming-trt verify bundle --checkpoint CHECKPOINT --determinism -o report
"""


# Differences grow from layer to layer: the first ones tell most. The report has them all.
_SHOWN_LAYERS = 12


def command(
    bundle: Path = typer.Argument(..., help="Folder of a bundle."),
    checkpoint: Path = typer.Option(..., "--checkpoint", help="The checkpoint that it was built from."),
    component: list[str] = typer.Option(None, "--component", help="This engine only; may be repeated."),
    layers: bool = typer.Option(False, "--layers", help="Compare module by module; name the first divergence."),
    determinism: bool = typer.Option(False, "--determinism", help="Run again alone, restarted, with other threads."),
    max_host_memory: str = typer.Option(None, "--max-host-memory", help="Limit for the definition, e.g. 16GiB."),
    output: Path = typer.Option(None, "-o", "--output", help="Folder for report.json and report.html."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Compare every engine's outputs with its torch definition on the gate's inputs.

    A plan that cannot run here is compared by its graph in ONNX Runtime, layer by layer if it is in FP8. Exit code 1 if
    an output differs by more than the preset's thresholds, or if nothing was compared.
    """
    from builders.audit import audit, report_document
    from ming_trt import presets
    from ming_trt.bundle import NOT_RUN, PASSED, Bundle

    limit = presets.parse_size(max_host_memory, "--max-host-memory") if max_host_memory else 0
    audits = audit(
        Bundle.open(bundle),
        checkpoint,
        tuple(component or ()),
        layers=layers,
        determinism=determinism,
        memory_limit=limit,
    )
    document = report_document(audits)
    if output is not None:
        from builders.audit_html import write_report

        write_report(document, output)
    if json:
        typer.echo(json_module.dumps(document))
    else:
        from ming_trt.cli.output import console

        _show(console(), audits)
        if output is not None:
            typer.echo(f"report: {output / 'report.html'}")
    good = (PASSED, NOT_RUN)
    raise typer.Exit(0 if all(found.gate.outputs and found.gate.verdict in good for found in audits) else 1)


def _show(console: Console, audits: list[Audit]) -> None:
    from rich.table import Table

    table = Table("engine", "output", "compared", "max abs", "relative", "cosine", "SQNR dB", "verdict", box=None)
    for found in audits:
        for output in found.gate.outputs:
            table.add_row(
                found.name,
                output.name,
                str(output.compared),
                f"{output.max_abs:.2g}",
                f"{output.relative:.2g}",
                f"{output.cosine:.7f}",
                f"{output.sqnr_db:.0f}",
                output.note or output.verdict,
            )
        if not found.gate.outputs:
            table.add_row(found.name, "", "0", "", "", "", "", found.gate.reason)
    console.print(table)
    for found in audits:
        if found.note:
            console.print(f"{found.name}: {found.note}")
        if found.layers:
            worst = found.first_divergence
            console.print(
                f"{found.name}: first divergence at {worst}"
                if worst
                else f"{found.name}: all {len(found.layers)} modules match"
            )
    if any(found.first_divergence for found in audits):
        _show_layers(console, audits)
    if any(found.repetitions for found in audits):
        repeats = Table("engine", "run again", "outputs", box=None)
        for found in audits:
            for again in found.repetitions:
                repeats.add_row(
                    found.name, again.condition, "bit-equal" if again.equal else f"differ by {again.max_abs:.2g}"
                )
        console.print(repeats)


def _show_layers(console: Console, audits: list[Audit]) -> None:
    from rich.table import Table

    from ming_trt.bundle import PASSED

    table = Table("engine", "module", "max abs", "relative", "SQNR dB", "verdict", box=None)
    for found in audits:
        different = [layer for layer in found.layers if layer.verdict != PASSED]
        for layer in different[:_SHOWN_LAYERS]:
            row = (f"{layer.max_abs:.2g}", f"{layer.relative:.2g}", f"{layer.sqnr_db:.0f}")
            table.add_row(found.name, layer.name, *row, layer.note or layer.verdict)
    console.print(table)
