"""How cost grows with the prompt, the cache, the batch, the picture, the video and the recording.

Each series is timed on one engine with few layers of a small width, where overheads show most, or on the host's own
processing, and fitted as time = a * size^k over its upper half. Time is processor time of all threads, the tenth
percentile of the repetitions: what else the machine does hardly changes it. Beside the measured k stands that of the
model's own arithmetic over the same sizes (`ming_trt.models.cost`): of its operations or of the bytes that it reads,
whichever grows faster; for the host a step for every byte, k = 1. A measured k above it by more than 0.15 would be ours
to explain.

    python benchmarks/growth.py [--threads N] [--seconds S] [--only NAME]
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from harness import CACHE, Row, Work, arguments, cores, finish, measure_ceiling
from llm_step import OurStep, step_inputs
from PIL import Image
from random_model import config, engine_file

from builders.audio_encoder import Audio
from builders.llm import LLM
from builders.vision import Vision
from ming_trt.bench.machine import Ceiling
from ming_trt.config import MingConfig, load_config
from ming_trt.mini import write_mini
from ming_trt.models import cost
from ming_trt.models.cost import Cost
from ming_trt.models.vision import INPUT_NAMES
from ming_trt.processing.audio import process_waveform
from ming_trt.processing.image import process_image
from ming_trt.processing.prepare import Processor
from ming_trt.processing.request import Message, Request, TextPart, VideoPart
from ming_trt.processing.tokenizer import Tokenizer
from ming_trt.processing.video import process_video
from ming_trt.processing.vision_index import vision_indices
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

SLACK = 0.15
CHUNK = 512
_RATE = 16000


@dataclass(frozen=True)
class Series:
    """Sizes, what is timed at each, what the model must do there (None: a step for every byte), and why it grows so."""

    name: str
    sizes: Sequence[int]
    work: Callable[[int], Work]
    cost: Callable[[int], Cost] | None
    why: str


def main() -> None:
    options = arguments(str(__doc__), only={"default": "", "help": "series whose name contains this"})
    threads, model = cores(options.threads), config(tiny=True)
    ceiling = measure_ceiling(threads)
    llm = OurStep(engine_file(LLM(), model, "fp32"), threads)
    vision = OnnxRuntimeEngine(engine_file(Vision(), model, "fp32"), "vision_encoder", threads=threads)
    audio = OnnxRuntimeEngine(engine_file(Audio(), model, "fp32"), "audio_encoder", threads=threads)
    every = [*engines(model, llm, vision, audio, options.tiny), *host(options.tiny)]
    chosen = [series for series in every if options.only in series.name]
    rows = [measured(series, options.seconds / len(chosen), ceiling) for series in chosen]
    note = f"ms of processor time; a k above the model's own by more than {SLACK} is not explained by its arithmetic"
    finish("growth", rows, options, ceiling, note)


def engines(
    model: MingConfig,
    llm: OurStep,
    vision: OnnxRuntimeEngine,
    audio: OnnxRuntimeEngine,
    small: bool,
) -> list[Series]:
    """What the engines do for a request."""
    width = model.llm.hidden_size

    def look_cost(grid: tuple[int, int, int]) -> Cost:
        return cost.vision(model.vision, width, grid)

    return [
        Series(
            "prompt, tokens",
            (256, 512, 1024) if small else (512, 1024, 2048, 4096, 8192),
            lambda n: prefill(llm, model, n),
            lambda n: chunks(model, n),
            "products with the weights grow with the tokens, attention with their square",
        ),
        Series(
            "a token behind a cache of tokens",
            (64, 256, 1024) if small else (512, 1024, 2048, 4096, 8192),
            lambda n: llm.step(step_inputs(model.llm, 1, n, 1, n + 64)),
            lambda n: cost.llm_step(model.llm, 1, n),
            "the weights are read once whatever the cache holds; keys and values grow with it",
        ),
        Series(
            "requests in a step",
            (1, 2, 4, 8, 16),
            lambda n: llm.step(step_inputs(model.llm, 1, 256, n, 320)),
            lambda n: cost.llm_step(model.llm, 1, 256, n),
            "each request reads its own cache and chooses experts of its own, until all experts are read",
        ),
        Series(
            "picture, patches",
            (64, 256, 1024) if small else (256, 1024, 2304, 4096),
            lambda n: look(vision, model, (1, round(n**0.5), round(n**0.5))),
            lambda n: look_cost((1, round(n**0.5), round(n**0.5))),
            "windows grow with the patches, the layers that see the whole picture with their square",
        ),
        Series(
            "video, pairs of frames",
            (1, 2, 4) if small else (1, 2, 4, 8, 16),
            lambda n: look(vision, model, (n, 16, 16)),
            lambda n: look_cost((n, 16, 16)),
            "frames attend within themselves",
        ),
        Series(
            "recording, seconds",
            (1, 2, 4) if small else (5, 10, 20, 40),
            lambda n: hear(audio, model, n),
            lambda n: cost.audio(model.audio, width, 100 * n),
            "products grow with the frames, attention with their square",
        ),
    ]


def host(small: bool) -> list[Series]:
    """What the host does with a request before the engines see it; one thread, k = 1."""
    folder = CACHE / "mini" / "checkpoint"
    write_mini(folder)
    processor = Processor(load_config(folder), Tokenizer.from_checkpoint(folder), max_prompt_tokens=1 << 20)
    return [
        Series(
            "host: prompt, words",
            (256, 1024, 4096) if small else (512, 1024, 2048, 4096, 8192),
            lambda n: read(processor, n),
            None,
            "the tokenizer looks at every word once",
        ),
        Series(
            "host: picture file, kilopixels",
            (64, 256, 1024) if small else (256, 1024, 2304, 4096),
            lambda n: decode(n),
            None,
            "every pixel is decoded and shrunk; what is left is bounded",
        ),
        Series(
            "host: video file, frames",
            (4, 8, 16) if small else (8, 16, 32, 64),
            lambda n: watch(n),
            None,
            "frames are decoded one after the other, and share a budget of pixels",
        ),
        Series(
            "host: recording, seconds of sound",
            (1, 2, 4) if small else (5, 10, 20, 40, 80),
            lambda n: listen(n),
            None,
            "a transform of fixed length for each hundredth of a second",
        ),
    ]


def measured(series: Series, seconds: float, ceiling: Ceiling) -> Row:
    """The times of one series, its exponent, and that of the model's own arithmetic."""
    sizes = series.sizes
    took = processor_seconds([series.work(n) for n in sizes], seconds)
    k, own, least = exponent(sizes, took), 1.0, [float(n) for n in sizes]
    if series.cost is not None:
        costs = [series.cost(n) for n in sizes]
        own = max(exponent(sizes, [c.flops for c in costs]), exponent(sizes, [c.bytes("fp32") for c in costs]))
        least = [1000 * c.seconds("fp32", ceiling.read_bytes_per_s, ceiling.float32_flops_per_s) for c in costs]
    more: dict[str, Any] = {
        "k": k,
        "k_of_model": own,
        "grows": "as the model" if k <= own + SLACK else "faster than the model",
        "why": series.why,
        "sizes": ", ".join(map(str, sizes)),
        "ms": {str(n): round(1000 * value, 4) for n, value in zip(sizes, took, strict=True)},
        "model_ms": {str(n): value for n, value in zip(sizes, least, strict=True)},
    }
    return Row(series.name, 1000 * took[-1], more=more)


