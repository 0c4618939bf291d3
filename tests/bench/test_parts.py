"""Playback, load, accounting, media and scenarios, each alone."""

from __future__ import annotations

import io
import json
import threading
import time
import wave
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ming_trt.bench.hops import account
from ming_trt.bench.load import Load, arrival_times, run_load
from ming_trt.bench.machine import environment, measure_ceiling
from ming_trt.bench.media import KINDS, find_media, made_media
from ming_trt.bench.metrics import Slo, metrics, totals
from ming_trt.bench.samples import Sample, measure, playback
from ming_trt.bench.scenarios import SCENARIOS, Scenario, choose
from ming_trt.bench.server import ModelCount
from ming_trt.errors import InputError
from ming_trt.processing.request import parse_request
from ming_trt.serving.answer import Answer, Delta

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_playback_counts_what_runs_dry() -> None:
    assert playback([(0, 1), (0.5, 1), (1.9, 1)]).underruns == 0
    late = playback([(0, 1), (1.5, 1), (2.2, 1), (4.0, 1)])
    assert late.underruns == 2
    assert late.stalled == pytest.approx(0.5 + 0.5)
    assert playback([(0, 1), (1.5, 1)], lead=0.6).underruns == 0
    assert playback([]).underruns == 0


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 2)), max_size=20))
def test_playback_never_ends_before_the_media(pieces: list[tuple[float, float]]) -> None:
    arrivals = sorted(pieces)
    played = playback(arrivals)
    length = sum(duration for _, duration in arrivals)
    end = (arrivals[0][0] if arrivals else 0) + length + played.stalled
    assert not arrivals or end >= arrivals[-1][0] - 1e-6
    assert (played.underruns == 0) == (played.stalled == 0)


def test_arrivals() -> None:
    few = arrival_times(20, 5, seed=1)
    assert few[0] == 0 and 0 < few[-1] <= 5 / 20, "the rate that was asked for, also with few requests"
    assert arrival_times(1, 1, seed=0) == [0]
    times = arrival_times(50, 2000, seed=3)
    assert times == arrival_times(50, 2000, seed=3) != arrival_times(50, 2000, seed=4)
    assert times[0] == 0 and times == sorted(times)
    gaps = np.diff(times)
    # an exponential distribution of mean 1/50: mean and spread agree, within 4 standard errors
    assert gaps.mean() == pytest.approx(0.02, rel=4 / np.sqrt(2000))
    assert gaps.std() == pytest.approx(0.02, rel=0.15)


def test_open_loop_does_not_wait_for_answers() -> None:
    """Five requests arrive in 10 ms while none is answered: only a closed loop would wait."""
    together, go = threading.Barrier(5), time.perf_counter

    def send(number: int, due: float, origin: float) -> Sample:
        together.wait(timeout=20)
        return Sample(due, late=max(0.0, go() - origin - due))

    samples, _ = run_load(Load("rate", 500), 5, send, seed=0)
    assert [sample.due for sample in samples] == arrival_times(500, 5, 0)


def test_a_limit_keeps_the_rate() -> None:
    samples, _ = run_load(Load("rate", 200), 1000, lambda number, due, origin: Sample(due), seed=0, seconds=0.1)
    assert [sample.due for sample in samples] == arrival_times(200, 20, 0)
    samples, _ = run_load(Load("rate", 1), 5, lambda number, due, origin: Sample(due), seed=0, seconds=0.1)
    assert len(samples) == 1


class Drawn:
    """An answer with a picture, as the client gathers it."""

    id, usage, timings, finish_reason = "a", {"prompt_tokens": 7, "completion_tokens": 0}, {"prefill": 0.2}, "stop"
    picture: ClassVar = {
        "seconds": {"condition": 0.01, "encode": 1e-6, "denoise": 0.3, "decode": 0.1}, "given": [512, 256], "steps": 8,
    }  # fmt: skip
    speaking: ClassVar = {}

    def __iter__(self) -> Iterator[Delta]:
        yield Delta("", {"preview": 1}, b"1", b"")
        yield Delta("", {"picture": {}, "finish_reason": "stop"}, b"2", b"")


