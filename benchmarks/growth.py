"""How cost grows with the prompt, the cache, the batch, the picture, the video and the recording.

Each series is timed on one engine with four layers of a small width, where overheads show most, and fitted as
time = a * size^k over its upper half. Beside the measured k stands that of the model's own arithmetic over the same
sizes (`ming_trt.models.cost`): a measured k above it by more than 0.15 would be ours to explain.

    python benchmarks/growth.py [--threads N] [--seconds S]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from harness import Row, Work, arguments, cores, finish, interleave, measure_ceiling
from llm_step import OurStep, step_inputs
from random_model import config, engine_file

from builders.audio_encoder import Audio
from builders.llm import LLM
from builders.vision import Vision
from ming_trt.bench.machine import Ceiling
from ming_trt.config import MingConfig
from ming_trt.models import cost
from ming_trt.models.cost import Cost
from ming_trt.models.vision import INPUT_NAMES
from ming_trt.processing.vision_index import vision_indices
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

SLACK = 0.15
CHUNK = 512


def main() -> None:
    options = arguments(str(__doc__))
    threads, model = cores(options.threads), config(tiny=True)
    ceiling = measure_ceiling(threads)
    small = options.tiny
    llm = OurStep(engine_file(LLM(), model, "fp32"), threads)
    vision = OnnxRuntimeEngine(engine_file(Vision(), model, "fp32"), "vision_encoder", threads=threads)
    audio = OnnxRuntimeEngine(engine_file(Audio(), model, "fp32"), "audio_encoder", threads=threads)
    series: dict[str, tuple[Sequence[int], Callable[[int], Work], Callable[[int], Cost]]] = {
        "prompt tokens": (
            (256, 512, 1024) if small else (512, 1024, 2048, 4096, 8192),
            lambda n: prefill(llm, model, n),
            lambda n: chunks(model, n),
        ),
        "tokens in the cache": (
            (64, 256, 1024) if small else (512, 1024, 2048, 4096, 8192),
            lambda n: llm.step(step_inputs(model.llm, 1, n, 1, n + 64)),
            lambda n: cost.llm_step(model.llm, 1, n),
        ),
        "requests in a step": (
            (1, 2, 4, 8),
            lambda n: llm.step(step_inputs(model.llm, 1, 256, n, 320)),
            lambda n: cost.llm_step(model.llm, 1, 256, n),
        ),
        "picture, patches": (
            (64, 256, 1024) if small else (256, 1024, 2304, 4096),
            lambda n: look(vision, model, (1, round(n**0.5), round(n**0.5))),
            lambda n: cost.vision(model.vision, model.llm.hidden_size, (1, round(n**0.5), round(n**0.5))),
        ),
        "video, pairs of frames": (
            (1, 2, 4) if small else (1, 2, 4, 8, 16),
            lambda n: look(vision, model, (n, 16, 16)),
            lambda n: cost.vision(model.vision, model.llm.hidden_size, (n, 16, 16)),
        ),
        "recording, seconds": (
            (1, 2, 4) if small else (5, 10, 20, 40),
            lambda n: hear(audio, model, n),
            lambda n: cost.audio(model.audio, model.llm.hidden_size, 100 * n),
        ),
    }
    rows = [
        measured(name, sizes, work, price, options.seconds / len(series), ceiling)
        for name, (sizes, work, price) in series.items()
    ]
    note = f"k: exponent of the fit; one above the model's own by more than {SLACK} is not explained by its arithmetic"
    finish("growth", rows, options, ceiling, note)


def measured(
    name: str,
    sizes: Sequence[int],
    work: Callable[[int], Work],
    price: Callable[[int], Cost],
    seconds: float,
    ceiling: Ceiling,
) -> Row:
    """The times of one series, its exponent, and that of the least time that the machine allows."""
    times = interleave({str(size): work(size) for size in sizes}, seconds, repeats=1, warmup=1)
    took = [times[str(size)].median for size in sizes]
    rates = (ceiling.read_bytes_per_s, ceiling.float32_flops_per_s)
    least = [price(size).seconds("fp32", *rates) for size in sizes]
    k, own = exponent(sizes, took), exponent(sizes, least)
    points = {str(size): round(1000 * value, 4) for size, value in zip(sizes, took, strict=True)}
    verdict = "as the model" if k <= own + SLACK else "faster than the model"
    more = {"k": k, "k_of_model": own, "grows": verdict, "sizes": ", ".join(points), "ms": points}
    return Row(name, 1000 * took[-1], more=more)


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


if __name__ == "__main__":
    main()
