"""Speech at true width with few layers: time to first audio, real-time factor, and flow + vocoder against torch.

    python benchmarks/speech.py [--threads N] [--seconds S] [--steps N] [--requests N]

All sides run the same runtime (prompt, sampling, chunks, queues); only what computes a step differs: the engines of
preset cpu-int8 on ONNX Runtime (the flow's estimator in 8 bits, the rest in float32), all of them in float32, or the
torch modules with the same weights.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from harness import CACHE, Measurement, Row, Work, against, arguments, cores, finish, interleave, measure_ceiling

from builders import registry
from builders.build import Options, build
from builders.code import code_version
from ming_trt import presets
from ming_trt.bundle import Bundle
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import load_config
from ming_trt.errors import MingError
from ming_trt.mini import speech as mini
from ming_trt.mini import write_mini
from ming_trt.models import ops
from ming_trt.processing.s3_bpe import S3Bpe
from ming_trt.processing.speech_text import Piece
from ming_trt.processing.talker_prompt import TalkerTokens
from ming_trt.processing.tokenizer import Tokenizer
from ming_trt.processing.voice import Voice
from ming_trt.runtime import talker as talker_runtime
from ming_trt.runtime.audio_stream import SeamlessStream
from ming_trt.runtime.detokenizer import STEPS, Detokenizer
from ming_trt.runtime.engine import Array, Arrays, Engine
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine
from ming_trt.runtime.speech import Speech
from ming_trt.runtime.talker import Talker
from ming_trt.runtime.voices import Voices
from ming_trt.speech_config import FlowConfig, TalkerConfig

TARGET = 1.5
OURS, EXACT, EAGER = "ours, estimator int8", "ours, float32", "torch eager, float32"
ENGINES = ("talker", *Detokenizer.ENGINES)
ESTIMATOR = "flow_estimator"
CONCURRENT = (1, 2, 4)
CODES = 150
"""Codes of the utterance that flow and vocoder turn into audio: 3 s."""
CLOSE = 1e-3
"""Largest difference of a float32 sample from torch's; full scale is 1."""
FAITHFUL = 15.0
"""Least signal over error of the mel that the 8-bit estimator leads to, dB."""
ROUNDS = 2
_TEXT = "Tyler, Lucy, Michelle, we are going to space, and nobody knows when we shall be back."
_DEPTHS = (
    "depths: talker 4 layers of 24 and a vocabulary of 1.3 thousand, flow encoder 2 + 1 of 6 + 4, estimator 2 middle "
    "stages of 12; the vocoder is whole"
)


def main() -> None:
    options = arguments(
        str(__doc__),
        steps={"type": int, "default": 90, "help": "ids that the talker makes for an utterance"},
        requests={"type": int, "default": max(CONCURRENT), "help": "at most so many at once"},
    )
    threads = cores(options.threads)
    torch.set_num_threads(threads)
    steps = 30 if options.tiny else options.steps
    bundle, quantized, checkpoint = true_width(options.tiny)
    facts = {name: bundle.component(name).facts for name in ENGINES}
    exact: dict[str, Engine] = {
        name: OnnxRuntimeEngine(bundle.model_path(name), name, threads=threads) for name in ENGINES
    }
    estimator = OnnxRuntimeEngine(quantized.model_path(ESTIMATOR), ESTIMATOR, threads=threads)
    modules = torch_modules(checkpoint)
    eager: dict[str, Engine] = {name: TorchEngine(modules[name], exact[name]) for name in ENGINES}
    sides = {OURS: {**exact, ESTIMATOR: estimator}, EXACT: exact, EAGER: eager}
    decoders = {name: Detokenizer(engines, facts) for name, engines in sides.items()}
    voice = Voices.of_assets(bundle.assets, decoders[EXACT].mel).named(None, _TEXT)
    ceiling = measure_ceiling(threads)
    with caches_in_place():
        rows = flow_and_vocoder(sides, facts, voice, options.seconds, 0 if options.tiny else TARGET)
        with patch.object(talker_runtime, "MIN_STEPS", steps):  # all utterances get equally long
            speakers = {name: speaker(sides[name], decoders[name], bundle, facts, steps) for name in (OURS, EAGER)}
            rows += concurrent(speakers, voice, options.requests)
    finish("speech", rows, options, ceiling, "" if options.tiny else f"RTF: seconds for a second of audio; {_DEPTHS}")


