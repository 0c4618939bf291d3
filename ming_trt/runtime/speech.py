"""Text to speech while the text still comes: the talker, the decoder and the listener work at the same time.

One thread reads pieces of text and lets the talker make codes, a second turns codes into audio, and whoever iterates
takes it. Each waits for the next when that one is slow: at most `PIECES_AHEAD` pieces and `CHUNKS_AHEAD` chunks exist
that nobody took yet. Leaving the iteration, a cancellation and a failure stop all of them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from queue import Empty, Full, Queue, SimpleQueue
from time import perf_counter
from typing import TypeVar

import numpy as np

from ming_trt.bundle import Bundle
from ming_trt.errors import CancelledError, EngineError, MingError
from ming_trt.processing.s3_bpe import S3Bpe
from ming_trt.processing.speech_text import Piece, pieces_to_read
from ming_trt.processing.talker_prompt import TalkerTokens, talker_prompt
from ming_trt.processing.tokenizer import TextCodec, Tokenizer
from ming_trt.processing.voice import Voice
from ming_trt.runtime.audio_contract import AudioContract
from ming_trt.runtime.audio_stream import SeamlessStream
from ming_trt.runtime.detokenizer import Detokenizer, Floats
from ming_trt.runtime.engine import open_engine
from ming_trt.runtime.speech_clock import Lane, Path
from ming_trt.runtime.talker import Talker, never
from ming_trt.runtime.voices import Voices

log = logging.getLogger(__name__)
T = TypeVar("T")

PIECES_AHEAD = 2
CHUNKS_AHEAD = 4
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class SpeechChunk:
    """`audio` f32 [n] of piece number `piece`, whose text is `text`. `seconds` since the speech was asked for; `last`:
    the piece ends with it, after `codes` codes."""

    audio: Floats
    piece: int
    text: str
    seconds: float
    last: bool = False
    codes: int = 0


@dataclass(slots=True)
class _Utterance:
    """A piece on its way: the talker puts codes, then None, or the error that ended it; with each the time's path."""

    number: int
    piece: Piece
    path: Path
    codes: SimpleQueue[tuple[list[int] | None, Path] | MingError] = field(default_factory=SimpleQueue)


class Speech:
    """Speaks with one talker and one decoder, for any number of requests at once."""

    def __init__(self, talker: Talker, detokenizer: Detokenizer, codec: TextCodec, entries: S3Bpe) -> None:
        self._talker, self._detokenizer, self._codec, self._entries = talker, detokenizer, codec, entries

    @property
    def sample_rate(self) -> int:
        """Samples a second of all audio."""
        return self._detokenizer.sample_rate

    def read(
        self,
        text: str,
        voice: Voice,
        *,
        thinker: Floats | None = None,
        seed: int = 0,
        cancelled: Callable[[], bool] = never,
    ) -> Iterator[SpeechChunk]:
        """Speaks a whole text. Raises `InputError` if nothing in it can be spoken, or if it is too long."""
        return self.speak(pieces_to_read(text), voice, thinker=thinker, seed=seed, cancelled=cancelled)

    def speak(
        self,
        text: Iterable[Piece],
        voice: Voice,
        *,
        thinker: Floats | None = None,
        seed: int = 0,
        cancelled: Callable[[], bool] = never,
        lane: Lane | None = None,
    ) -> Iterator[SpeechChunk]:
        """Speaks pieces as they come; chunks follow in order and end with `last` for each piece.

        `thinker` f32 [R, H] are the LLM's rows of the prompt. `lane` is that of who iterates: with each chunk its path
        tells what the time went into. Equal seeds, pieces and voices give equal audio. Raises `CancelledError`, and
        what the talker, the decoder, the audio's contract or the iteration of `text` raise.
        """
        return _Run(self, text, voice, thinker, seed, cancelled, lane or Lane()).chunks()

    def codes(
        self,
        piece: Piece,
        voice: Voice,
        thinker: Floats | None,
        random: np.random.Generator,
        cancelled: Callable[[], bool],
    ) -> Iterator[list[int]]:
        """The talker's codes for one piece."""
        prompt = talker_prompt(
            self._talker.tokens,
            self._entries.encode(voice.codes.tolist()),
            self._codec.encode(voice.text, special=False),
            self._codec.encode(piece.text, special=False),
            0 if thinker is None else len(thinker),
        )
        return self._talker.codes(prompt, voice.speaker, thinker, random, cancelled)

    def stream(
        self, piece: Piece, voice: Voice, random: np.random.Generator, lap: Callable[[str], None]
    ) -> SeamlessStream:
        """The decoder's side of one piece; `lap` is told what was done."""
        return SeamlessStream(self._detokenizer, voice, random, chunked=piece.stream, lap=lap)


