"""The speech engines of the reference checkpoint, built once for all tests here."""

from __future__ import annotations

from pathlib import Path

import pytest

from ming_trt.bundle import Bundle
from ming_trt.golden.cases import Cases
from ming_trt.processing.s3_bpe import S3Bpe
from ming_trt.processing.talker_prompt import TalkerTokens
from ming_trt.processing.voice import Voice, load_voice
from ming_trt.runtime.detokenizer import Detokenizer
from ming_trt.runtime.engine import open_engine
from ming_trt.runtime.talker import Talker

GENERATION = Path(__file__).parents[1] / "data" / "golden" / "generation"
CHECKPOINT = GENERATION / "checkpoint"


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle where `ming-trt golden` would build it."""
    from builders.build import Options, build
    from ming_trt import presets

    folder = tmp_path_factory.mktemp("speech")
    preset = presets.load(presets.default_name(None))
    report = build(Options(CHECKPOINT, folder / "bundle-3D", preset, only=("talker", *Detokenizer.ENGINES)))
    assert report.ok, report.as_dict()
    return folder


@pytest.fixture(scope="session")
def cases() -> Cases:
    return Cases(GENERATION)


@pytest.fixture(scope="session")
def voice() -> Voice:
    return load_voice(GENERATION / "voice.pt")


@pytest.fixture(scope="session")
def entries() -> S3Bpe:
    return S3Bpe(CHECKPOINT / "talker" / "s3_bpe")


@pytest.fixture(scope="session")
def bundle(work: Path) -> Bundle:
    return Bundle.open(work / "bundle-3D")


@pytest.fixture(scope="session")
def detokenizer(bundle: Bundle) -> Detokenizer:
    engines = {name: open_engine(bundle, name, threads=1) for name in Detokenizer.ENGINES}
    return Detokenizer(engines, {name: bundle.component(name).facts for name in engines})


@pytest.fixture(scope="session")
def talker(bundle: Bundle, entries: S3Bpe, cases: Cases) -> Talker:
    tokens = TalkerTokens.by_position(cases.index["talker"]["audio_offset"])
    return Talker(open_engine(bundle, "talker", threads=1), entries, tokens, max_steps=150)
