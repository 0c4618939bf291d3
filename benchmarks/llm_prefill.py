"""Prefill of 512 tokens, four layers of the decoder at true width: our 8-bit forms against torch eager.

int8 is the default, w8a8 the form for long prompts.

python benchmarks/llm_prefill.py [--threads N] [--seconds S] [--tokens N]
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from harness import Row, against, arguments, cores, finish, interleave, measure_ceiling, same_memory
from llm_step import OurStep, difference, load_torch, step_inputs, torch_peers
from random_model import config, engine_file

from builders.llm import LLM
from ming_trt.models.cost import llm_step

TARGETS = {"int8": 1.0, "w8a8": 1.2}
# Relative error of the logits on random weights, above which two candidates do not compute the same thing.
CLOSE = 0.3


def main() -> None:
    options = arguments(str(__doc__), tokens={"type": int, "default": 512, "help": "length of the prompt"})
    threads, model = cores(options.threads), config(options.tiny)
    tokens = 48 if options.tiny else options.tokens
    ours = {name: OurStep(engine_file(LLM(), model, name), threads) for name in TARGETS}
    ceiling = measure_ceiling(threads)
    arrays = step_inputs(model.llm, tokens, 0, 1, tokens)
    runs: dict[str, list[tuple[float, Any, list[str], float]]] = {name: [] for name in TARGETS}
    for dtype in (torch.bfloat16, torch.float32):
        steps = {name: engine.step(arrays) for name, engine in ours.items()}
        module = load_torch(model.llm, dtype)
        peers = torch_peers(module, arrays, dtype, False, threads)
        errors = {name: difference(engine, module, dtype) for name, engine in ours.items()}
        if max(errors.values()) > CLOSE:
            raise SystemExit(f"ours and torch differ by {errors}: they do not compute the same")
        times = interleave({**steps, **peers}, options.seconds / 2, repeats=1, warmup=1)
        for name in TARGETS:
            best = min(times[peer].median for peer in peers)
            runs[name].append((best / times[name].median, times, list(peers), errors[name]))
        del peers, module
        gc.collect()
    flops = llm_step(model.llm, tokens).flops
    rows: list[Row] = []
    for name, found in runs.items():
        _, times, peers_of, error = min(found, key=lambda run: run[0])
        row = against(
            times[name],
            [times[peer] for peer in peers_of],
            f"prefill of {tokens}, {name}",
            0 if options.tiny else TARGETS[name],
            tokens_per_s=tokens / times[name].median,
            MFU=flops / times[name].median / ceiling.float32_flops_per_s,
            error=error,
        )
        row.more["peers_ms"] = {n: 1000 * t[n].median for _, t, ns, _ in found for n in ns}
        rows.append(row)
    finish("llm_prefill", rows, options, ceiling, "MFU against the float32 rate: above 1 by 8-bit instructions")


if __name__ == "__main__":
    same_memory()
    main()
