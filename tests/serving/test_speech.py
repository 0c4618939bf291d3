"""Speech through the real server: equal to that of one process, cancelled, refused, failing loudly."""

from __future__ import annotations

import importlib
import io
import sys
import threading
import types
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from ming_trt.bundle import Bundle
from ming_trt.errors import CancelledError, EngineError, InputError, UnavailableError
from ming_trt.processing.request import parse_request
from ming_trt.runtime.audio_contract import to_pcm
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.narrate import Narrator
from ming_trt.runtime.pipeline import Pipeline
from ming_trt.serving.assemble import assemble
from ming_trt.serving.client import Client
from ming_trt.serving.launch import Server

from .conftest import free_ports
from .test_image import nobody_works, run, without_numbers

pytestmark = [pytest.mark.triton, pytest.mark.slow]
RECORDING = (Path(__file__).parents[2] / "examples" / "speech.wav").read_bytes()
LINE = "Tyler, Lucy, Michelle, we're going to space! It will take us three days, and then we come back home."
CLIP = {"voice_text": "Good morning."}


def recording(seconds: float, channels: int = 1, rate: int = 16000, loudness: float = 0.1) -> bytes:
    tone = loudness * np.sin(np.arange(int(seconds * rate)) * (2 * np.pi * 150 / rate))
    stream = io.BytesIO()
    soundfile.write(stream, np.repeat(tone[:, None], channels, 1).astype(np.float32), rate, format="WAV")
    return stream.getvalue()


CASES: dict[str, dict[str, Any]] = {
    "read": {"text": LINE, "speak": {"read": True, "seed": 3}},
    "read in Chinese": {"text": "今天是2025年7月22日，我们去公园玩吧，好不好？", "speak": {"read": True}},
    "answer": {"text": "Tell me a story.", "speak": {"seed": 4}, "sampling": {"max_tokens": 60}},
    "answer to a recording": {"text": "", "audios": [RECORDING], "speak": {}, "sampling": {"max_tokens": 30}},
    "voice of a clip": {
        "text": "Hello there.",
        "speak": {"read": True, **CLIP},
        "voice": recording(2.0, channels=2, rate=48000),
    },
}


