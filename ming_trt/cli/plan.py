"""`ming-trt plan`: what a build will make and need, before anything is made."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from builders.plan import Plan

EXAMPLES = """Examples:

ming-trt plan CHECKPOINT

ming-trt plan official --preset h200-fp8      (the published model; needs no download)

ming-trt plan folder-with-config-and-index --preset cpu-fp32 --json
"""


def command(
    checkpoint: Path = typer.Argument(..., help="Checkpoint; its config.json is enough, headers or index are better."),
    preset: str = typer.Option(None, "--preset", help="Name of a preset, or a .toml file. [default: by target]"),
    target: str = typer.Option(None, "--target", help="onnxruntime, tensorrt, tensorrt-rtx or tensorrt-llm."),
    precision: str = typer.Option(None, "--precision", help="For all engines (fp32), or per engine (llm=int8,...)."),
    max_host_memory: str = typer.Option(None, "--max-host-memory", help="Memory to fit into. [default: what is free]"),
    tp: int = typer.Option(1, "--tp", min=1, help="Tensor parallel size (tensorrt-llm)."),
    ep: int = typer.Option(1, "--ep", min=1, help="Expert parallel size (tensorrt-llm)."),
    only: list[str] = typer.Option(None, "--only", help="Plan this component only; may be repeated."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Say what a build will make: steps, engines, sizes, memory, disk and time. Reads no weights, needs no GPU.

    The name "official" stands for the published checkpoint, whose sizes ship with ming-trt.

    Exit code 1, with the largest item and the nearest preset that fits, if it does not fit.
    """
    from builders.plan import plan
    from ming_trt import presets

    chosen = presets.load(preset or presets.default_name(target)).with_options(target=target, precision=precision)
    limit = presets.parse_size(max_host_memory, "--max-host-memory") if max_host_memory else 0
    made = plan(checkpoint, chosen, tuple(only or ()), limit, tp, ep)
    if json:
        typer.echo(json_module.dumps(made.as_dict()))
    else:
        _show(made)
    for note in made.notes:
        typer.echo(f"note: {note}", err=True)
    if made.problem:
        typer.echo(f"error: {made.problem}", err=True)
    raise typer.Exit(1 if made.problem else 0)


def _show(made: Plan) -> None:
    from rich.table import Table

    from builders.plan import gib
    from ming_trt.cli.output import console

    out = console()
    out.print(f"{made.checkpoint}: preset {made.preset}, target {made.target}")
    table = Table("engine", "precision", "parameters", "weights", "activations", "largest tensor", "remark", box=None)
    for engine in made.engines:
        if engine.reason:
            table.add_row(engine.name, "", "", "", "", "", f"skipped: {engine.reason}")
        else:
            sizes = (engine.weight_bytes, engine.activation_bytes, engine.largest_tensor_bytes)
            table.add_row(engine.name, engine.precision, f"{engine.parameters:,}", *map(gib, sizes), "")
    out.print(table)
    _show_shapes(out, made)
    place = {1: "GPU" if made.target != "onnxruntime" else "machine"}.get(made.gpus, f"fullest of {made.gpus} GPUs")
    serving = Table(f"serving, on the {place}", "", box=None)
    for item in made.run_items:
        serving.add_row(item.what, gib(item.size))
    serving.add_row("sum", gib(made.run_bytes) + (f" of {gib(made.memory_limit)}" if made.memory_limit else ""))
    out.print(serving)
    sums = Table("build", "", box=None)
    sums.add_row("steps", ", ".join(made.steps))
    sums.add_row("weights", f"{gib(made.weight_bytes)} from {gib(made.source_bytes)} of files")
    sums.add_row(
        "KV cache", f"{gib(made.kv_bytes)} of {gib(made.kv_budget)}; {made.kv_bytes_per_token:,} bytes a token"
    )
    sums.add_row("host peak", f"{gib(made.build_peak_bytes)} (estimate)")
    sums.add_row("gate peak", f"{gib(made.gate_peak_bytes)} (estimate; an engine that does not fit is not compared)")
    sums.add_row("disk", gib(made.disk_bytes))
    sums.add_row("time", f"about {made.seconds / 60:.0f} min on one core (estimate)")
    out.print(sums)


def _show_shapes(out: Console, made: Plan) -> None:
    """Inputs of every engine, and the range of each symbol in its profiles."""
    from rich.table import Table

    inputs = Table("engine", "inputs", box=None)
    profiles = Table("engine", "profile", "smallest, typical, largest", box=None)
    for engine in made.engines:
        if engine.inputs:
            inputs.add_row(engine.name, "; ".join(f"{name} {spec}" for name, spec in engine.inputs.items()))
        for profile in engine.profiles:
            ranges = (f"{symbol} {low}, {middle}, {high}" for symbol, (low, middle, high) in profile.sizes.items())
            profiles.add_row(engine.name, profile.name, "; ".join(ranges))
    out.print(inputs)
    out.print(profiles)
