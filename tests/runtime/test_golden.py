"""The LLM service and the pipeline on engines built from the reference checkpoint: the reference's greedy tokens."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from builders.component import ExportOptions
from builders.registry import component
from ming_trt.bundle import Bundle, ComponentEntry, Manifest
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import MingConfig, load_config
from ming_trt.errors import EngineError, InputError
from ming_trt.golden.cases import Cases
from ming_trt.golden.tokenizer import ByteTokenizer
from ming_trt.presets import Preset, Profile
from ming_trt.processing.prepare import index_features
from ming_trt.processing.request import Sampling, parse_request
from ming_trt.runtime.engine import Engine, open_engine
from ming_trt.runtime.events import HiddenEvent
from ming_trt.runtime.generator import LLM
from ming_trt.runtime.pipeline import Pipeline
from ming_trt.runtime.sequence import GenerationRequest, LLMOptions
from ming_trt.runtime.stages import AudioEncoder, VisionEncoder

DATA = Path(__file__).parent.parent / "data" / "golden" / "understanding"
FOLDER = Path(os.environ.get("MING_TRT_TEST_UNDERSTANDING", DATA))
ENGINES = ("vision_encoder", "audio_encoder", "llm")
CASES = ["text", "image", "video", "audio", "image_audio", "two_images"]


@pytest.fixture(scope="module")
def cases() -> Cases:
    return Cases(FOLDER)


@pytest.fixture(scope="module")
def config() -> MingConfig:
    return load_config(FOLDER / "checkpoint")


@pytest.fixture(scope="module")
def bundle(cases: Cases, config: MingConfig, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle as `ming-trt build` leaves it, of the three engines, with a tokenizer file."""
    checkpoint, path = Checkpoint(FOLDER / "checkpoint"), tmp_path_factory.mktemp("bundle")
    entries = {}
    for name in ENGINES:
        (path / name).mkdir()
        component(name).export(config, checkpoint, path / name, ExportOptions())
        entries[name] = ComponentEntry(name, "onnxruntime", "fp32", f"{name}/model.onnx")
    (path / "assets").mkdir()
    shutil.copy(FOLDER / "checkpoint" / "config.json", path / "assets")
    (path / "assets" / "tokenizer.json").write_text(tokenizer_json(ByteTokenizer.from_cases(cases.index)))
    preset = Preset("test", threads=1, profile=Profile(max_seq_len=2048, slots=4, prefill_chunk=64))
    manifest = Manifest({"name": "golden"}, "onnxruntime", preset, {}, {}, {}, entries)
    (path / "manifest.json").write_text(manifest.to_json())
    return Bundle.open(path)


def tokenizer_json(codec: ByteTokenizer) -> str:
    """The cases' rule as the tokenizer file of a checkpoint: a token per byte, no merges."""
    symbols = {chr(byte): byte for byte in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]}
    rest = [byte for byte in range(256) if byte not in symbols.values()]
    symbols |= {chr(0x100 + i): byte for i, byte in enumerate(rest)}
    vocabulary = {symbol: codec.byte_offset + byte for symbol, byte in symbols.items()}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": number, "content": text, **flags} for text, number in codec.special_tokens.items()]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "vocab": vocabulary | dict(codec.special_tokens), "merges": []}
    return json.dumps(
        {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model}
    )


@pytest.fixture(scope="module")
def engines(bundle: Bundle) -> Iterator[dict[str, Engine]]:
    made = {name: open_engine(bundle, name, threads=1) for name in ENGINES}
    yield made
    for engine in made.values():
        engine.close()


@pytest.fixture(scope="module")
def vision(engines: dict[str, Engine], config: MingConfig) -> VisionEncoder:
    return VisionEncoder(engines["vision_encoder"], config)


@pytest.fixture(scope="module")
def audio(engines: dict[str, Engine], config: MingConfig) -> AudioEncoder:
    return AudioEncoder(engines["audio_encoder"], config)


@pytest.fixture(scope="module")
def requests(
    cases: Cases, config: MingConfig, vision: VisionEncoder, audio: AudioEncoder
) -> dict[str, GenerationRequest]:
    """The prompt of each case, with rows from the built encoders."""
    return {name: request_of(cases, config, vision, audio, f"llm.{name}") for name in CASES}


