"""What the benchmarks of the two encoders share: our float32 and int8 engines against torch eager in two types."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from harness import Work, against, cores, finish, interleave, measure_ceiling
from random_model import RandomCheckpoint, engine_file

from builders.main_shard import MainShardComponent
from ming_trt.config import MingConfig
from ming_trt.models.cost import Cost
from ming_trt.models.weights import load_weights
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

TARGET = 1.3
# Cosine of our rows with torch's float32 ones: the gate of the builds asks for as much.
CLOSE = 0.99


def compare(
    name: str, what: str, component: MainShardComponent, model: MingConfig, feeds: dict[str, Any], cost: Cost,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Times all candidates in turns and writes the result."""
    threads = cores(options.threads)
    torch.set_num_threads(threads)
    ceiling = measure_ceiling(threads)
    ours = {
        precision: OnnxRuntimeEngine(engine_file(component, model, precision), component.name, threads=threads)
        for precision in ("int8", "fp32")
    }
    peers: dict[str, Work] = {}
    for dtype in (torch.float32, torch.bfloat16):
        peers[f"torch eager {str(dtype).removeprefix('torch.')}"] = _torch(component, model, feeds, dtype)
    work: dict[str, Work] = {precision: _engine(engine, feeds) for precision, engine in ours.items()}
    exact = _rows(peers["torch eager float32"]())
    cosines = {precision: _cosine(_rows(run()), exact) for precision, run in work.items()}
    if min(cosines.values()) < CLOSE:
        raise SystemExit(f"our rows and torch's have the cosines {cosines}: they do not compute the same")
    times = interleave({**work, **peers}, options.seconds, repeats=1, warmup=1)
    rows = [
        against(
            times[precision],
            [times[peer] for peer in peers],
            f"{what}, {precision}",
            TARGET if precision == "int8" and not options.tiny else 0,
            MFU=cost.flops / times[precision].median / ceiling.float32_flops_per_s,
            cosine=cosines[precision],
            GFLOP=cost.flops / 1e9,
        )
        for precision in work
    ]
    finish(name, rows, options, ceiling, "MFU against the float32 rate: above 1 by 8-bit instructions")


def _engine(engine: OnnxRuntimeEngine, feeds: dict[str, Any]) -> Work:
    return lambda: engine.run(feeds)["rows"]


def _torch(component: MainShardComponent, model: MingConfig, feeds: dict[str, Any], dtype: torch.dtype) -> Work:
    with torch.device("meta"):
        module = component.module(model)
    load_weights(module, RandomCheckpoint(), component.sources(model), dtype)  # type: ignore[arg-type]
    inputs: Sequence[torch.Tensor] = [torch.from_numpy(np.asarray(array)) for array in feeds.values()]

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return module(*inputs)

    return run


def _rows(value: Any) -> Any:
    return value.float().numpy() if isinstance(value, torch.Tensor) else value


def _cosine(one: Any, two: Any) -> float:
    """The mean cosine of the rows."""
    products = (one * two).sum(axis=1)
    return float((products / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)).mean())