def processor_seconds(works: Sequence[Work], seconds: float) -> list[float]:
    """Of each work, in turns for about so many seconds, at least three times: the tenth percentile."""
    times: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for work, own in zip(works, times, strict=True):
            started = time.process_time()
            work()
            own.append(time.process_time() - started)
    return [float(np.percentile(own, 10)) for own in times]


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope of log(values) over log(sizes), over the upper half of the sizes, where constants have faded."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def chunks(model: MingConfig, tokens: int) -> Cost:
    """A prompt read in pieces, as the server does."""
    costs = [cost.llm_step(model.llm, min(CHUNK, tokens - past), past) for past in range(0, tokens, CHUNK)]
    total = costs[0]
    for more in costs[1:]:
        total = total + more
    return total


def prefill(engine: OurStep, model: MingConfig, tokens: int) -> Work:
    """A whole prompt, chunk by chunk; each has a cache of its own size."""
    steps = [
        engine.step(step_inputs(model.llm, min(CHUNK, tokens - past), past, 1, min(tokens, past + CHUNK)))
        for past in range(0, tokens, CHUNK)
    ]
    return lambda: [step() for step in steps]


def look(engine: OnnxRuntimeEngine, model: MingConfig, grid: tuple[int, int, int]) -> Work:
    """Patches of one picture or video."""
    indices = vision_indices([list(grid)], model.vision)
    patches = np.random.default_rng(0).standard_normal((int(np.prod(grid)), model.vision.patch_width), dtype=np.float32)
    feeds = {name: patches if name == "patches" else indices[name] for name in INPUT_NAMES}
    return lambda: engine.run(feeds)


def hear(engine: OnnxRuntimeEngine, model: MingConfig, seconds: int) -> Work:
    """One clip."""
    mel = np.random.default_rng(0).uniform(-1, 1, (100 * seconds, model.audio.num_mels)).astype(np.float32)
    return lambda: engine.run({"mel": mel})


def read(processor: Processor, words: int) -> Work:
    """A prompt of so many words to token ids and positions."""
    rng = np.random.default_rng(0)
    names = ("river", "lamp", "seven", "walk", "green", "paper", "under", "storm", "a", "of")
    part = TextPart(" ".join(names[i] for i in rng.integers(0, len(names), words)))
    request = Request((Message("user", (part,)),), "growth")
    return lambda: processor.prepare(request)


def decode(kilopixels: int) -> Work:
    """A JPEG file to patches."""
    side = round((1024 * kilopixels) ** 0.5)
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return lambda: process_image(buffer.getvalue())


def watch(frames: int) -> Work:
    """A film of so many frames, two a second so that all of them are taken, to patches."""
    still = np.asarray(Image.effect_noise((320 + 4 * frames, 240), 40).convert("RGB"))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(frames):
            part = np.ascontiguousarray(still[:, 4 * i : 4 * i + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(part, "rgb24")))
        container.mux(stream.encode())
    return lambda: process_video(buffer.getvalue(), VideoPart(max_frames=frames))


def listen(seconds: int) -> Work:
    """Sound to mel frames."""
    sound = np.random.default_rng(0).standard_normal(seconds * _RATE).astype(np.float32) / 10
    return lambda: process_waveform(sound)


if __name__ == "__main__":
    main()