def true_width(tiny: bool) -> tuple[Bundle, Bundle, Path]:
    """The mini checkpoint with a speech path as wide as the official one, its bundle, and one with the estimator in
    8 bits; made unless they are there."""
    flow: FlowConfig = mini.FLOW
    hift, small = mini.HIFT, mini.talker_config
    talker: Callable[[int, int], TalkerConfig] = small
    if not tiny:
        flow = replace(
            flow, width=512, heads=8, feed_forward=2048, encoder_layers=2, up_layers=1, channels=256, time_dim=1024,
            mid_stages=2, transformers=4, estimator_heads=8, estimator_head_dim=64, estimator_feed_forward=1024,
        )  # fmt: skip
        hift = replace(hift, base=512, f0_width=512)

        def talker(text_vocab: int, thinker_hidden: int) -> TalkerConfig:
            return replace(
                small(text_vocab, thinker_hidden), hidden=896, layers=4, heads=14, kv_heads=2, intermediate=4864
            )

    folder = CACHE / ("speech-tiny" if tiny else "speech")
    state = json.dumps([code_version(mini.__name__), repr((flow, hift, talker(0, 0)))])
    mark = folder / "state"
    if not (mark.is_file() and mark.read_text() == state):
        shutil.rmtree(folder, ignore_errors=True)  # of another state of the code
        with patch.multiple(mini, FLOW=flow, HIFT=hift, talker_config=talker):
            write_mini(folder / "checkpoint")
        mark.write_text(state)
    small_profile = presets.load("mini-cpu").profile
    for name, preset, engines in (("bundle", "cpu-fp32", ENGINES), ("bundle-int8", "cpu-int8", (ESTIMATOR,))):
        options = Options(
            folder / "checkpoint", folder / name, replace(presets.load(preset), profile=small_profile), engines
        )
        if not build(options).ok:
            raise SystemExit("the speech engines could not be built: their messages stand above")
    return Bundle.open(folder / "bundle"), Bundle.open(folder / "bundle-int8"), folder / "checkpoint"


def torch_modules(folder: Path) -> dict[str, torch.nn.Module]:
    """The definitions with the checkpoint's weights, by engine name."""
    config, checkpoint = load_config(folder), Checkpoint(folder)
    return {name: registry.component(name).reference(config, checkpoint).eval() for name in ENGINES}


class TorchEngine:
    """A torch module in the place of an engine: same inputs and outputs, caches written in place."""

    def __init__(self, module: Any, like: Engine) -> None:
        self.name, self.inputs, self.outputs = like.name, like.inputs, like.outputs
        self._module = module

    def run(
        self,
        feeds: Mapping[str, Array],
        outputs: Collection[str] | None = None,
        into: Mapping[str, Array] | None = None,
    ) -> Arrays:
        """See `Engine.run`. What is named in `into` was written by `caches_in_place`."""
        with torch.inference_mode():
            values = self._module(*(torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in self.inputs))
        values = dict(zip(self.outputs, values if isinstance(values, tuple) else (values,), strict=True))
        into = into or {}
        for name, array in into.items():
            if values[name].data_ptr() != array.ctypes.data:
                raise SystemExit(f"torch left '{name}' outside the cache: the sides would not do the same work")
        made = [name for name in (self.outputs if outputs is None else outputs) if name not in into]
        return {**into, **{name: values[name].numpy() for name in made}}

    def close(self) -> None:
        """Nothing to free."""


@contextmanager
def caches_in_place() -> Iterator[None]:
    """torch without a copy of the cache in every step, as a serious implementation does it."""

    def update(cache: torch.Tensor, rows: torch.Tensor, write_index: torch.Tensor) -> torch.Tensor:
        start = int(write_index[0])  # here all rows of a batch stand at the same place
        cache[:, :, start : start + rows.shape[2]] = rows
        return cache

    with patch.object(ops, "kv_update", update):
        yield


