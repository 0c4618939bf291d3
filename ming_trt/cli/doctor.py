"""`ming-trt doctor`: what is installed, what can be built and served here, and what is missing."""

from __future__ import annotations

import json as json_module
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ming_trt.doctor import Report

EXAMPLES = "Examples:  ming-trt doctor   |   ming-trt doctor --target onnxruntime   |   ming-trt doctor --json"


def command(
    target: str = typer.Option(None, "--target", help="Exit code 0 only if this target can be built and served here."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Say what is installed, which targets can be built and served here, and what to install.

    Exit code 0 if at least one target (or the one given) can be both built and served here, else 1. The last table
    says how well each engine is known to work: read < typed < compiled < ran < matches < measured.
    """
    from ming_trt.doctor import examine

    report = examine()
    chosen = report.target(target) if target else None
    if json:
        typer.echo(json_module.dumps(report.as_dict()))
    else:
        _show(report)
    ok = chosen.build and chosen.serve if chosen else report.ok
    raise typer.Exit(0 if ok else 1)


def _show(report: Report) -> None:
    from rich.table import Table

    from ming_trt import evidence
    from ming_trt.cli.output import console

    out = console()
    out.print(f"machine: {report.machine}")
    table = Table("", "what", "version", "remedy", box=None)
    for check in report.checks:
        table.add_row("ok" if check.ok else "--", check.name, check.version, check.remedy)
    out.print(table)
    targets = Table("target", "build", "serve", "why not", box=None)
    for target in report.targets:
        targets.add_row(target.name, "yes" if target.build else "no", "yes" if target.serve else "no", target.reason)
    out.print(targets)
    head, *rows = evidence.table()
    known = Table(*head, box=None)
    for row in rows:
        known.add_row(*row)
    out.print(known)
    for target in report.targets:
        out.print(f"{target.name}: {target.by}")
