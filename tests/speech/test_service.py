"""Text to audio: order, overlap, back-pressure, cancellation, the contract, and what cannot be spoken."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from ming_trt.errors import CancelledError, EngineError, InputError, UnavailableError
from ming_trt.golden.cases import Cases
from ming_trt.golden.tokenizer import ByteTokenizer
from ming_trt.processing.s3_bpe import S3Bpe
from ming_trt.processing.speech_text import MAX_TEXT, Piece, pieces
from ming_trt.processing.voice import Voice
from ming_trt.runtime import speech as service
from ming_trt.runtime.audio_contract import AudioContract, to_pcm
from ming_trt.runtime.detokenizer import Detokenizer
from ming_trt.runtime.speech import CHUNKS_AHEAD, PIECES_AHEAD, Speech
from ming_trt.runtime.talker import Talker, choose
from ming_trt.runtime.voices import Voices

TEXT = "今天天气很好，我们一起出去走一走吧。明天可能会下雨，请记得带伞！"


@pytest.fixture(scope="module")
def speech(talker: Talker, detokenizer: Detokenizer, entries: S3Bpe, cases: Cases) -> Speech:
    return Speech(talker, detokenizer, ByteTokenizer(cases.index["talker"]["special_tokens"]), entries)


@pytest.fixture(autouse=True)
def loud_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference checkpoint's random vocoder touches its limit more often than speech may."""
    monkeypatch.setattr("ming_trt.runtime.audio_contract.MOST_CLIPPED", 1.0)


def test_pieces_come_in_order_and_repeatably(speech: Speech, voice: Voice) -> None:
    first = list(speech.read(TEXT, voice, seed=3))
    again = list(speech.read(TEXT, voice, seed=3))
    assert [chunk.piece for chunk in first] == sorted(chunk.piece for chunk in first)
    ends = [chunk for chunk in first if chunk.last]
    assert len(ends) == len({chunk.piece for chunk in first}) == len(pieces(TEXT)) == 2
    for end in ends:
        samples = sum(chunk.audio.size for chunk in first if chunk.piece == end.piece)
        assert samples == end.codes * 480
    assert all(np.array_equal(a.audio, b.audio) for a, b in zip(first, again, strict=True))
    other = np.concatenate([chunk.audio for chunk in speech.read(TEXT, voice, seed=4)])
    assert not np.array_equal(other, np.concatenate([chunk.audio for chunk in first]))


def test_thinker_rows_change_what_is_said(speech: Speech, voice: Voice, cases: Cases) -> None:
    rows = cases.array("talker.thinker")
    plain, told = (list(speech.read("好的。", voice, thinker=k, seed=1)) for k in (None, rows))
    assert not np.array_equal(plain[0].audio[:4800], told[0].audio[:4800])


def test_audio_starts_before_the_text_ends(speech: Speech, voice: Voice) -> None:
    heard = threading.Event()

    def text() -> Iterator[Piece]:
        yield Piece("第一句话。", True)
        assert heard.wait(60), "no audio while the text was still coming"
        yield Piece("第二句话。", False)

    numbers = []
    for chunk in speech.speak(text(), voice):
        heard.set()
        numbers.append(chunk.piece)
    assert set(numbers) == {0, 1}


def test_a_slow_listener_stops_the_talker(speech: Speech, voice: Voice) -> None:
    taken = []

    def text() -> Iterator[Piece]:
        for number in range(40):
            taken.append(number)
            yield Piece("好。", False)

    chunks = speech.speak(text(), voice)
    next(chunks)
    before = -1
    while before != len(taken):
        before = len(taken)
        time.sleep(1.0)
    # heard, waiting for the listener, held by the decoder, waiting for it, held by the talker, and one just asked for
    assert before <= 1 + CHUNKS_AHEAD + 1 + PIECES_AHEAD + 1 + 1
    chunks.close()


@pytest.mark.parametrize("how", ["board", "listener"])
def test_cancellation_stops_everything(speech: Speech, voice: Voice, how: str) -> None:
    before = {thread.name for thread in threading.enumerate()}
    flag = threading.Event()
    text = (Piece("好。", False) for _ in range(10**6))
    chunks = speech.speak(text, voice, cancelled=flag.is_set)
    next(chunks)
    if how == "board":
        flag.set()
        with pytest.raises(CancelledError):
            for _ in chunks:
                pass
    else:
        chunks.close()
    deadline = time.monotonic() + 20
    while {t.name for t in threading.enumerate()} & {"talker", "decoder"} - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not {t.name for t in threading.enumerate()} & {"talker", "decoder"} - before


def test_errors_arrive(speech: Speech, voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    def text() -> Iterator[Piece]:
        yield Piece("好。", False)
        raise InputError("the text broke")

    with pytest.raises(InputError, match="broke"):
        list(speech.speak(text(), voice))
    monkeypatch.setattr(service, "talker_prompt", lambda *_: 1 / 0)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        list(speech.read("好。", voice))


@pytest.mark.parametrize(
    ("text", "message"), [("", "nothing"), ("😀🎉", "nothing"), ("好" * (MAX_TEXT + 1), "5001 characters")]
)
def test_texts_that_cannot_be_read(speech: Speech, voice: Voice, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        speech.read(text, voice)


def test_voices(voice: Voice) -> None:
    voices = Voices({"luna_v2": voice, "eng_v2": voice})
    assert voices.named("luna", "x") is voices.named("luna_v2", "x") is voice
    assert voices.named(None, "你好") is voice
    with pytest.raises(InputError, match="no voice 'bob': choose one of luna_v2, eng_v2"):
        voices.named("bob", "x")
    with pytest.raises(UnavailableError, match="no voices"):
        Voices({}).named(None, "x")
    noise = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    with pytest.raises(UnavailableError, match=r"campplus\.onnx"):
        voices.from_clip(noise, "text")
    with pytest.raises(InputError, match="needs the text"):
        voices.from_clip(noise, " ")


def test_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ming_trt.runtime.audio_contract.MOST_CLIPPED", 0.05)
    rng = np.random.default_rng(0)
    good = 0.1 * rng.standard_normal(24000).astype(np.float32)

    def closed(audio: np.ndarray, codes: int) -> None:
        contract = AudioContract(24000)
        contract.add(audio)
        contract.close(codes)

    closed(good, 50)
    for audio, codes, message in (
        (np.full(10, np.nan, np.float32), 1, "not finite"),
        (good, 80, "must last 1.60 s"),
        (good[:0], 5, "must last"),
        (good * 1e-5, 50, "silent"),
        (np.clip(good * 100, -0.99, 0.99), 50, "clipped"),
    ):
        with pytest.raises(EngineError, match=message):
            closed(audio, codes)
    assert to_pcm(np.array([0, 1, -1, 1.1], np.float32)).tolist() == [0, 32767, -32767, 32767]


def test_choice(talker: Talker) -> None:
    """Never a text id, never the end in the first steps, and a draw of zero does no harm."""
    tokens, rng = talker.tokens, np.random.default_rng(0)
    for step in range(60):
        logits = rng.standard_normal(tokens.first_audio + 160).astype(np.float32)
        logits[: tokens.first_audio] += 3
        draws = rng.standard_exponential(logits.size).astype(np.float32)
        draws[rng.integers(draws.size, size=20)] = 0
        token = choose(logits, step, tokens, draws)
        assert token >= tokens.first_audio or (token == tokens.audio_eos and step >= 10)
    with pytest.raises(EngineError, match="not finite"):
        choose(np.full_like(logits, np.nan), 0, tokens, draws)