def decode(decoder: Detokenizer, voice: Voice, codes: Array) -> Array:
    """Audio of `codes` in one part: flow, F0, vocoder."""
    mel = decoder.to_mel(voice, codes, chunked=False, final=True)
    noise = decoder.draw(np.random.default_rng(0), mel.shape[1])
    return decoder.vocode(mel, decoder.pitch(mel), noise).audio


def stream(decoder: Detokenizer, voice: Voice, codes: Array) -> Array:
    """The same in the chunks that are served."""
    one = SeamlessStream(decoder, voice, np.random.default_rng(0))
    chunks = [*one.push(codes.tolist()), one.finish()]
    return np.concatenate(chunks)


def check(decoders: Mapping[str, Detokenizer], run: Callable[..., Array], voice: Voice, codes: Array) -> dict[str, Any]:
    """How far the audio in float32 is from torch's, and the mel of 8 bits from that of float32; ends the script if they
    do not compute the same."""
    exact, eager = (run(decoders[name], voice, codes) for name in (EXACT, EAGER))
    error = float(np.abs(exact - eager).max())
    ours, right = (decoders[name].to_mel(voice, codes, chunked=False, final=True) for name in (OURS, EXACT))
    ratio = float(10 * np.log10(np.square(right - right.mean()).sum() / np.square(ours - right).sum()))
    if not error < CLOSE or np.abs(exact).max() < 0.01 or not ratio > FAITHFUL:
        raise SystemExit(
            f"the audio in float32 differs from torch's by {error:.2g} of full scale, the mel of the 8-bit estimator "
            f"is {ratio:.1f} dB from that of float32: not the same computation"
        )
    return {"error": error, "mel_dB": ratio}


def some_codes(decoder: Detokenizer) -> Array:
    return np.random.default_rng(1).integers(0, decoder.vocabulary, CODES)


def flow_and_vocoder(
    sides: Mapping[str, Mapping[str, Engine]],
    facts: Mapping[str, Mapping[str, Any]],
    voice: Voice,
    seconds: float,
    target: float,
) -> list[Row]:
    """Flow + vocoder over one utterance, at once and in chunks, as preset cpu-int8 builds them and in float32; and how
    long each engine ran while it was decoded at once."""
    rows, length = [], CODES / 50
    watches = {side: {name: Stopwatch(engine) for name, engine in engines.items()} for side, engines in sides.items()}
    decoders = {side: Detokenizer(engines, facts) for side, engines in watches.items()}
    codes = some_codes(decoders[EXACT])
    ways: dict[str, Callable[..., Array]] = {"at once": decode, "in chunks": stream}
    for way, run in ways.items():
        differences = check(decoders, run, voice, codes)
        for watch in (watch for engines in watches.values() for watch in engines.values()):
            watch.seconds.clear()
        work = {name: Clocked(partial(run, decoder, voice, codes)) for name, decoder in decoders.items()}
        times = interleave(dict(work), seconds / 2, repeats=1, warmup=0, settle=False)
        processor = {name: float(np.median(clocked.seconds)) for name, clocked in work.items()}
        for name, kind in ((OURS, "estimator int8"), (EXACT, "float32")):
            what = f"flow + vocoder, {length:g} s {way}, {kind}"
            row = against(times[name], [times[EAGER]], what, target if name == OURS else 0)
            row.more |= {"RTF": times[name].median / length, "its RTF": times[EAGER].median / length, **differences}
            row.more |= {"processor_ratio": processor[EAGER] / processor[name]}
            rows.append(row)
        if way == "at once":
            parts = engine_rows(watches)
    return [*rows, *parts]


def engine_rows(watches: Mapping[str, Mapping[str, Stopwatch]]) -> list[Row]:
    """Where the time of one utterance at once goes."""
    rows: list[Row] = []
    for name in Detokenizer.ENGINES:
        runs = STEPS if name == ESTIMATOR else 1
        times = {
            side: Measurement(side, tuple(np.reshape(watch[name].seconds, (-1, runs)).sum(axis=1)))
            for side, watch in watches.items()
        }
        count = f"{name}, {runs} run{'s' if runs > 1 else ''} of it"
        rows.append(against(times[EXACT], [times[EAGER]], count))
        if name == ESTIMATOR:
            rows.append(against(times[OURS], [times[EAGER]], f"{count}, int8"))
    return rows


