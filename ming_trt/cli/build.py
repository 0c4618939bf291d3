"""`ming-trt build`: from a checkpoint to a bundle of engines."""

from __future__ import annotations

import json as json_module
from pathlib import Path

import typer

# builds for target tensorrt-llm, without that target being named
LLM_CHECKPOINT = "llm-checkpoint"
EXAMPLES = """Examples:

ming-trt build mini -o bundle

ming-trt build CHECKPOINT -o bundle --preset cpu-fp32 --precision llm=int8

ming-trt build CHECKPOINT -o bundle --only vision_encoder --only audio_encoder

ming-trt build CHECKPOINT -o bundle --preset h200-fp8      (in the container with TensorRT-LLM, on the GPU)

ming-trt build CHECKPOINT -o llm --only llm-checkpoint --precision fp8 --tp 2
"""


def command(
    checkpoint: Path = typer.Argument(..., help="Folder of the checkpoint in the official layout."),
    output: Path = typer.Option(
        None, "-o", "--output", help="Folder of the bundle. [default: engines/build/PRESET]", show_default=False
    ),
    preset: str = typer.Option(None, "--preset", help="Name of a preset, or a .toml file. [default: by target]"),
    target: str = typer.Option(None, "--target", help="onnxruntime, tensorrt, tensorrt-rtx or tensorrt-llm."),
    precision: str = typer.Option(None, "--precision", help="For all engines (fp32), or per engine (llm=int8,...)."),
    tp: int = typer.Option(1, "--tp", min=1, help="Tensor parallel size (tensorrt-llm)."),
    ep: int = typer.Option(1, "--ep", min=1, help="Expert parallel size (tensorrt-llm)."),
    calibration: Path = typer.Option(None, "--calibration", help="Folder with calibration samples (fp8)."),
    max_host_memory: str = typer.Option(None, "--max-host-memory", help="Limit of host memory, for example 24GiB."),
    only: list[str] = typer.Option(None, "--only", help="Build this component only; may be repeated."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object on stdout."),
) -> None:
    """Export, compile and check every engine of a checkpoint; run it again to continue or to update.

    Options override the preset. Only what changed is built again. Ends with the numerics gate: exit code 1 if an
    engine does not match its definition.
    """
    from builders.build import Options, build
    from ming_trt import presets
    from ming_trt.cli.progress import BuildProgress

    if target is None and preset is None and only == [LLM_CHECKPOINT]:
        target = "tensorrt-llm"
    chosen = presets.load(preset or presets.default_name(target)).with_options(target=target, precision=precision)
    options = Options(
        checkpoint,
        output or Path("engines/build") / chosen.name,
        chosen,
        tuple(only or ()),
        presets.parse_size(max_host_memory, "--max-host-memory") if max_host_memory else 0,
        calibration,
        tp,
        ep,
    )
    try:
        with BuildProgress() as progress:
            report = build(options, progress)
    except KeyboardInterrupt:
        typer.echo("what is finished stays; the same command goes on from there", err=True)
        raise
    if json:
        typer.echo(json_module.dumps(report.as_dict()))
    else:
        _show(report)
    raise typer.Exit(0 if report.ok else 1)


def _show(report: object) -> None:
    from rich.table import Table

    from builders.build import Report
    from ming_trt.cli.output import console

    assert isinstance(report, Report)
    out = console()
    table = Table("step", "outcome", "seconds", "remark", box=None)
    for name, result in report.results.items():
        remark = result.reason
        if result.record is not None and "verdict" in result.record.facts:
            facts = result.record.facts
            worst = max((output["relative"] for output in facts["outputs"]), default=0.0)
            remark = facts["reason"] or f"{facts['verdict']}, worst relative error {worst:.2g}"
        table.add_row(name, str(result.outcome), f"{result.seconds:.1f}" if result.seconds else "", remark)
    out.print(table)
    out.print(f"{report.bundle}: gate {report.verdict}, {report.seconds:.1f} s")