def request_of(
    cases: Cases, config: MingConfig, vision: VisionEncoder, audio: AudioEncoder, case: str
) -> GenerationRequest:
    ids = cases.array(f"{case}.input_ids")
    entry = next(entry for entry in cases.index["cases"] if entry["id"] == case)
    rows = []
    for source in entry["inputs"]:
        if source.endswith(".pixel_values"):
            rows.append(vision(cases.array(source), cases.array(source.replace("pixel_values", "grid_thw"))))
        elif source.endswith(".mel"):
            mel = cases.array(source)
            rows.append(audio(mel, np.array([len(mel)])))
    modality, index = index_features(ids, config.tokens)
    first = int(cases.array(f"{case}.decode_positions")[0])
    return GenerationRequest(
        ids,
        modality=modality,
        positions=cases.array(f"{case}.position_ids"),
        position_delta=first - len(ids),
        feature_index=index,
        features=np.concatenate(rows) if rows else None,
        sampling=Sampling(max_tokens=cases.array(f"{case}.generated_ids").size),
    )


def expected(cases: Cases, name: str) -> list[int]:
    return cases.array(f"llm.{name}.generated_ids").tolist()


def options(**changes: int) -> LLMOptions:
    return LLMOptions(**{"max_seq_len": 2048, **changes})


@pytest.mark.parametrize("chunk", [7, 512])
@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_of_the_reference(
    cases: Cases, engines: dict[str, Engine], requests: dict[str, GenerationRequest], name: str, chunk: int
) -> None:
    with LLM(engines["llm"], options(prefill_chunk=chunk)) as llm:
        assert llm.submit(requests[name]).result()[0] == expected(cases, name)


@pytest.mark.parametrize("slots", [2, 4])
def test_requests_that_decode_together_get_the_reference_tokens(
    cases: Cases, engines: dict[str, Engine], requests: dict[str, GenerationRequest], slots: int
) -> None:
    with LLM(engines["llm"], options(slots=slots, prefill_chunk=16)) as llm:
        handles = {name: llm.submit(requests[name]) for name in CASES}
        for name, handle in handles.items():
            assert handle.result()[0] == expected(cases, name), name


def test_rows_that_are_not_finite_end_their_request_only(
    cases: Cases, engines: dict[str, Engine], requests: dict[str, GenerationRequest]
) -> None:
    """The experts, too, must survive a row that is not a number."""
    good = requests["image"]
    bad = dataclasses.replace(good, features=np.full_like(good.features, np.nan))
    with LLM(engines["llm"], options(slots=2)) as llm:
        handles = [llm.submit(request) for request in (good, bad, bad, good)]
        for handle in handles[1:3]:
            with pytest.raises(EngineError, match="not finite"):
                handle.result()
        for handle in (handles[0], handles[3]):
            assert handle.result()[0] == expected(cases, "image")


def test_the_prefill_rows_are_the_references(
    cases: Cases, engines: dict[str, Engine], requests: dict[str, GenerationRequest]
) -> None:
    request = dataclasses.replace(requests["image_audio"], sampling=Sampling(max_tokens=0), want_hidden="all")
    with LLM(engines["llm"], options(prefill_chunk=16)) as llm:
        event = next(iter(llm.submit(request)))
    assert isinstance(event, HiddenEvent)
    cases.check("llm.image_audio.prefill_hidden", event.hidden)
    cases.check("llm.image_audio.inputs_embeds", event.embeds)


