"""Answers through the real server equal those of the in-process pipeline, token for token."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from ming_trt.errors import InputError
from ming_trt.processing.request import parse_request
from ming_trt.runtime.pipeline import Pipeline
from ming_trt.serving.assemble import assemble
from ming_trt.serving.client import Client
from ming_trt.serving.launch import Server

from .conftest import free_ports

pytestmark = [pytest.mark.triton, pytest.mark.slow]
EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGE, PAGE = (EXAMPLES / "scene.jpg").read_bytes(), (EXAMPLES / "page.png").read_bytes()
VIDEO, AUDIO = (EXAMPLES / "clip.mp4").read_bytes(), (EXAMPLES / "speech.wav").read_bytes()
GREEDY = {"max_tokens": 20}
FILM = {"type": "video", "nframes": 4}


def user(*parts: dict[str, Any], text: str = "") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, *([{"type": "text", "text": text}] if text else [])]}]


PICTURE, CLIP = {"type": "image"}, {"type": "audio"}
CASES: dict[str, dict[str, Any]] = {
    "text": {"messages": user(text="Name three uses of a kite.")},
    "thinking": {"messages": user(text="How far is the moon?"), "thinking": True},
    "image": {"messages": user(PICTURE, text="What is this?"), "images": [IMAGE]},
    "two images": {"messages": user(PICTURE, PICTURE, text="Compare."), "images": [IMAGE, PAGE]},
    "video": {"messages": user(FILM, text="What happens?"), "videos": [VIDEO]},
    "audio": {"messages": user(CLIP), "audios": [AUDIO], "task": "asr", "dialect": "cantonese"},
    "everything": {
        "messages": user(PICTURE, FILM, CLIP, CLIP, text="Well?"),
        "images": [IMAGE],
        "videos": [VIDEO],
        "audios": [AUDIO, AUDIO],
    },
    "several turns": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            *user(PICTURE, text="What is this?"),
            {"role": "assistant", "content": "A scene."},
            *user(text="And the colours? 颜色呢?"),
        ],
        "images": [IMAGE],
    },
    "sampled": {
        "messages": user(text="Tell me a story."),
        "sampling": {**GREEDY, "temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.1},
    },
    "stop string": {"messages": user(text="Hello there"), "sampling": {**GREEDY, "stop": ["a", "th", "o"]}},
}


@pytest.fixture(scope="module")
def server(understanding_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("repository") / "repo"
    assemble(understanding_bundle, repository)
    with Server(repository, free_ports(), ready_timeout_s=120, progress=print) as running:
        yield running


@pytest.fixture(scope="module")
def expected(understanding_bundle: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Text, token ids and finish reason of every case, from the pipeline in this process."""
    answers = {}
    with Pipeline.open(understanding_bundle) as pipeline:
        for name, case in CASES.items():
            media = {kind: case.get(kind, ()) for kind in ("images", "videos", "audios")}
            body = {key: value for key, value in case.items() if key not in media}
            answer = pipeline.answer(parse_request({"sampling": GREEDY, **body}), **media)
            answers[name] = (answer.text, answer.token_ids, answer.finish.reason)
    return answers


def through_triton(client: Client, case: dict[str, Any]) -> tuple[str, tuple[int, ...], str | None]:
    answer = client.ask(**{"sampling": GREEDY, **case})
    ids = [token for delta in answer for token in delta.state["token_ids"]]
    return answer.text, tuple(ids), answer.finish_reason


@pytest.mark.parametrize("name", CASES)
def test_every_modality(server: Server, expected: dict[str, Any], name: str) -> None:
    with Client(server.grpc_url) as client:
        assert through_triton(client, CASES[name]) == expected[name]
    assert expected[name][1], "an empty answer proves nothing"


def test_four_requests_at_once(server: Server, expected: dict[str, Any]) -> None:
    names = ["text", "image", "audio", "video"]
    answers: dict[str, Any] = {}

    def ask(name: str) -> None:
        with Client(server.grpc_url) as client:
            answers[name] = through_triton(client, CASES[name])

    for _ in range(3):
        answers.clear()
        threads = [threading.Thread(target=ask, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert answers == {name: expected[name] for name in names}


def png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def wav(samples: int) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(samples, np.float32), 16000, format="WAV")
    return stream.getvalue()


FAULTS: dict[str, dict[str, Any]] = {
    "no picture": {"text": "x", "images": [bytes(range(256))]},
    "empty picture": {"text": "x", "images": [b""]},
    "thin picture": {"text": "x", "images": [png(1, 10000)]},
    "empty recording": {"text": "x", "audios": [b""]},
    "short recording": {"text": "x", "audios": [wav(160)]},
    "no video": {"text": "x", "videos": [b"not a film"]},
    "empty prompt": {"text": ""},
    "long prompt": {"text": "word " * 6000},
    "unknown task": {"text": "x", "task": "dance"},
    "bad sampling": {"text": "x", "sampling": {"temperature": -1}},
    "unknown dialect": {"audios": [wav(16000)], "task": "asr", "dialect": "klingon"},
}


@pytest.mark.parametrize("name", FAULTS)
def test_unusable_input_is_one_sentence_and_the_server_goes_on(
    server: Server, expected: dict[str, Any], name: str
) -> None:
    with Client(server.grpc_url) as client:
        with pytest.raises(InputError) as caught:
            client.ask(**FAULTS[name]).read_all()
        sentence = str(caught.value)
        assert "\n" not in sentence and "Traceback" not in sentence and len(sentence) > 20
        assert through_triton(client, CASES["text"]) == expected["text"]