@pytest.fixture
def client(mini_server: Server) -> Iterator[Client]:
    with Client(mini_server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def expected(mini_bundle: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Samples i16 [n] of every case, spoken in this process."""
    bundle, sounds = Bundle.open(mini_bundle), {}
    with Pipeline.open(bundle) as pipeline:
        narrator = Narrator.open(bundle, pipeline)
        for name, case in CASES.items():
            audios = case.get("audios", [])
            content = [{"type": "audio"}] * len(audios)
            content += [{"type": "text", "text": case["text"]}] if case["text"] else []
            body = {"messages": [{"role": "user", "content": content}], "sampling": case.get("sampling", {})}
            request = parse_request({**body, "speak": case["speak"]})
            chunks = narrator.speak(request, audios=audios, clip=case.get("voice"))
            sounds[name] = np.concatenate([to_pcm(chunk.audio) for chunk in chunks])
        narrator.close()
    return sounds


def spoken(client: Client, case: dict[str, Any]) -> np.ndarray[Any, Any]:
    answer = client.ask(**case)
    parts = [delta for delta in answer if delta.audio]
    assert {delta.sample_rate for delta in parts} == {24000}
    order = [delta.state["speech"]["piece"] for delta in parts]
    assert order == sorted(order)
    assert answer.finish_reason is not None
    return np.frombuffer(b"".join(delta.audio for delta in parts), "<i2")


@pytest.mark.parametrize("name", CASES)
def test_equals_the_speech_of_one_process(client: Client, expected: dict[str, Any], name: str) -> None:
    """Bit for bit: the same engines, pieces, chunks and random numbers."""
    found = spoken(client, CASES[name])
    assert len(found) > 2400
    assert np.array_equal(found, expected[name])


def test_three_at_once(client: Client, expected: dict[str, Any]) -> None:
    names = ["read", "answer", "read in Chinese"]
    found: dict[str, Any] = {}
    threads = [threading.Thread(target=lambda n=name: found.update({n: spoken(client, CASES[n])})) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(np.array_equal(found[name], expected[name]) for name in names)


def test_text_is_that_of_an_answer_without_speech(client: Client) -> None:
    silent = client.ask("Tell me a story.", sampling={"max_tokens": 60})
    loud = client.ask("Tell me a story.", sampling={"max_tokens": 60}, speak={})
    assert loud.read_all() == silent.read_all()
    assert loud.usage == silent.usage and loud.first_audio_s is not None


def test_reading_asks_no_language_model(client: Client) -> None:
    answer = client.ask(LINE, speak={"read": True})
    assert answer.read_all() == "" and answer.usage["completion_tokens"] == 0


@pytest.mark.parametrize("case", [CASES["read"], {**CASES["answer"], "sampling": {"max_tokens": 2000}}])
def test_cancellation_frees_every_stage(mini_server: Server, client: Client, case: dict[str, Any]) -> None:
    answer = client.ask(**{**case, "text": case["text"] * 20})
    next(delta for delta in answer if delta.audio)
    answer.cancel()
    with pytest.raises(CancelledError):
        answer.read_all()
    assert client.ask("Hello", sampling={"max_tokens": 2}).read_all()
    nobody_works(mini_server)


FAULTS: dict[str, dict[str, Any]] = {
    "empty": {"text": "", "speak": {"read": True}},
    "10,000 characters": {"text": "word " * 2000, "speak": {"read": True}},
    "emoji": {"text": "😀🎉", "speak": {"read": True}},
    "unknown voice": {"text": LINE, "speak": {"read": True, "voice": "nobody"}},
    "short clip": {"speak": CLIP, "voice": recording(0.1)},
    "long clip": {"speak": CLIP, "voice": recording(60)},
    "silent clip": {"speak": CLIP, "voice": recording(2, loudness=0)},
    "no clip": {"speak": CLIP, "voice": b"no sound"},
    "clip without its text": {"speak": {}, "voice": recording(2)},
    "text without its clip": {"speak": CLIP},
    "clip without speech": {"voice": recording(2)},
    "reading media": {"speak": {"read": True}, "audios": [RECORDING]},
    "unknown option": {"speak": {"pitch": 2}},
    "negative seed": {"speak": {"seed": -1}},
}


@pytest.mark.parametrize("name", FAULTS)
def test_unusable_input_is_one_sentence(mini_server: Server, client: Client, name: str) -> None:
    with pytest.raises(InputError) as caught:
        client.ask(**{"text": "Hello", **FAULTS[name]}).read_all()
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20
    assert client.ask("Hello", sampling={"max_tokens": 2}).read_all()


def test_mixed_scripts(client: Client) -> None:
    assert len(spoken(client, {"text": "我喜欢 machine learning, très bien, 3.5%!", "speak": {"read": True}})) > 2400


def test_command_writes_a_sound_file(mini_server: Server, expected: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["ask", "--read", LINE, "--speak", str(tmp_path / "out.wav"), "--seed", "3"]
    done = run(*arguments, "--url", mini_server.grpc_url)
    assert done.returncode == 0, done.stderr
    with wave.open(str(tmp_path / "out.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24000)
        assert np.array_equal(np.frombuffer(file.readframes(file.getnframes()), "<i2"), expected["read"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.wav"]


def test_command_leaves_nothing_on_failure(mini_server: Server, tmp_path: Path) -> None:
    arguments = ["ask", "--read", "😀", "--speak", str(tmp_path / "out.wav"), "--url", mini_server.grpc_url]
    done = run(*arguments)
    assert done.returncode != 0 and done.stderr.startswith("error: ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ["talker", "vocoder"])
def test_bad_numbers_become_an_error_that_names_the_stage(mini_bundle: Path, tmp_path: Path, engine: str) -> None:
    assemble(without_numbers(mini_bundle, tmp_path / "bundle", engine), tmp_path / "repo")
    with (
        Server(tmp_path / "repo", free_ports(), ready_timeout_s=120) as server,
        Client(server.grpc_url) as client,
    ):
        with pytest.raises(EngineError, match=rf"stage 'speech'.*{engine}.*not finite"):
            client.ask(LINE, speak={"read": True}).read_all()
        with pytest.raises(EngineError, match="stage 'speech'"):
            client.ask(**CASES["answer"]).read_all()
        assert client.ask("Hello", sampling={"max_tokens": 2}).read_all()
        nobody_works(server)


def test_sound_waits_for_a_client_that_says_nothing(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client reads and does not report: `ahead` and one chunk come, the rest only after it did."""
    control, came = client.control, threading.Event()

    def silent(op: str, request_id: str, seconds: float = 0.0) -> dict[str, Any]:
        return {} if op == "heard" else control(op, request_id, seconds)

    monkeypatch.setattr(client, "control", silent)
    answer = client.ask(f"{LINE} {LINE} {LINE}", speak={"read": True, "ahead": 0.5}, request_id="deaf")
    lengths: list[float] = []

    def read() -> None:
        for delta in answer:
            if delta.audio:
                lengths.append(len(delta.audio) / 2 / delta.sample_rate)
                came.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert came.wait(60)
    before = 0
    while before != len(lengths):
        before = len(lengths)
        thread.join(1.5)
    assert thread.is_alive() and sum(lengths[:-1]) < 0.5, "no more than the limit and one chunk"
    control("heard", "deaf", 3600.0)
    thread.join(60)
    assert not thread.is_alive() and answer.finish_reason == "stop" and len(lengths) > before


def test_a_slow_reader_gets_everything(client: Client) -> None:
    deltas = []
    for delta in client.ask(f"{LINE} {LINE}", speak={"read": True, "ahead": 0.1}):
        deltas.append(delta)
    pieces = [delta.state["speech"] for delta in deltas if delta.audio]
    assert sum(piece["last"] for piece in pieces) >= 2
    assert sum(len(delta.audio) for delta in deltas) // 2 == deltas[-1].state["audio_samples"] > 0
    with pytest.raises(InputError, match="set 'lease'"):
        client.ask(LINE, speak={"read": True, "ahead": 5}, lease_s=0).read_all()


def test_more_answers_than_are_spoken_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stage's own book-keeping, without a server: one answer is taken, the next refused, also its later calls."""
    backend = types.ModuleType("triton_python_backend_utils")
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    stage_module = importlib.import_module("ming_trt.serving.stages.speech")
    monkeypatch.setattr(stage_module, "MAX_ANSWERS", 1)
    monkeypatch.setattr(stage_module, "read_json", lambda request, _: request)
    stage = stage_module.SpeechStage()
    stage.board, stage.speech = CancelBoard(tmp_path), types.SimpleNamespace(sample_rate=24000)
    stage._sessions, stage._failed, stage._lock = {}, {}, threading.Lock()

    def call(name: str) -> None:
        # not the first call of its answer, so that nothing is spoken yet
        stage._take({"id": name, "number": 1, "pieces": [], "last": False, "ahead": 0}, None)

    call("one")
    call("one")
    with pytest.raises(UnavailableError, match="1 answers are being spoken already"):
        call("two")
    stage._sessions.clear()
    with pytest.raises(CancelledError):
        call("two")
    call("three")