def test_a_picture_is_measured() -> None:
    """At its last message and not at a preview, with its parts: what takes a microsecond was not done."""
    clock = iter([5.0, 6.0, 7.0, 8.0])
    sample = measure(lambda: cast("Answer", Drawn()), 0.5, 4.5, lambda: next(clock))
    assert (sample.clock, sample.picture, sample.finished, sample.seconds) == (5.0, 2.0, 2.0, 3.0)
    assert sample.drawing == {"condition": 0.01, "denoise": 0.3, "decode": 0.1}
    assert sample.drawn == {"width": 512, "height": 256, "steps": 8}
    assert Sample.from_dict(json.loads(json.dumps(sample.as_dict()))) == sample


def test_a_sample_survives_json() -> None:
    sounds = [(0.6, 0.5), (0.9, 0.25)]
    sample = Sample(1.0, 0.1, 2.0, 1.9, [(0.5, 1), (0.75, 3)], sounds, 1.8, 10, 4, "stop", {"queue": 0.1}, "")
    assert Sample.from_dict(sample.as_dict()) == sample
    assert sample.token_times == [0.5, 0.75, 0.75, 0.75]


def test_goodput_needs_every_objective() -> None:
    sample = Sample(0, 0, 1.0, 1.0, [(0.5, 1), (0.8, 3)])
    assert Slo(0.6, 0.11).kept_by(sample)
    assert not Slo(0.4, 0.11).kept_by(sample)
    assert not Slo(0.6, 0.09).kept_by(sample)
    assert not Slo(0.6, 0.11, total=0.9).kept_by(sample)
    sample.sounds = [(0.9, 1.0)]
    assert Slo(0.6, 0.11, first_audio=0.9).kept_by(sample)
    assert not Slo(0.6, 0.11, first_audio=0.8).kept_by(sample)
    sample.error = "ServeError: gone"
    assert not Slo(0.6, 0.11).kept_by(sample)


def test_sound_and_pictures() -> None:
    """Two seconds of sound, the second of which comes 0.3 s after the first was heard."""
    sample = Sample(0, 0, 2.0, 2.0, [(0.1, 1)], sounds=[(0.4, 1.0), (1.7, 1.0)], picture=1.9)
    found = {metric.name: list(metric.of(sample)) for metric in metrics(Slo())}
    assert found["ttfa"] == [pytest.approx(400)]
    assert found["rtf"] == [pytest.approx(1.7 / 2)]
    assert found["audio_underruns"] == [1.0]
    assert found["image"] == [pytest.approx(1900)]
    silent = {metric.name: list(metric.of(Sample(0, 0, 2.0))) for metric in metrics(Slo())}
    assert not (silent["ttfa"] or silent["rtf"] or silent["audio_underruns"] or silent["image"])
    assert Slo(total=2.5).kept_by(sample) and not Slo(total=1.5).kept_by(sample)
    assert totals([sample], 30.0, Slo())["images_per_minute"] == 2


def counted(total: float, requests: int = 1, **parts: float) -> ModelCount:
    zero = dict.fromkeys(("queue", "compute_input", "compute_infer", "compute_output"), 0.0)
    return ModelCount(requests, 0, total, {**zero, **parts})


def test_accounting_takes_the_slower_encoder() -> None:
    sample = Sample(0, 0, 1.0, 1.0, [(0.5, 1)], engine={"queue": 0.0, "prefill": 0.2, "decode": 0.3})
    counts = {
        "ming": counted(0.9),
        "vision_encoder": counted(0.25, compute_infer=0.2),
        "audio_encoder": counted(0.1, compute_infer=0.1),
    }
    result = account([sample], counts)
    assert result is not None and result.closes
    assert result.by_hop()["vision_encoder"] == pytest.approx(250)
    assert "audio_encoder" not in result.by_hop()
    assert result.beside == {"audio_encoder": pytest.approx(100)}
    assert result.by_hop()["scheduling and python"] == pytest.approx(900 - 250 - 500)
    assert result.by_hop()["client and network"] == pytest.approx(100)


