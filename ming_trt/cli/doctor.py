"""`ming-trt doctor`: what is installed, what can be built and served here, and what is missing."""

from __future__ import annotations

import json as json_module

import typer

EXAMPLES = "Examples:  ming-trt doctor   |   ming-trt doctor --json"


def command(json: bool = typer.Option(False, "--json", help="Print one JSON object.")) -> None:
    """Say what is installed, which targets can be built and served here, and what to install.

    Exit code 0 if at least one target can be both built and served.
    """
    from ming_trt.doctor import examine

    report = examine()
    if json:
        typer.echo(json_module.dumps(report.as_dict()))
    else:
        from rich.console import Console
        from rich.table import Table

        console = Console(markup=False)
        console.print(f"machine: {report.machine}")
        table = Table("", "what", "version", "remedy", box=None)
        for check in report.checks:
            table.add_row("ok" if check.ok else "--", check.name, check.version, check.remedy)
        console.print(table)
        targets = Table("target", "build", "serve", "why not", box=None)
        for target in report.targets:
            targets.add_row(
                target.name, "yes" if target.build else "no", "yes" if target.serve else "no", target.reason
            )
        console.print(targets)
    raise typer.Exit(0 if report.ok else 1)