class Clocked:
    """Work with the processor's seconds of every run, all threads together: what other processes on the machine disturb
    least. For one thread their ratio is that of the times on a quiet machine."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.seconds: list[float] = []

    def __call__(self) -> None:
        started = time.process_time()
        self._work()
        self.seconds.append(time.process_time() - started)


class Stopwatch:
    """An engine whose runs are timed."""

    def __init__(self, engine: Engine) -> None:
        self.name, self.inputs, self.outputs = engine.name, engine.inputs, engine.outputs
        self._engine = engine
        self.seconds: list[float] = []

    def run(self, *feeds: Any, **more: Any) -> Arrays:
        """See `Engine.run`."""
        started = time.perf_counter()
        out = self._engine.run(*feeds, **more)
        self.seconds.append(time.perf_counter() - started)
        return out

    def close(self) -> None:
        """Nothing of its own."""


def speaker(
    engines: Mapping[str, Engine],
    decoder: Detokenizer,
    bundle: Bundle,
    facts: Mapping[str, Mapping[str, Any]],
    steps: int,
) -> Speech:
    """The whole path, as `open_speech` makes it, with an utterance of `steps` ids."""
    folder = bundle.assets / "talker"
    codec, entries = Tokenizer.from_checkpoint(folder), S3Bpe(folder / "s3_bpe")
    tokens = TalkerTokens.of(codec, int(facts["talker"]["text_vocab"]))
    return Speech(Talker(engines["talker"], entries, tokens, max_steps=steps), decoder, codec, entries)


def concurrent(speakers: Mapping[str, Speech], voice: Voice, most: int) -> list[Row]:
    """Talker, flow and vocoder for several requests at once: the time to the first audio and until all is there."""
    rows = []
    for count in (number for number in CONCURRENT if number <= most):
        loads = {name: Load(speech, voice, count) for name, speech in speakers.items()}
        for turn in range(ROUNDS):
            for load in list(loads.values())[:: -1 if turn % 2 else 1]:
                load()
        mine, other = loads[OURS], loads[EAGER]
        if mine.audio != other.audio:
            raise SystemExit(f"the sides spoke {mine.audio:.2f} s and {other.audio:.2f} s: not the same computation")
        what = f"{count} request{'s' if count > 1 else ''}"
        first, done = (
            against(Measurement(OURS, tuple(own)), [Measurement(EAGER, tuple(its))], f"{which} audio, {what}")
            for which, own, its in (("first", mine.first, other.first), ("all", mine.done, other.done))
        )
        for row, own in ((done, mine), (done, other)):
            row.more["RTF" if own is mine else "its RTF"] = float(np.median(own.done)) * count / own.audio
        done.more["audio_s"] = mine.audio / count
        rows += [first, done]
    return rows


class Load:
    """`count` requests at once; each call adds the seconds until first and last audio of every request."""

    def __init__(self, speech: Speech, voice: Voice, count: int) -> None:
        self._speech, self._voice, self._count = speech, voice, count
        self.first: list[float] = []
        self.done: list[float] = []
        self.audio = 0.0

    def __call__(self) -> None:
        lengths = [0.0] * self._count
        failures: list[MingError] = []

        def ask(number: int) -> None:
            started, samples = time.perf_counter(), 0
            try:
                for chunk in self._speech.speak([Piece(_TEXT, True)], self._voice, seed=number):
                    if not samples and len(chunk.audio):
                        self.first.append(time.perf_counter() - started)
                    samples += len(chunk.audio)
            except MingError as error:
                failures.append(error)
            self.done.append(time.perf_counter() - started)
            lengths[number] = samples / self._speech.sample_rate

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(self._count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        self.audio = sum(lengths)


if __name__ == "__main__":
    main()
