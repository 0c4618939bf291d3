"""`ming-trt ask`: one question to a running server, by text, image, video and audio; the answer streams."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ming_trt.cli.media_files import PictureFile, SoundFile, StepProgress, check_place
from ming_trt.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from ming_trt.serving.answer import Answer, Delta
    from ming_trt.serving.client import Client

EXAMPLES = (
    'Examples:  ming-trt ask "Hello"   |   ming-trt ask "What is this?" --image cat.jpg   |   '
    "ming-trt ask --audio speech.wav --task asr --dialect cantonese   |   "
    'ming-trt ask "a red fox in snow" --draw fox.png   |   ming-trt ask --read "Hello there" --speak hello.wav'
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
    voice_text: str | None = typer.Option(None, help="With --voice FILE: what is said in the recording."),
    draw: Path | None = typer.Option(None, "--draw", help="Write the drawn or edited picture to this PNG file."),
    size: str | None = typer.Option(None, help="With --draw: WIDTHxHEIGHT; an edit keeps the size of its picture."),
    preset: str | None = typer.Option(None, help="With --draw: defaults of the 'july' or the 'september' release."),
    steps: int | None = typer.Option(None, help="With --draw: denoising steps."),
    cfg: float | None = typer.Option(None, help="With --draw: guidance towards the text."),
    image_cfg: float | None = typer.Option(None, help="With --draw: guidance towards the given picture."),
    cfg_mode: int | None = typer.Option(None, help="With --draw: how both are combined, 1 to 6."),
    preview_every: int | None = typer.Option(None, help="With --draw: show FILE after every so many steps."),
    url: str = typer.Option("localhost:8001", help="gRPC address of the server."),
    json: bool = typer.Option(False, "--json", help="Print one JSON object per event, the last with the whole answer."),
) -> None:
    """Ask a running server. Text streams to stdout; the exit code is 0 only for a complete answer."""
    from ming_trt.serving.client import Client

    drawing = {"preset": preset, "steps": steps, "cfg": cfg, "image_cfg": image_cfg, "cfg_mode": cfg_mode}
    drawing |= {"preview_every": preview_every, **_size(size)}
    speaking = {"read": read or None, "voice": voice, "voice_text": voice_text}
    _refuse_alone(draw, "--draw", drawing)
    _refuse_alone(speak, "--speak", speaking)
    clip = Path(voice) if voice and Path(voice).is_file() else None
    if clip:
        speaking["voice"] = None
    with Client(url) as client:
        _refuse_absent(client, speak, draw)
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
            draw=None if draw is None else _given({**drawing, "seed": seed}),
            speak=None if speak is None else _given({**speaking, "seed": seed}),
            voice=clip,
        )
        with answer, _sound(speak) as sound, _picture(draw) as picture, StepProgress() as progress:
            for delta in answer:
                if delta.progress:
                    progress.show(*delta.progress)
                if picture is not None and delta.image is not None:
                    picture.write(delta.image, delta.preview)
                if sound is not None and delta.audio:
                    sound.write(delta.audio, delta.sample_rate)
                _print(delta, json)
            if draw is None and not json:
                typer.echo()  # the line of the text ends, whatever comes
            if sound is not None:
                _finish_sound(sound)
            _print_end(answer, sound, json)


def _print(delta: Delta, json: bool) -> None:
    if json:
        event = {"event": "delta", "text": delta.text, **delta.state}
        event |= {"image_bytes": len(delta.image)} if delta.image else {}
        event |= {"audio_samples": len(delta.audio) // 2} if delta.audio else {}
        typer.echo(json_module.dumps(event, ensure_ascii=False))
    else:
        typer.echo(delta.text, nl=False)


def _print_end(answer: Answer, sound: SoundFile | None, json: bool) -> None:
    if json:
        spoken = {} if sound is None else {"audio_seconds": sound.seconds}
        typer.echo(json_module.dumps({"event": "answer", **answer.summary(), **spoken}, ensure_ascii=False))
        return
    if answer.picture:
        given, asked = (_pixels(answer.picture[key]) for key in ("given", "asked"))
        of = "of the given picture" if asked is None else f"asked for {asked}"
        steps, seed = answer.picture["steps"], answer.picture["seed"]
        typer.echo(f"{given} ({of}), {steps} steps, seed {seed}, {answer.seconds:.1f} s", err=True)
        return
    if answer.finish_reason == "length":
        typer.echo("(cut at --max-tokens, or the context is full)", err=True)
    if sound is not None:
        first = f", the first after {answer.first_audio_s:.2f} s" if answer.first_audio_s else ""
        typer.echo(f"{sound.seconds:.2f} s of speech in {answer.seconds:.2f} s{first}", err=True)


def _pixels(size: Sequence[int] | None) -> str | None:
    return None if size is None else f"{size[0]}x{size[1]}"


def _sound(path: Path | None) -> AbstractContextManager[SoundFile | None]:
    return nullcontext() if path is None else SoundFile(path)


def _picture(path: Path | None) -> AbstractContextManager[PictureFile | None]:
    return nullcontext() if path is None else PictureFile(path)


def _finish_sound(sound: SoundFile) -> None:
    if not sound.samples:
        raise UnavailableError("--speak: the answer holds nothing that can be spoken, so there is no file; ask again")
    sound.finish()


def _size(size: str | None) -> dict[str, int | None]:
    if size is None:
        return {"width": None, "height": None}
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise InputError(f"--size is '{size}': give WIDTHxHEIGHT in pixels, such as 512x512")
    return {"width": int(width), "height": int(height)}


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse_alone(path: Path | None, option: str, options: Mapping[str, Any]) -> None:
    """Options that mean nothing without their file are an error, never ignored."""
    names = {"width": "--size", "height": "--size"}
    for name in _given(options):
        flag = names.get(name, "--" + name.replace("_", "-"))
        if path is None:
            raise InputError(f"{flag} needs {option} FILE: add it, or leave {flag} out")
    if path is not None:
        check_place(path, option)


def _refuse_absent(client: Client, speak: Path | None, draw: Path | None) -> None:
    """Options of stages that the server does not have are an error, never ignored."""
    outputs = client.outputs() if speak or draw else ()
    for option, path, output, stage in (("--speak", speak, "audio", "speech"), ("--draw", draw, "image", "image")):
        if path is not None and output not in outputs:
            raise UnavailableError(
                f"{option}: the server at {client.url} has no '{stage}' stage; serve a bundle with it"
            )
