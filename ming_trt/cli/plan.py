"""`ming-trt plan`: what a build will make and need, before anything is made."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from builders.plan import Plan

EXAMPLES = """Examples:

ming-trt plan CHECKPOINT

ming-trt plan folder-with-config-and-index --preset cpu-fp32 --json
"""


def command(
    checkpoint: Path = typer.Argument(..., help="Checkpoint; its config.json and headers, or index, are enough."),
    preset: str = typer.Option(None, "--preset", help="Name of a preset, or a .toml file. [default: by target]"),
    target: str = typer.Option(None, "--target", help="onnxruntime, tensorrt, tensorrt-rtx or tensorrt-llm."),
    precision: str = typer.Option(None, "--precision", help="For all engines (fp32), or per engine (llm=int8,...)."),
    max_host_memory: str = typer.Option(None, "--max-host-memory", help="Memory to fit into. [default: what is free]"),
    only: list[str] = typer.Option(None, "--only", help="Plan this component only; may be repeated."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Say what a build will make: steps, engines, sizes, memory, disk and time. Reads no weights, needs no GPU.

    Exit code 1, with the largest item and the nearest preset that fits, if it does not fit.
    """
    from builders.plan import plan
    from ming_trt import presets

    chosen = presets.load(preset or presets.default_name(target)).with_options(target=target, precision=precision)
    limit = presets.parse_size(max_host_memory, "--max-host-memory") if max_host_memory else 0
    made = plan(checkpoint, chosen, tuple(only or ()), limit)
    if json:
        typer.echo(json_module.dumps(made.as_dict()))
    else:
        _show(made)
    if made.problem:
        typer.echo(f"error: {made.problem}", err=True)
    raise typer.Exit(1 if made.problem else 0)


def _show(made: Plan) -> None:
    from rich.table import Table

    from builders.plan import gib
    from ming_trt.cli.output import console

    out = console()
    out.print(f"{made.checkpoint}: preset {made.preset}, target {made.target}")
    table = Table("engine", "precision", "parameters", "weights", "largest tensor", "remark", box=None)
    for engine in made.engines:
        if engine.reason:
            table.add_row(engine.name, "", "", "", "", f"skipped: {engine.reason}")
        else:
            sizes = (f"{engine.parameters:,}", gib(engine.weight_bytes), gib(engine.largest_tensor_bytes))
            table.add_row(engine.name, engine.precision, *sizes, "")
    out.print(table)
    sums = Table("", "", box=None, show_header=False)
    sums.add_row("steps", ", ".join(made.steps))
    sums.add_row("weights", f"{gib(made.weight_bytes)} ({made.parameters:,} parameters)")
    sums.add_row(
        "KV cache", f"{gib(made.kv_bytes)} of {gib(made.kv_budget)}; {made.kv_bytes_per_token:,} bytes a token"
    )
    sums.add_row("serving", f"{gib(made.run_bytes)} of {gib(made.memory_limit)}")
    sums.add_row("build peak", f"{gib(made.build_peak_bytes)} (estimate)")
    sums.add_row("gate peak", f"{gib(made.gate_peak_bytes)} (estimate; an engine that does not fit is not compared)")
    sums.add_row("disk", gib(made.disk_bytes))
    sums.add_row("time", f"about {made.seconds:.0f} s")
    out.print(sums)