def test_rows_do_not_depend_on_how_pictures_are_grouped(
    cases: Cases, vision: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, grid = cases.array("vision.pair.pixel_values"), cases.array("vision.pair.grid_thw")
    cases.check("vision.pair.embeds", vision(pixels, grid))
    monkeypatch.setattr("ming_trt.runtime.stages.PLACES", 1)
    cases.check("vision.pair.embeds", vision(pixels, grid))


def test_clips_do_not_depend_on_each_other(cases: Cases, audio: AudioEncoder) -> None:
    mel = cases.array("proc.audio.clip0.mel")
    whole = audio(mel, np.array([len(mel)]))
    both = audio(np.concatenate([mel[:50], mel]), np.array([50, len(mel)]))
    np.testing.assert_array_equal(both[13:], whole)


class Untouchable:
    """An engine that must not run."""

    name, inputs, outputs = "none", {}, {}  # type: ignore[var-annotated]

    def run(self, *_: Any) -> Any:
        raise AssertionError("the engine ran")

    def close(self) -> None:
        """Nothing to free."""


def test_without_a_modality_its_engine_does_not_run(config: MingConfig) -> None:
    hidden = config.llm.hidden_size
    pixels, grid = np.zeros((0, 1176), np.float32), np.zeros((0, 3), np.int32)
    mel, lengths = np.zeros((0, 128), np.float32), np.zeros(0, np.int32)
    for rows in (VisionEncoder(Untouchable(), config)(pixels, grid), AudioEncoder(Untouchable(), config)(mel, lengths)):
        assert rows.shape == (0, hidden) and rows.dtype == np.float32


def test_media_above_the_limits_are_refused(config: MingConfig) -> None:
    pixels, grid = np.zeros((16, 1176), np.float32), np.array([[1, 4, 4]], np.int32)
    with pytest.raises(InputError, match="4 tokens and the limit is 3"):
        VisionEncoder(Untouchable(), config, max_tokens=3)(pixels, grid)
    with pytest.raises(InputError, match="15 patches came with grids of 16"):
        VisionEncoder(Untouchable(), config)(pixels[1:], grid)
    mel = np.zeros((20, 128), np.float32)
    with pytest.raises(InputError, match="20 mel frames"):
        AudioEncoder(Untouchable(), config, max_frames=19)(mel, np.array([20]))
    with pytest.raises(InputError, match="limit"):
        length = config.audio.max_frames + 1
        AudioEncoder(Untouchable(), config)(np.zeros((length, 128), np.float32), np.array([length]))
    for lengths in ([19], [20, 0], [21, -1]):
        with pytest.raises(InputError, match="must add up"):
            AudioEncoder(Untouchable(), config)(mel, np.array(lengths))


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(bundle.path) as pipeline:
        yield pipeline


def media(cases: Cases) -> tuple[bytes, bytes]:
    """The end-to-end case's picture as a PNG and its sound as a WAV, both lossless."""
    picture, sound = io.BytesIO(), io.BytesIO()
    Image.fromarray(cases.array("proc.image.tiny.raw")).save(picture, "PNG")
    soundfile.write(sound, cases.array("proc.audio.clip0.waveform").reshape(-1), 16000, format="WAV", subtype="FLOAT")
    return picture.getvalue(), sound.getvalue()


def question(text: str, *kinds: str, **sampling: Any) -> Any:
    content = [{"type": kind} if kind in ("image", "audio") else {"type": "text", "text": text} for kind in kinds]
    return parse_request({"messages": [{"role": "user", "content": content}], "sampling": sampling})


def test_files_to_text(cases: Cases, pipeline: Pipeline) -> None:
    wanted = cases.array("e2e.generated_ids").tolist()
    request = question("Look and listen.", "image", "text", "audio", max_tokens=len(wanted))
    picture, sound = media(cases)
    assert pipeline.processor.prepare(request, [picture], [], [sound]).input_ids.tolist() == (
        cases.array("e2e.input_ids").reshape(-1).tolist()
    )
    answer = pipeline.answer(request, [picture], [], [sound])
    assert list(answer.token_ids) == wanted
    assert answer.text == pipeline.processor.tokenizer.decode(wanted)
    assert answer.finish.usage.prompt_tokens == cases.array("e2e.input_ids").size


def test_several_threads_get_what_one_gets(cases: Cases, pipeline: Pipeline) -> None:
    picture, sound = media(cases)
    asked = [
        (question("Tell me more.", "text", max_tokens=24), [], []),
        (question("What is this?", "image", "text", max_tokens=20), [picture], []),
        (question("", "audio", max_tokens=16), [], [sound]),
        (question("Look and listen.", "image", "text", "audio", max_tokens=30), [picture], [sound]),
    ]
    alone = [pipeline.answer(request, images, [], audios) for request, images, audios in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda item: pipeline.answer(item[0], item[1], [], item[2]), asked))
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert [each.text for each in together] == [each.text for each in alone]


def test_leaving_a_stream_frees_its_slot(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    engine = pipeline.llm._engine
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda *a: steps.append(1) or run(*a))  # type: ignore[func-returns-value]
    endless = question("Go on for ever.", "text", max_tokens=1900, ignore_eos=True)
    for _ in range(2 * pipeline.llm.options.slots):
        stream = pipeline.stream(endless)
        assert next(stream).token_ids
        stream.close()  # type: ignore[attr-defined]
    assert len(pipeline.answer(question("Still there?", "text", max_tokens=3)).token_ids) == 3
    assert len(steps) < 2 * 1900, "eight such answers in four slots would take that many"


def test_a_prompt_that_is_too_long_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="2047"):
        pipeline.answer(question("long " * 500, "text"))


def test_a_stop_string_ends_the_text(pipeline: Pipeline) -> None:
    free = pipeline.answer(question("Tell me more.", "text", max_tokens=24))
    stop = free.text[4:6]
    cut = pipeline.answer(question("Tell me more.", "text", max_tokens=24, stop=[stop]))
    assert cut.finish.reason == "stop" and cut.text == free.text[: free.text.index(stop)]
