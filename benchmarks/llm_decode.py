"""Decoding, batch 1, four layers of the decoder at true width: our int8 and int4 engines against torch.

The projection to the vocabulary is timed apart, since four layers of 28 would give it seven times its weight.

    python benchmarks/llm_decode.py [--threads N] [--seconds S] [--past N]
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from harness import (
    READ_BYTES,
    Row,
    Work,
    against,
    arguments,
    cores,
    finish,
    interleave,
    measure_ceiling,
    reader,
    same_memory,
)
from llm_step import OurStep, difference, head_bytes, head_engines, load_torch, step_inputs, torch_peers
from random_model import config, engine_file

from builders.llm import LLM
from ming_trt.models.cost import llm_step

# At least, and the goal: times faster than the best of torch, and the share of the read bandwidth.
SPEED = {"int8": (2.5, 3.0), "int4": (3.8, 4.5)}
BANDWIDTH = {"int8": (0.7, 0.8)}
# Relative error of the logits on random weights, above which two candidates do not compute the same thing.
CLOSE = {"int8": 0.3, "int4": 0.8}


def main() -> None:
    options = arguments(
        str(__doc__),
        past={"type": int, "default": 512, "help": "tokens in the cache"},
        no_compile={"action": "store_true", "help": "leave torch.compile out"},
    )
    threads = cores(options.threads)
    model = config(options.tiny)
    past = 32 if options.tiny else options.past
    ours = {precision: OurStep(engine_file(LLM(), model, precision), threads) for precision in SPEED}
    ceiling = measure_ceiling(threads)
    rows: list[Row] = []
    # One float type at a time: both sets of torch's weights would not fit beside ours on a small machine.
    measured: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        arrays = step_inputs(model.llm, 1, past, 1, past + 128)
        steps = {precision: engine.step(arrays) for precision, engine in ours.items()}
        module = load_torch(model.llm, dtype)
        peers = torch_peers(module, arrays, dtype, not options.no_compile, threads)
        errors = {precision: difference(engine, module, dtype) for precision, engine in ours.items()}
        for precision, error in errors.items():
            if error > CLOSE[precision]:
                raise SystemExit(f"{precision} and torch differ by {error:.2f}: they do not compute the same")
        times = interleave({**steps, **peers, "reading": reader(threads)}, options.seconds / 2, repeats=5)
        for precision in SPEED:
            key = (precision, min(peers, key=lambda name: times[name].median))
            ratio = times[key[1]].median / times[precision].median
            measured.setdefault(precision, []).append((ratio, times, list(peers), errors[precision]))
        del peers, module
        gc.collect()
    for precision, runs in measured.items():
        # the best peer is the one that is hardest to beat, in its own round
        _, times, names, error = min(runs, key=lambda run: run[0])
        everyone = {n: 1000 * t[n].median for _, t, ns, _ in runs for n in ns}
        size = llm_step(model.llm, 1, past, logits=0).bytes(precision)
        bandwidth = READ_BYTES / times["reading"].median
        row = against(
            times[precision],
            [times[name] for name in names],
            f"decode, {precision}, {past} past",
            0 if options.tiny else SPEED[precision][0],
            goal=SPEED[precision][1],
            tokens_per_s=1 / times[precision].median,
            MBU=size / times[precision].median / bandwidth,
            read_GB_per_s=bandwidth / 1e9,
            MB=size / 1e6,
            error=error,
        )
        row.more["peers_ms"] = everyone
        rows.append(row)
        if precision in BANDWIDTH:
            least, aim = (0.0, 0.0) if options.tiny else BANDWIDTH[precision]
            limit, mine = size / bandwidth, times[precision]
            rows.append(
                Row(
                    f"{row.what}: of the read bandwidth", row.ours_ms, "reading alone", 1000 * limit,
                    limit / mine.median, limit / mine.worst, limit / mine.best, least, goal=aim,
                    spread={"ours": mine.spread}, note="low, high: of the slowest and the fastest tenth of the steps",
                )
            )  # fmt: skip
    rows += head(options.tiny, ours, threads, ceiling.read_bytes_per_s, options.seconds / 4)
    finish(
        "llm_decode",
        rows,
        options,
        ceiling,
        "ratio: the best torch variant's time / ours; MBU: of the bandwidth of the same rounds",
    )


def head(tiny: bool, small: dict[str, OurStep], threads: int, bandwidth: float, seconds: float) -> list[Row]:
    """The projection to the official vocabulary, apart."""
    for engine in small.values():
        engine.close()
    engines = head_engines(tiny, threads)
    steps: dict[str, Work] = {
        name: engine.step(step_inputs(llm, 1, 8, 1, 64)) for name, (engine, llm) in engines.items()
    }
    times = interleave(steps, seconds, repeats=5)
    took, size = times["wide"].median - times["narrow"].median, head_bytes(tiny)
    return [Row("head, 8 bits", 1000 * took, more={"MBU": size / took / bandwidth, "MB": size / 1e6})]


if __name__ == "__main__":
    same_memory()
    main()
