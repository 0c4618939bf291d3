"""`ming-trt ask`: one question to a running server, by text, image, video and audio; the answer streams."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ming_trt.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from ming_trt.serving.client import Answer, Client

EXAMPLES = (
    'Examples:  ming-trt ask "Hello"   |   ming-trt ask "What is this?" --image cat.jpg   |   '
    "ming-trt ask --audio speech.wav --task asr --dialect cantonese"
)


def command(
    text: str = typer.Argument("", help="The question."),
    image: list[Path] = typer.Option([], "--image", help="A picture; may be given several times."),
    video: list[Path] = typer.Option([], "--video", help="A video; may be given several times."),
    audio: list[Path] = typer.Option([], "--audio", help="A recording; may be given several times."),
    system: str | None = typer.Option(None, help="The system prompt."),
    thinking: bool = typer.Option(False, "--thinking", help="Let the model reason before it answers."),
    task: str | None = typer.Option(None, help="'asr': write down what is said in the audio."),
    dialect: str | None = typer.Option(None, help="With --task asr: the variety that is spoken."),
    frames: int | None = typer.Option(None, help="Frames of a video that are looked at."),
    max_tokens: int = typer.Option(512, help="Length of the answer at most."),
    temperature: float = typer.Option(0.0, help="0 = always the likeliest token."),
    top_k: int = typer.Option(0, help="Choose among that many tokens; 0 = all."),
    top_p: float = typer.Option(1.0, help="Choose among tokens of that total probability."),
    repetition_penalty: float = typer.Option(1.0, help="Above 1: repeat less."),
    no_repeat_ngram_size: int = typer.Option(0, help="No run of so many tokens twice; 0 = no rule."),
    stop: list[str] = typer.Option([], "--stop", help="End the answer before this text; may be given several times."),
    seed: int | None = typer.Option(None, help="Makes sampling (and drawing) repeatable."),
    ignore_eos: bool = typer.Option(False, "--ignore-eos", help="Go on to --max-tokens."),
    speak: Path | None = typer.Option(None, "--speak", help="Write the spoken answer to this WAV file."),
    read: bool = typer.Option(False, "--read", help="With --speak: speak the given text itself."),
    voice: str | None = typer.Option(None, help="With --speak: name of a voice, or a recording of one."),
    draw: Path | None = typer.Option(None, "--draw", help="Write the drawn or edited picture to this PNG file."),
    size: str | None = typer.Option(None, help="With --draw: WIDTHxHEIGHT."),
    steps: int | None = typer.Option(None, help="With --draw: denoising steps."),
    cfg: float | None = typer.Option(None, help="With --draw: guidance towards the text."),
    image_cfg: float | None = typer.Option(None, help="With --draw: guidance towards the given picture."),
    cfg_mode: int | None = typer.Option(None, help="With --draw: how both are combined."),
    url: str = typer.Option("localhost:8001", help="gRPC address of the server."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object per event, the last with the whole answer."),
) -> None:
    """Ask a running server. Text streams to stdout; the exit code is 0 only for a complete answer."""
    from ming_trt.serving.client import Client

    with Client(url) as client:
        _refuse_absent(client, speak, draw, {"--read": read, "--voice": voice, "--size": size, "--steps": steps})
        sampling: dict[str, Any] = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        sampling |= {"repetition_penalty": repetition_penalty, "no_repeat_ngram_size": no_repeat_ngram_size}
        sampling |= {"stop": stop, "seed": seed, "ignore_eos": ignore_eos}
        answer = client.ask(
            text,
            images=image,
            videos=video,
            audios=audio,
            system=system,
            sampling=sampling,
            video_options={} if frames is None else {"nframes": frames},
            thinking=thinking,
            task=task,
            dialect=dialect,
        )
        with answer:
            _print_json(answer) if json else _print_text(answer)


def _print_text(answer: Answer) -> None:
    for delta in answer:
        typer.echo(delta.text, nl=False)
    typer.echo()
    if answer.finish_reason == "length":
        typer.echo("(cut at --max-tokens, or the context is full)", err=True)


def _print_json(answer: Answer) -> None:
    for delta in answer:
        typer.echo(json_module.dumps({"event": "delta", "text": delta.text, **delta.state}, ensure_ascii=False))
    typer.echo(json_module.dumps({"event": "answer", **answer.summary()}, ensure_ascii=False))


def _refuse_absent(client: Client, speak: Path | None, draw: Path | None, options: dict[str, Any]) -> None:
    """Options of stages that the server does not have are an error, never ignored."""
    for name, value in options.items():
        needs = "--speak" if name in ("--read", "--voice") else "--draw"
        given = speak if needs == "--speak" else draw
        if value and given is None:
            raise InputError(f"{name} needs {needs} FILE: add it, or leave {name} out")
    outputs = client.outputs() if speak or draw else ()
    for option, path, output, stage in (("--speak", speak, "audio", "speech"), ("--draw", draw, "image", "image")):
        if path is not None and output not in outputs:
            raise UnavailableError(
                f"{option}: the server at {client.url} has no '{stage}' stage; serve a bundle with it"
            )
