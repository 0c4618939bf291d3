"""`ming-trt golden`: replays reference cases through built engines."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ming_trt.golden.replay import Outcome

EXAMPLES = """Examples:

ming-trt golden --checkpoint tests/data/golden/understanding/checkpoint --cases tests/data/golden/understanding --strict

ming-trt golden --checkpoint A --checkpoint B --cases DIR --only image      (B's files win over A's)
"""


def command(
    checkpoint: list[Path] = typer.Option(
        ..., "--checkpoint", help="Checkpoint folder; several are overlaid, the later wins."
    ),
    cases: Path = typer.Option(..., "--cases", help="Folder with cases.json and cases.npz."),
    preset: str = typer.Option(None, "--preset", help="Build preset; the default is the embedded one, fp32."),
    only: str = typer.Option(None, "--only", help="understanding, image or speech."),
    strict: bool = typer.Option(
        False, "--strict", help="Also fail if a case kind is not supported or an output was not compared."
    ),
    work: Path = typer.Option(None, "--work", help="Keep the built engines here instead of in a temporary folder."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Build the engines that reference cases need, replay the cases, and compare every output.

    Prints a table of the largest absolute and relative error, the tolerance and the verdict. Exit code 1 if any
    comparison fails or nothing was compared.
    """
    import tempfile

    from ming_trt.golden.replay import replay

    with tempfile.TemporaryDirectory(prefix="ming-trt-golden-") as temporary:
        folder = Path(temporary) if work is None else work
        outcome = replay(checkpoint, cases, folder, preset=preset, only=only)
    reasons = outcome.failures(strict)
    if json:
        typer.echo(json_module.dumps(_as_dict(outcome, reasons)))
    else:
        _print(outcome)
        verdict = f"FAILED: {'; '.join(reasons)}" if reasons else f"passed: {len(outcome.rows)} comparisons"
        typer.echo(verdict)
    raise typer.Exit(1 if reasons else 0)


def _as_dict(outcome: Outcome, reasons: list[str]) -> dict[str, object]:
    def number(value: float) -> float | str:
        return value if value < float("inf") else "inf"

    rows = [
        {
            "case": row.case,
            "array": row.result.name,
            "via": row.route,
            "compared": row.result.compared,
            "max_abs": number(row.result.max_abs),
            "max_rel": number(row.result.max_rel),
            "tolerance": row.result.tolerance,
            "passed": row.result.passed,
            "note": row.result.note,
        }
        for row in outcome.rows
    ]
    not_run = [{"case": case.case, "reason": case.reason} for case in outcome.not_run]
    return {
        "passed": not reasons,
        "reasons": reasons,
        "rows": rows,
        "not_run": not_run,
        "uncompared": outcome.uncompared,
    }


def _print(outcome: Outcome) -> None:
    from rich.console import Console
    from rich.table import Table

    # Array names are long; a narrow terminal wraps the lines rather than cutting the names.
    console = Console(markup=False, soft_wrap=True, width=160)
    table = Table("array", "via", "elements", "max abs", "max rel", "tolerance", "verdict", box=None)
    for row in outcome.rows:
        result = row.result
        limit = "exact" if result.tolerance == 0 else f"{result.tolerance:.0e}"
        verdict = "ok" if result.passed else f"FAIL {result.note}"
        table.add_row(
            result.name,
            row.route,
            str(result.compared),
            f"{result.max_abs:.1e}",
            f"{result.max_rel:.1e}",
            limit,
            verdict,
        )
    console.print(table)
    for case in outcome.not_run:
        console.print(f"not run: {case.case}: {case.reason}")
