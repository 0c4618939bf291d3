"""`ming-trt inspect`: the manifest for people, the difference of two bundles, every file against its digest."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ming_trt.bundle import Bundle

EXAMPLES = """Examples:

ming-trt inspect bundle

ming-trt inspect bundle --check

ming-trt inspect old new      (exit code 1 if they differ)
"""


def command(
    bundle: Path = typer.Argument(..., help="Folder of a bundle."),
    other: Path = typer.Argument(None, help="A second bundle, to compare with."),
    check: bool = typer.Option(False, "--check", help="Compare every file with its digest."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Show what a bundle is and what was proved of it, or how two bundles differ.

    Exit code 1 if `--check` finds a problem, or if two bundles differ.
    """
    from ming_trt.bundle import Bundle, differences

    first = Bundle.open(bundle)
    if other is not None:
        rows = differences(first.manifest, Bundle.open(other).manifest)
        if json:
            typer.echo(json_module.dumps([{"what": what, "first": a, "second": b} for what, a, b in rows]))
        else:
            _show_differences(rows, str(bundle), str(other))
        raise typer.Exit(1 if rows else 0)
    problems = first.check() if check else []
    if json:
        document = first.manifest.as_dict() | ({"problems": problems} if check else {})
        typer.echo(json_module.dumps(document))
    else:
        _show(first)
        for problem in problems:
            typer.echo(f"problem: {problem}")
        if check and not problems:
            typer.echo(f"all {len(first.manifest.files)} files match their digests")
    raise typer.Exit(1 if problems else 0)


def _show(bundle: Bundle) -> None:
    from rich.table import Table

    from ming_trt.cli.output import console
    from ming_trt.evidence import evidence

    manifest = bundle.manifest
    files = manifest.files
    out = console()
    out.print(f"{bundle.path}: {manifest.model.get('name', '')}, preset {manifest.preset.name}, {manifest.target}")
    out.print(f"gate: {manifest.gate}")
    table = Table("engine", "precision", "MiB", "evidence", "gate", "worst relative", "least SQNR dB", box=None)
    for name, entry in manifest.components.items():
        size = sum(file.size for path, file in files.items() if path.startswith(f"{name}/"))
        outputs = entry.gate.get("outputs", ())
        worst = max((output["relative"] for output in outputs), default=None)
        least = min((output["sqnr_db"] for output in outputs), default=None)
        table.add_row(
            name,
            entry.precision,
            f"{size / 2**20:.1f}",
            entry.rung,
            entry.verdict,
            "" if worst is None else f"{worst:.2g}",
            "" if least is None else f"{least:.0f}",
        )
    out.print(table)
    known = evidence().get(manifest.target)
    if known:
        # what was proved of this bundle stands in the table; this is what is known of its target
        out.print(f"{manifest.target}: {known.weakest} or better by {known.by}")
    tensors = Table("engine", "", "name", "type", "shape", box=None)
    for name, entry in manifest.components.items():
        for kind, specs in (("in", entry.inputs), ("out", entry.outputs)):
            for tensor, spec in specs.items():
                shape = ", ".join(str(size) for size in spec.get("shape", ()))
                tensors.add_row(name, kind, tensor, str(spec.get("dtype", "")), f"[{shape}]")
    out.print(tensors)
    steps = Table("step", "outcome", "key", "reason", box=None)
    for name, step in manifest.steps.items():
        steps.add_row(name, step.outcome, step.key[:12], step.reason)
    out.print(steps)
    sources = Table("checkpoint file", "MiB", "sha256 of its tensors", box=None)
    for name, shard in manifest.checkpoint.items():
        sources.add_row(name, f"{shard['size'] / 2**20:.1f}", str(shard["sha256"])[:16])
    out.print(sources)
    out.print("made with " + ", ".join(f"{tool} {version}" for tool, version in manifest.versions.items()))


def _show_differences(rows: list[tuple[str, str, str]], first: str, second: str) -> None:
    from rich.table import Table

    from ming_trt.cli.output import console

    out = console()
    if not rows:
        out.print("no difference")
        return
    table = Table("what", first, second, box=None)
    for row in rows:
        table.add_row(*row)
    out.print(table)
