"""Speech as it is served makes no call outside of the profiles of TensorRT, with a single slot too."""

from __future__ import annotations

import numpy as np
import pytest

from builders.plan import plan
from builders.plan_serving import stream_bytes
from builders.tensorrt_profiles import fixed_sizes, phases
from ming_trt import presets
from ming_trt.bundle import Bundle
from ming_trt.golden.cases import Cases
from ming_trt.presets import Profile
from ming_trt.processing.s3_bpe import S3Bpe
from ming_trt.processing.talker_prompt import TalkerTokens, talker_prompt
from ming_trt.processing.voice import Voice
from ming_trt.runtime.audio_stream import SeamlessStream
from ming_trt.runtime.detokenizer import Detokenizer
from ming_trt.runtime.engine import Engine, open_engine
from ming_trt.runtime.talker import Talker
from tests.profiles import Profiled
from tests.speech.conftest import CHECKPOINT

SMALLEST = Profile(max_seq_len=256, slots=1, prefill_chunk=24)


def test_the_plan_and_the_runtime_agree_on_a_stream(detokenizer: Detokenizer) -> None:
    flow = plan(CHECKPOINT, presets.load("cpu-fp32"), ("flow_encoder", "flow_estimator"))
    frames = fixed_sizes("flow_estimator", SMALLEST)["T"]
    assert stream_bytes(flow.engines) == detokenizer.stream_bytes(frames)
    half = plan(CHECKPOINT, presets.load("rtx"), ("flow_encoder", "flow_estimator"))
    assert stream_bytes(half.engines) == stream_bytes(flow.engines) // 2


def profiled(bundle: Bundle, name: str, engine: Engine) -> Profiled:
    return Profiled(engine, phases(name, SMALLEST, bundle.component(name).facts), fixed_sizes(name, SMALLEST))


@pytest.mark.parametrize("chunked", [True, False])
def test_streams_and_whole_pieces(bundle: Bundle, detokenizer: Detokenizer, voice: Voice, chunked: bool) -> None:
    engines = {name: profiled(bundle, name, open_engine(bundle, name, threads=1)) for name in Detokenizer.ENGINES}
    decoder = Detokenizer(engines, {name: bundle.component(name).facts for name in engines})
    codes = np.random.default_rng(0).integers(0, decoder.vocabulary, 90).tolist()
    heard = []
    for each in (decoder, detokenizer):
        stream = SeamlessStream(each, voice, np.random.default_rng(0), chunked=chunked)
        heard.append(np.concatenate([*stream.push(codes), stream.finish()]))
    assert np.array_equal(*heard)
    assert all(engine.runs for engine in engines.values())
    assert {shapes["z"][0] for shapes in engines["flow_estimator"].runs} == {2}


def test_a_long_prompt_is_read_in_chunks(
    bundle: Bundle, talker: Talker, entries: S3Bpe, cases: Cases, voice: Voice
) -> None:
    """It says what it says after a prompt that is read at once: the draws are the same, logits differ in last bits."""
    tokens = TalkerTokens.by_position(cases.index["talker"]["audio_offset"])
    thinker = np.random.default_rng(1).standard_normal((150, talker.thinker_width)).astype(np.float32)
    prompt = talker_prompt(tokens, entries.encode(voice.codes.tolist()), [1, 2, 3], list(range(4, 24)), len(thinker))
    assert len(prompt) > 128, "one tile, the least that a profile takes"
    engine = profiled(bundle, "talker", talker._engine)
    said = [
        list(Talker(each, entries, tokens, 30, chunk).codes(prompt, voice.speaker, thinker, np.random.default_rng(3)))
        for each, chunk in ((talker._engine, 0), (engine, SMALLEST.prefill_chunk))
    ]
    assert said[0] == said[1] and len(said[0]) > 5
    read = [shapes["audio_ids"][1] for shapes in engine.runs]
    chunks = -(-len(prompt) // 24)
    assert read[:chunks] == [24] * (chunks - 1) + [len(prompt) - 24 * (chunks - 1)] and set(read[chunks:]) == {1}
    # the language model's rows go with the prompt only
    assert {shapes["thinker"][0] for shapes in engine.runs[:chunks]} == {150}
    assert {shapes["thinker"][0] for shapes in engine.runs[chunks:]} == {1}