def test_accounting_of_a_drawing_has_the_parts_of_its_model() -> None:
    """Triton counts only that the model took it over; what its own clock does not tell is by difference."""
    clock = {"condition": 0.1, "denoise": 0.4, "decode": 0.1}
    sample = Sample(0, 0, 1.0, 1.0, engine={"prefill": 0.2}, picture=1.0, drawing=clock)
    result = account([sample], {"ming": counted(0.95), "image": counted(0.001, compute_infer=0.001)})
    assert result is not None and result.closes and result.sum == pytest.approx(1000)
    found = {row.part: row.ms for row in result.rows if row.hop == "image"}
    assert found == pytest.approx({"condition": 100, "denoise": 400, "decode": 100, "by difference": 150})
    assert not any(row.first for row in result.rows if row.hop == "image")


def test_accounting_of_a_spoken_answer_has_the_parts_after_its_text() -> None:
    """Beside the text nothing counts twice; what lies after it is told by the clock of the model that spoke."""
    engine = {"prefill": 0.1, "decode": 0.2}
    clock = {"talker": 0.3, "vocoder": 0.1}
    both = [
        Sample(0, 0, 1.0, 1.0, engine=engine, sounds=[(0.3, 1.0)], speaking=clock),
        Sample(0, 0, 1.0, 1.0, engine=engine, sounds=[(0.3, 1.0)], speaking={**clock, "listener": 0.1}),
    ]
    result = account(both, {"ming": counted(1.9, requests=2), "speech": counted(0.002, requests=2)})
    assert result is not None and result.closes and result.sum == pytest.approx(1000)
    found = {row.part: row.ms for row in result.rows if row.hop == "speech"}
    assert found == pytest.approx({"talker": 300, "vocoder": 100, "listener": 50, "by difference": 200})


class Spoken(Drawn):
    """An answer with sound, as the client gathers it."""

    picture: ClassVar = {}
    speaking: ClassVar = {"whole": {"text": 2.0, "talker": 0.5}, "after_text": {"text": 0.0, "talker": 0.5}}

    def __iter__(self) -> Iterator[Delta]:
        yield Delta("", {"speech": {"sample_rate": 24000}}, None, bytes(4800))


def test_a_spoken_answer_is_measured() -> None:
    clock = iter([5.0, 6.0, 7.0, 8.0])
    sample = measure(lambda: cast("Answer", Spoken()), 0.5, 4.5, lambda: next(clock))
    assert sample.sounds == [(1.0, 0.1)] and sample.called == ("speech", {"talker": 0.5})
    assert Sample.from_dict(json.loads(json.dumps(sample.as_dict()))) == sample


def test_accounting_that_claims_too_much_does_not_close() -> None:
    """Stages that together took longer than the request cannot all be on its path."""
    sample = Sample(0, 0, 1.0, 1.0, [(0.5, 1)], engine={"prefill": 0.7, "decode": 0.4})
    result = account([sample], {"ming": counted(0.95), "preprocess": counted(0.1, compute_infer=0.1)})
    assert result is not None
    assert not result.closes


def test_accounting_sees_other_clients() -> None:
    result = account([Sample(0, 0, 1.0, 1.0)], {"ming": counted(3.0, requests=3)})
    assert result is not None and "others used it" in result.note
    assert account([Sample(0, error="gone")], {}) is None


def test_made_media_can_be_read() -> None:
    media = made_media()
    assert {"image", "document", "audio"} <= set(media) <= set(KINDS)
    assert Image.open(io.BytesIO(media["image"].content)).size == (448, 336)
    with wave.open(io.BytesIO(media["audio"].content)) as file:
        assert file.getnframes() == 2 * file.getframerate()
    assert made_media()["image"].content == media["image"].content


