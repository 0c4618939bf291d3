"""Speech on TensorRT's engine class, caches of one capacity, over host memory: the codes and the audio stay the same.

The device is host memory and the plan ONNX Runtime (`tests/runtime/host_device.py`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ming_trt.bundle import Bundle
from ming_trt.errors import ConfigError, InputError
from ming_trt.golden.cases import Cases
from ming_trt.processing.s3_bpe import S3Bpe
from ming_trt.processing.talker_prompt import TalkerTokens, talker_prompt
from ming_trt.processing.voice import Voice
from ming_trt.runtime.audio_stream import SeamlessStream
from ming_trt.runtime.detokenizer import Detokenizer
from ming_trt.runtime.device_engine import DeviceEngine
from ming_trt.runtime.talker import Talker
from tests.runtime.host_device import open_host_engine

CAPACITY = 320


def on_device(bundle: Bundle, name: str, folder: Path, capacity: int) -> DeviceEngine:
    """The engine with caches of `capacity`, as a plan has them."""
    source = bundle.model_path(name)
    for file in source.parent.glob(f"{source.name}*"):
        shutil.copy(file, folder / file.name)
    model = onnx.load(source, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == "T" and name.startswith(("flow", "talker")):
                size.ClearField("dim_param")
                size.dim_value = capacity
    onnx.save(model, folder / source.name)
    return open_host_engine(folder / source.name, name, capture=True)


@pytest.fixture(scope="module")
def device(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Detokenizer:
    engines = {name: on_device(bundle, name, tmp_path_factory.mktemp(name), CAPACITY) for name in Detokenizer.ENGINES}
    return Detokenizer(engines, {name: bundle.component(name).facts for name in engines})


def spoken(decoder: Detokenizer, voice: Voice, seed: int) -> np.ndarray:
    codes = np.random.default_rng(seed).integers(0, decoder.vocabulary, 140).tolist()
    stream = SeamlessStream(decoder, voice, np.random.default_rng(seed))
    return np.concatenate([*(chunk for code in codes for chunk in stream.push([code])), stream.finish()])


def test_audio_is_the_same_and_later_utterances_use_the_graphs_of_the_first(
    detokenizer: Detokenizer, device: Detokenizer, voice: Voice
) -> None:
    estimator: Any = device._estimator
    for seed in (0, 1):
        # Masked places of the longer cache add zeros, at other places of a sum.
        np.testing.assert_allclose(spoken(device, voice, seed), spoken(detokenizer, voice, seed), atol=1e-4)
    captured = estimator.counts.captured
    assert captured == 20, "one for each Euler step of a whole chunk, and of the last part"
    launched, runs = estimator.counts.launched, estimator.counts.runs
    spoken(device, voice, 2)
    assert estimator.counts.captured == captured
    assert estimator.counts.launched - launched == estimator.counts.runs - runs
    two = [SeamlessStream(device, voice, np.random.default_rng(i)) for i in (5, 6)]
    for stream in two:
        assert list(stream.push([1] * 60))  # each has caches of its own
    assert two[0]._state is not None and two[1]._state is not None
    assert two[0]._state.encoder is not two[1]._state.encoder


def test_more_than_the_caches_hold_is_refused(device: Detokenizer, voice: Voice) -> None:
    codes = np.zeros(CAPACITY, np.int64)
    with pytest.raises(InputError, match=f"the speech engines were built for {CAPACITY}: split the text"):
        device.to_mel(voice, codes, chunked=False, final=True)


def device_bytes(decoder: Detokenizer) -> int:
    """What is allocated on the devices of the flow's two engines."""
    engines: tuple[Any, ...] = (decoder._encoder, decoder._estimator)
    return sum(size for engine in engines for _, size in engine._queue.memory.values())


def test_a_stream_counts_with_all_that_it_holds(bundle: Bundle, device: Detokenizer, voice: Voice) -> None:
    """Caches of one capacity are there from the first frame on, and stay for the next stream: the budget knows."""
    facts = {name: bundle.component(name).facts for name in Detokenizer.ENGINES}
    engines = dict(
        zip(Detokenizer.ENGINES, (device._encoder, device._estimator, device._pitch, device._vocoder), strict=True)
    )
    one = device.stream_bytes(1)
    assert one == device.stream_bytes(CAPACITY)
    before = device_bytes(device)
    decoder = Detokenizer(engines, facts, int(1.5 * one))
    assert device_bytes(device) == before, "nothing is taken to know how large a stream is"
    first = decoder.stream_state(50)
    # each array starts on 256 bytes
    assert 0 <= device_bytes(device) - before - one < 0.02 * one
    assert first is not None and decoder.memory.used == one and decoder.stream_state(50) is None
    caches = first.encoder
    del first
    assert decoder.memory.used == one, "kept for the next"
    again = decoder.stream_state(100)
    assert again is not None and again.encoder is caches and decoder.memory.used == one
    late = SeamlessStream(decoder, voice, np.random.default_rng(0))
    codes = np.random.default_rng(0).integers(0, decoder.vocabulary, 140).tolist()
    assert not list(late.push(codes))
    np.testing.assert_allclose(late.finish(), spoken(device, voice, 0), atol=1e-4)
    with pytest.raises(ConfigError, match=r"for each stream and flow_budget is .* MiB: raise it"):
        Detokenizer(engines, facts, one - 1)


def test_a_prompt_that_leaves_no_room_is_refused_before_any_work(
    bundle: Bundle, entries: S3Bpe, cases: Cases, voice: Voice, tmp_path: Path
) -> None:
    engine = on_device(bundle, "talker", tmp_path, 256)
    tokens = TalkerTokens.by_position(cases.index["talker"]["audio_offset"])
    prompt = talker_prompt(tokens, entries.encode(voice.codes.tolist()), [1, 2, 3], [4, 5], 0)
    steps = 256 - len(prompt) + 1
    random = np.random.default_rng(0)
    with pytest.raises(InputError, match=f"up to {steps} spoken ones do not fit the 256 that its engine was built for"):
        next(Talker(engine, entries, tokens, steps).codes(prompt, voice.speaker, None, random))
    assert engine.counts.runs == 0
    assert next(Talker(engine, entries, tokens, steps - 1).codes(prompt, voice.speaker, None, random))


def test_the_talker_says_the_same(
    bundle: Bundle, talker: Talker, entries: S3Bpe, cases: Cases, voice: Voice, tmp_path: Path
) -> None:
    engine = on_device(bundle, "talker", tmp_path, 512)
    tokens = TalkerTokens.by_position(cases.index["talker"]["audio_offset"])
    other = Talker(engine, entries, tokens, max_steps=40)
    plain = Talker(talker._engine, entries, tokens, max_steps=40)
    prompt = talker_prompt(tokens, entries.encode(voice.codes.tolist()), [1, 2, 3], list(range(4, 24)), 0)
    said = [
        [list(each.codes(prompt, voice.speaker, None, np.random.default_rng(3))) for _ in range(2)]
        for each in (plain, other)
    ]
    assert said[0] == said[1] and len(said[0][0]) > 5
    # A step is captured once: the second generation has the cache of the first. So is its prompt, which is the same.
    assert engine.counts.captured == 2 and engine.counts.launched == engine.counts.runs - 4
