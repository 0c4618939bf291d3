"""`ming-trt bench`: latency benchmark of a running server, and comparison of two of them."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ming_trt.errors import InputError

if TYPE_CHECKING:
    from ming_trt.bench.run import Options

EXAMPLES = (
    "Examples:  ming-trt bench -o report   |   "
    "ming-trt bench --scenario text --concurrency 1,8 --rate 2,4 -o report   |   "
    "ming-trt bench --compare before after"
)


def command(
    url: str = typer.Option("localhost:8001", "--url", help="gRPC address of the server."),
    output: Path = typer.Option(None, "-o", "--output", help="Folder for report.html and report.json."),
    scenario: list[str] = typer.Option(
        [],
        "--scenario",
        help="text, long-text, image, document, video, audio, speech, drawing or edit; may be given several times.",
    ),
    concurrency: str = typer.Option("1,2,4", help="Requests at once, one measurement each; empty = none."),
    rate: str = typer.Option("auto", help="Requests per second; auto = 50 and 80 % of what was reached; empty = none."),
    requests: int = typer.Option(20, help="Requests per measurement."),
    warmup: int = typer.Option(2, help="Requests before each measurement that do not count."),
    traces: int = typer.Option(5, help="Further requests per measurement that the server traces; 0 = none."),
    seconds: float = typer.Option(60.0, help="After so long no more requests are sent at a load; 0 = no limit."),
    max_tokens: int = typer.Option(32, help="Tokens of every answer."),
    steps: int = typer.Option(8, help="Denoising steps of every picture; 0 = as many as the server likes."),
    seed: int = typer.Option(0, help="Equal seeds give equal questions and arrivals."),
    slo_ttft: float = typer.Option(1.0, help="Objective: seconds to the first token."),
    slo_itl: float = typer.Option(0.1, help="Objective: seconds per token after it."),
    slo_audio: float = typer.Option(2.0, help="Objective: seconds to the first sound of a spoken answer; 0 = none."),
    slo_total: float = typer.Option(0.0, help="Objective: seconds for the whole answer; 0 = none."),
    media: Path | None = typer.Option(None, help="Folder with a picture, a video, a recording to send."),
    bundle: Path | None = typer.Option(None, help="The bundle that is served: adds its digest, MBU and MFU."),
    perf_analyzer: bool = typer.Option(
        False, "--perf-analyzer", help="Measure nothing: write input files of that tool, and say how to run it."
    ),
    compare: tuple[Path, Path] = typer.Option(None, "--compare", help="Two reports (folders or files) to compare."),
) -> None:
    """Measure a running server: latency, throughput and goodput by scenario and load, and where the time goes.

    Writes report.json (with every request) and report.html; the last line of stdout is one JSON object. Exit code 0 if
    any request succeeded: errors are counted in the report. 1 if the server went away, 130 after Ctrl-C: the report
    then ends there.
    """
    if compare:
        return _compare(*compare, output)
    if output is None:
        raise InputError("the report needs a place: give -o FOLDER")
    from ming_trt.bench.metrics import Slo
    from ming_trt.bench.run import INTERRUPTED, Options, run
    from ming_trt.bench.write import check_place, latency_table, summary, throughput_table, write
    from ming_trt.cli.output import console

    options = Options(
        url=url,
        scenarios=tuple(scenario),
        concurrency=tuple(_counts(concurrency, "--concurrency")),
        rates=None if rate == "auto" else tuple(_numbers(rate, "--rate")),
        requests=requests,
        warmup=warmup,
        traces=traces,
        seconds=seconds,
        max_tokens=max_tokens,
        steps=steps,
        seed=seed,
        slo=Slo(slo_ttft, slo_itl, slo_total, slo_audio),
        media=media,
        bundle=bundle,
    )
    check_place(output)
    if perf_analyzer:
        return _inputs(options, output)
    report = run(options, lambda line: typer.echo(line, err=True))
    files = write(report, output)
    out = console()
    out.print("median / 95th percentile in milliseconds (rtf: s/s)")
    out.print(latency_table(report))
    out.print(throughput_table(report))
    for name, why in report["skipped"].items():
        out.print(f"not measured: {name}, {why}")
    if report["stopped"]:
        out.print(f"the measurement ended early: {report['stopped']}")
    out.print(f"report: {files[1]}\n")
    typer.echo(json_module.dumps(summary(report, files), ensure_ascii=False))
    if report["stopped"]:
        raise typer.Exit(130 if report["stopped"] == INTERRUPTED else 1)


def _inputs(options: Options, output: Path) -> None:
    from ming_trt.bench.media import find_media
    from ming_trt.bench.perf_analyzer import command as tool
    from ming_trt.bench.perf_analyzer import write_inputs
    from ming_trt.bench.scenarios import chosen

    media, commands = find_media(options.media), {}
    for scenario in chosen(options.scenarios):
        if scenario.kind and scenario.kind not in media:
            continue
        sizes = (options.max_tokens, options.steps)
        file = write_inputs(scenario, output, options.requests, options.seed, media, *sizes)
        commands[scenario.name] = tool(file, options.url, max(options.concurrency, default=1), options.requests)
        typer.echo(commands[scenario.name])
    typer.echo(json_module.dumps(commands))


def _compare(a: Path, b: Path, output: Path | None) -> None:
    from ming_trt.bench.compare import compare, read_report
    from ming_trt.bench.write import check_place, comparison_table
    from ming_trt.cli.output import console

    if output is not None:
        check_place(output)
    comparison = compare(read_report(a), read_report(b))
    out = console()
    out.print(comparison_table(comparison))
    for line in (*comparison.differences, *comparison.unmatched):
        out.print(f"not the same: {line}")
    for entry in comparison.errors:
        out.print(f"errors: {entry['scenario']}, {entry['load']}: {entry['a']} in A, {entry['b']} in B")
    line = json_module.dumps(comparison.as_dict(), ensure_ascii=False)
    if output is not None:
        (output / "comparison.json").write_text(line + "\n", "utf-8")
    typer.echo(line)


def _counts(text: str, option: str) -> list[int]:
    numbers = _numbers(text, option)
    if not all(number.is_integer() for number in numbers):
        raise InputError(f"{option} is '{text}': give whole numbers with commas between them")
    return [int(number) for number in numbers]


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{option} is '{text}': give numbers with commas between them") from None