def test_media_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no picture"):
        find_media(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        find_media(tmp_path / "absent")
    (tmp_path / "cat.JPG").write_bytes(b"1")
    (tmp_path / "my_page.png").write_bytes(b"2")
    found = find_media(tmp_path)
    assert {kind: medium.content for kind, medium in found.items()} == {"image": b"1", "document": b"2"}


def test_examples_are_the_default() -> None:
    assert {kind: medium.name for kind, medium in find_media(None).items()} == {
        "image": "scene.jpg", "document": "page.png", "video": "clip.mp4", "audio": "speech.wav",
    }  # fmt: skip
    assert find_media(None)["audio"].content == (EXAMPLES / "speech.wav").read_bytes()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_scenarios_follow_the_seed(scenario: Scenario) -> None:
    media = made_media()
    media.setdefault("video", media["image"])
    first = [scenario.request(i, 7, media, 16) for i in range(20)]
    assert first == [scenario.request(i, 7, media, 16) for i in range(20)]
    assert len({request["text"] for request in first}) > 5
    for request in first[:3]:
        # the server's own parser takes it
        body = {"id": "a", "messages": [{"role": "user", "content": "x"}]}
        body |= {key: request[key] for key in ("sampling", "draw", "speak") if key in request}
        parsed = parse_request(json.dumps(body).encode())
        assert (parsed.draw is not None, parsed.speak is not None) == (
            scenario.gives == "image", scenario.gives == "audio",
        )  # fmt: skip
        assert parsed.sampling.ignore_eos and parsed.sampling.max_tokens == 16


def test_scenarios_that_cannot_run_say_why() -> None:
    chosen, skipped = choose((), {}, {"images"}, {"text", "audio"})
    assert [scenario.name for scenario in chosen] == ["text", "long-text", "speech"]
    assert "no image file" in skipped["image"]
    assert skipped["audio"] == "the server takes no 'audios'"
    assert skipped["drawing"] == skipped["edit"] == "the server has no output 'image'"
    assert "speech" not in skipped
    media = made_media()
    every, none = choose((), {**media, "video": media["image"]}, {"images", "videos", "audios"}, {"audio", "image"})
    assert [scenario.name for scenario in every] == [scenario.name for scenario in SCENARIOS] and not none
    deaf, why = choose(("edit", "drawing"), media, set(), {"image"})
    assert [scenario.name for scenario in deaf] == ["drawing"] and why == {"edit": "the server takes no 'images'"}


def test_an_edit_sends_a_picture_and_the_steps() -> None:
    edit = next(scenario for scenario in SCENARIOS if scenario.name == "edit")
    media = made_media()
    request = edit.request(0, 1, media, 16, steps=3)
    assert request["images"] == [media["image"].content] and request["draw"]["steps"] == 3
    assert "steps" not in edit.request(0, 1, media, 16)["draw"]


def test_the_machine() -> None:
    ceiling = measure_ceiling(threads=1, read_bytes=8 << 20, seconds=0.01)
    assert ceiling.threads == 1
    # any machine of this century, however busy
    assert 1e7 < ceiling.read_bytes_per_s < 1e13
    assert 1e7 < ceiling.float32_flops_per_s < 1e15
    assert environment()["cores"] >= 1


def test_encoders_have_a_ceiling() -> None:
    """What an encoder must do follows from the file; the share it reaches from the time that Triton counted."""
    from ming_trt.bench.ceiling import ServedModel, shares
    from ming_trt.bench.machine import Ceiling
    from ming_trt.config import load_config
    from ming_trt.models import cost

    from ..conftest import GOLDEN

    config = load_config(GOLDEN / "understanding" / "checkpoint")
    precisions = {"llm": "int8", "vision_encoder": "fp32", "audio_encoder": "fp32"}
    model, media = ServedModel(config, precisions, {}), made_media()
    name, sound = model.encoder_cost("audio", media["audio"]) or ("", None)
    # two seconds, a frame for each hundredth
    assert name == "audio_encoder" and sound == cost.audio(config.audio, config.llm.hidden_size, 200)
    name, seen = model.encoder_cost("image", media["image"]) or ("", None)
    assert name == "vision_encoder" and seen is not None and seen.flops > 1e6
    drawn = model.encoder_cost("image", media["image"], draws=True)
    # a picture to edit is read at 451584 pixels, which are more
    assert drawn is not None and drawn[1].flops > 1.2 * seen.flops
    assert model.encoder_cost("image", media["audio"]) is None
    answer = Sample(0, prompt_tokens=10, completion_tokens=5, engine={"decode": 0.4})
    found = shares(model, Ceiling(2, 1e10, 1e11), Load("rate", 1), {}, [answer], (name, seen), 2.0)
    assert found["vision_encoder"]["mfu"] == pytest.approx(seen.flops / 0.002 / 1e11)
    assert found["vision_encoder"]["precision"] == "fp32" and found["precision"] == "int8"
    assert "decode" not in found, "how many share a step is not known for a rate"
    decode = shares(model, Ceiling(2, 1e10, 1e11), Load("concurrency", 1), {}, [answer])["decode"]
    # 0.4 s for the four tokens after the first
    assert decode["mbu"] == pytest.approx(decode["bytes"] / 0.1 / 1e10)


def test_a_drawing_and_a_spoken_answer_have_a_ceiling() -> None:
    """Work follows from the size, the steps and the reference; time from the clock of the model that drew."""
    from ming_trt.bench.ceiling import ServedModel, shares
    from ming_trt.bench.machine import Ceiling
    from ming_trt.config import load_config
    from ming_trt.image_config import dit_config, vae_config
    from ming_trt.models import cost_image, cost_speech
    from ming_trt.speech_config import load_talker_config

    from ..conftest import GOLDEN

    folder = GOLDEN / "generation" / "checkpoint"
    config = load_config(folder)
    picture, talker = (dit_config(config, stored_tables=True), vae_config(config)), load_talker_config(folder)
    names = ("llm", "dit", "vae_encoder", "vae_decoder", "talker")
    model = ServedModel(config, dict.fromkeys(names, "int8"), {}, picture, talker)
    ceiling, one = Ceiling(2, 1e10, 1e11), Load("concurrency", 1)
    clock = {"denoise": 4.0, "decode": 2.0}
    drawn = Sample(0, drawing=clock, drawn={"width": 512, "height": 256, "steps": 8})
    found = shares(model, ceiling, one, {}, [drawn, replace(drawn, drawing={"denoise": 6.0, "decode": 2.0})])
    # latents of 32 x 64, with the prompt and without it
    step, decoded = cost_image.dit(picture[0], 32, 64, rows=2), cost_image.vae_decoder(picture[1], 32, 64)
    assert found["image denoise"]["flops"] == 8 * step.flops
    assert found["image denoise"]["mfu"] == pytest.approx(8 * step.flops / 5.0 / 1e11)
    assert found["image denoise"]["least_ms"] == pytest.approx(8000 * step.seconds("int8", 1e10, 1e11))
    assert found["image decode"]["mfu"] == pytest.approx(decoded.flops / 2.0 / 1e11)
    assert "image encode" not in found and "talker, an id" not in found

    edited = replace(drawn, drawing={**clock, "encode": 1.0})
    found = shares(model, ceiling, one, {}, [edited])
    beside = cost_image.dit(picture[0], 32, 64, rows=2, reference=True)
    assert found["image denoise"]["flops"] == 8 * beside.flops > 16 * step.flops
    encoded = cost_image.vae_encoder(picture[1], 256, 512)
    assert found["image encode"]["mfu"] == pytest.approx(encoded.flops / 1.0 / 1e11)
    for shared in (Load("concurrency", 2), Load("rate", 1)):
        found = shares(model, ceiling, shared, {}, [edited])
        assert "image denoise" not in found and "image decode" in found, "the steps of two pictures are not told apart"

    spoken = shares(model, ceiling, one, {}, [Sample(0, sounds=[(1.0, 0.5)])])["talker, an id"]
    assert spoken["bytes"] == cost_speech.talker_step(talker).bytes("int8")
    assert "mbu" not in spoken, "its time is not known"