class _Run:
    """One call of `Speech.speak`."""

    def __init__(
        self,
        speech: Speech,
        text: Iterable[Piece],
        voice: Voice,
        thinker: Floats | None,
        seed: int,
        cancelled: Callable[[], bool],
        lane: Lane,
    ) -> None:
        self._speech, self._text, self._voice, self._thinker = speech, text, voice, thinker
        self._seed, self._cancelled = seed, cancelled
        self._stop = threading.Event()
        self._started = perf_counter()
        self._pieces: Queue[_Utterance | MingError | None] = Queue(PIECES_AHEAD)
        self._chunks: Queue[tuple[SpeechChunk, Path] | MingError | None] = Queue(CHUNKS_AHEAD)
        self._listener, self._talker, self._decoder = lane, Lane(lane.path), Lane(lane.path)

    def chunks(self) -> Iterator[SpeechChunk]:
        threads = [
            threading.Thread(target=self._talk, name="talker", daemon=True),
            threading.Thread(target=self._decode, name="decoder", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            while (found := self._take(self._chunks)) is not None:
                if isinstance(found, MingError):
                    raise found
                chunk, path = found
                self._listener.took(path)
                yield chunk
                self._listener.lap("listener")
        finally:
            self._stop.set()

    def _stopped(self) -> bool:
        return self._stop.is_set() or self._cancelled()

    def _talk(self) -> None:
        """Text to codes. An error travels on in the place of what it prevented."""
        lane = self._talker
        try:
            for number, piece in enumerate(self._text):
                lane.lap("text")
                utterance = _Utterance(number, piece, lane.path)
                ahead = self._pieces.full()
                self._put(self._pieces, utterance)
                if ahead:
                    lane.took(self._decoder.path)
                try:
                    random = np.random.default_rng([self._seed, number, 0])
                    for codes in self._speech.codes(piece, self._voice, self._thinker, random, self._stopped):
                        lane.lap("talker")
                        utterance.codes.put((codes, lane.path))
                    lane.lap("talker")
                    utterance.codes.put((None, lane.path))
                except MingError as error:
                    utterance.codes.put(error)
                    return
                except Exception as error:
                    log.exception("the talker's thread failed")
                    utterance.codes.put(_internal(error))
                    return
            self._put(self._pieces, None)
        except MingError as error:
            self._put_error(self._pieces, error)
        except Exception as error:
            log.exception("the talker's thread failed")
            self._put_error(self._pieces, _internal(error))

    def _decode(self) -> None:
        """Codes to audio."""
        try:
            while (utterance := self._take(self._pieces)) is not None:
                if isinstance(utterance, MingError):
                    raise utterance
                self._render(utterance)
            self._put(self._chunks, None)
        except MingError as error:
            self._put_error(self._chunks, error)
        except Exception as error:
            log.exception("the decoder's thread failed")
            self._put_error(self._chunks, _internal(error))

    def _render(self, utterance: _Utterance) -> None:
        number, piece, lane = utterance.number, utterance.piece, self._decoder
        lane.took(utterance.path)
        stream = self._speech.stream(piece, self._voice, np.random.default_rng([self._seed, number, 1]), lane.lap)
        contract = AudioContract(self._speech.sample_rate)

        def send(audio: Floats, last: bool) -> None:
            contract.add(audio)
            if last:
                contract.close(stream.codes)
            seconds = perf_counter() - self._started
            chunk = SpeechChunk(audio, number, piece.text, seconds, last, stream.codes if last else 0)
            lane.lap("vocoder")
            ahead = self._chunks.full()
            self._put(self._chunks, (chunk, lane.path))
            if ahead:
                lane.took(self._listener.path)

        while True:
            found = self._take(utterance.codes)
            if isinstance(found, MingError):
                raise found
            codes, path = found
            lane.took(path)
            if codes is None:
                break
            for audio in stream.push(codes):
                send(audio, last=False)
        send(stream.finish(), last=True)

    # Queues are waited for in short turns, so that a stop is noticed by whoever waits.

    def _take(self, queue: Queue[T] | SimpleQueue[T]) -> T:
        while True:
            if self._stopped():
                raise CancelledError("the speech was stopped: its client cancelled the request or has gone")
            try:
                return queue.get(timeout=_POLL_SECONDS)
            except Empty:
                continue

    def _put(self, queue: Queue[T], item: T) -> None:
        while True:
            if self._stopped():
                raise CancelledError("the speech was stopped: its client cancelled the request or has gone")
            try:
                queue.put(item, timeout=_POLL_SECONDS)
                return
            except Full:
                continue

    def _put_error(self, queue: Queue[T | MingError | None], error: MingError) -> None:
        """An error must arrive unless nobody listens any more."""
        while not self._stop.is_set():
            try:
                queue.put(error, timeout=_POLL_SECONDS)
                return
            except Full:
                continue


def _internal(error: Exception) -> EngineError:
    """For what should not have happened; the traceback stands in the log."""
    return EngineError(f"speech failed ({type(error).__name__}: {error}): look into the server's log")


def open_speech(bundle: Bundle) -> tuple[Speech, Voices]:
    """The bundle's speech path and its voices. Raises `BundleError`, `EngineError`, `CheckpointError`, or `ConfigError`
    for a `flow_budget` in which no stream has room."""
    threads = bundle.preset.threads
    engines = {name: open_engine(bundle, name, threads=threads, finite=outputs) for name, outputs in _ENGINES.items()}
    facts = {name: bundle.component(name).facts for name in _ENGINES}
    folder = bundle.assets / "talker"
    codec, entries = Tokenizer.from_checkpoint(folder), S3Bpe(folder / "s3_bpe")
    tokens = TalkerTokens.of(codec, int(facts["talker"]["text_vocab"]))
    detokenizer = Detokenizer(engines, facts, bundle.preset.flow_budget)
    talker = Talker(engines["talker"], entries, tokens, chunk=bundle.preset.profile.prefill_chunk)
    return Speech(talker, detokenizer, codec, entries), Voices.of_assets(bundle.assets, detokenizer.mel)


_ENGINES = {
    "talker": ("logits",),
    "flow_encoder": ("mu",),
    "flow_estimator": ("velocity",),
    "f0_predictor": ("f0",),
    "vocoder": ("audio",),
}
