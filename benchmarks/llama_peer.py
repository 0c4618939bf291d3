"""Decoding and the prefill of 512 tokens against llama.cpp: four layers at true width, the same random weights.

llama.cpp runs in a process of its own, by the interpreter of an environment that has `llama-cpp-python` and `gguf`
(docs/bench.md says how to build it). Without one, the stored figures are shown, with the bandwidth of their run.

    python benchmarks/llama_peer.py --python ~/llama/bin/python [--threads N] [--seconds S]
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import llama_worker
import numpy as np
from harness import (
    CACHE,
    HERE,
    READ_BYTES,
    Measurement,
    Row,
    against,
    arguments,
    cores,
    finish,
    host_id,
    interleave,
    reader,
    same_memory,
    show,
)  # fmt: skip
from harness import measure_ceiling as ceiling_of
from llm_step import OurStep, step_inputs
from random_model import RandomCheckpoint, config, engine_file

from builders.llm import LLM
from ming_trt.config import LLMConfig
from ming_trt.models.cost import llm_step

WORKER = HERE / "llama_worker.py"
# our precision -> format of llama.cpp, what decoding and the prefill must reach, and what they aim at
PEERS = {"int8": ("Q8_0", (1.3, 1.8), (1.5, 2.0)), "int4": ("Q4_0", (1.2, 1.8), (1.4, 2.0))}
# Cosine of the logits on random weights, below which the two do not compute the same thing (unrelated ones have 0).
# With 4 bits both are far from the weights, each in its own way: 0.85 was seen.
CLOSE = {"int8": 0.99, "int4": 0.75}


def main() -> None:
    options = arguments(
        str(__doc__),
        past={"type": int, "default": 512, "help": "tokens in the cache"},
        python={
            "default": os.environ.get("MING_TRT_LLAMA_PYTHON", ""),
            "help": "interpreter that has llama-cpp-python and gguf; default: MING_TRT_LLAMA_PYTHON",
        },
    )
    if not options.python:
        stored(options)
        return
    threads, model = cores(options.threads), config(options.tiny)
    past = 32 if options.tiny else options.past
    # of each kind half of the time, as many precisions
    seconds = options.seconds / 2 / len(PEERS)
    ceiling = ceiling_of(threads)
    rows: list[Row] = []
    about: dict[str, Any] = {}
    tokens = step_inputs(model.llm, past, 0, 1, past + 128)
    ids = [int(token) for token in tokens["input_ids"][0]]
    one = step_inputs(model.llm, 1, past, 1, past + 128)
    for precision, (label, least, aims) in PEERS.items():
        ours = OurStep(engine_file(LLM(), model, precision), threads)
        theirs = Llama(options.python, gguf_file(options.python, model.llm, label), threads, past + 128)
        about = theirs.about
        cosine = alike(ours, theirs, model.llm)
        if cosine < CLOSE[precision]:
            raise SystemExit(f"logits of {precision} and {label} have the cosine {cosine:.3f}: they differ")
        theirs.step(ids, 0)
        peer = f"llama.cpp {label}"
        decode = interleave(
            {"ours": ours.step(one), peer: lambda t=theirs: t.step([1], past), "reading": reader(threads)},  # type: ignore[misc]
            seconds,
            repeats=5,
        )
        prefill = interleave(
            {"ours": ours.step(tokens), peer: lambda t=theirs: t.step(ids, 0)},  # type: ignore[misc]
            seconds,
            repeats=1,
            warmup=1,
        )
        for what, times, count, wanted in (
            ("decode", decode, 1, (least[0], aims[0])),
            ("prefill", prefill, past, (least[1], aims[1])),
        ):
            wanted = (0.0, 0.0) if options.tiny else wanted
            rows.append(row(times, peer, f"{what}, {precision}", count, wanted, cosine))
        size = llm_step(model.llm, 1, past, logits=0).bytes(precision)
        bandwidth = READ_BYTES / decode["reading"].median
        rows[-2].more |= {"MBU": size / decode["ours"].median / bandwidth, "read_GB_per_s": bandwidth / 1e9}
        theirs.close()
        ours.close()
    note = f"llama-cpp-python {about['version']}: {about['system']}; ratio: its time / ours, the same threads"
    finish("llama_peer", rows, options, ceiling, note)


def row(
    times: dict[str, Measurement], peer: str, what: str, tokens: int, wanted: tuple[float, float], cosine: float
) -> Row:
    """Ours against llama.cpp's, with both rates."""
    ours, theirs = times["ours"], times[peer]
    return against(
        ours,
        [theirs],
        what,
        wanted[0],
        goal=wanted[1],
        tokens_per_s=tokens / ours.median,
        its_tokens_per_s=tokens / theirs.median,
        its_best_ms=1000 * theirs.best,
        cosine=cosine,
    )


def stored(options: argparse.Namespace) -> None:
    """Shows the figures of an earlier run. Raises `SystemExit` if there are none."""
    file = options.out / host_id() / "llama_peer.json"
    why = "no interpreter with llama-cpp-python was named (--python or MING_TRT_LLAMA_PYTHON)"
    if not file.is_file():
        raise SystemExit(f"{why}, and no figures are stored in '{file}': build it as docs/bench.md says")
    result = json.loads(file.read_text("utf-8"))
    read = result["ceiling"]["read_bytes_per_s"] / 1e9
    result["note"] += f" (stored figures of {result['created']}, when this machine read {read:.1f} GB/s: {why})"
    show(result)
    print(json.dumps(result))


class Llama:
    """llama.cpp over one file, in a process of its own."""

    def __init__(self, python: str, file: Path, threads: int, capacity: int) -> None:
        # libraries count threads when they start; the worker sets its own number
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "PYTHON"))}
        self.process = subprocess.Popen(
            [python, str(WORKER), "run", str(file), str(threads), str(capacity)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.about = self._answer()

    def step(self, tokens: list[int], past: int, logits: bool = False) -> dict[str, Any]:
        """A step with `tokens` behind the first `past` places of the cache."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"tokens": tokens, "past": past, "logits": logits}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of llama.cpp ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def alike(ours: OurStep, theirs: Llama, model: LLMConfig, tokens: int = 32, prompts: int = 12) -> float:
    """The median cosine of the last logits of some prompts: rounding sometimes tips a router to another expert."""
    cosines = []
    for start in range(prompts):
        arrays = step_inputs(model, tokens, 0, 1, tokens)
        arrays["input_ids"] = (arrays["input_ids"] + start) % model.vocab_size
        result: Any = ours.step(arrays)()
        one = result["logits"][0, 0]
        two = np.array(theirs.step([int(i) for i in arrays["input_ids"][0]], 0, logits=True)["logits"])
        cosines.append(float(one @ two / np.linalg.norm(one) / np.linalg.norm(two)))
    return float(np.median(cosines))


def gguf_file(python: str, model: LLMConfig, label: str) -> Path:
    """A `bailingmoe` file with the weights of `RandomCheckpoint`, matrices in format `label`; made once."""
    code = "".join(map(inspect.getsource, (_settings, _tensors, _paired, llama_worker.write)))
    key = json.dumps(asdict(model), sort_keys=True) + label + code
    file = CACHE / f"llama-{label}-{hashlib.sha256(key.encode()).hexdigest()[:12]}" / "model.gguf"
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    tensors = list(_tensors(model))
    header = {
        "architecture": "bailingmoe",
        "settings": _settings(model),
        "tensors": [
            (name, shape, "F32" if len(shape) == 1 or "gate_inp" in name else label) for name, shape, _ in tensors
        ],
    }
    with subprocess.Popen([python, str(WORKER), "write", str(part)], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(header).encode() + b"\n")
        for _, _, matrices in tensors:
            for array in matrices:
                process.stdin.write(np.ascontiguousarray(array).data)
        process.stdin.close()
        if process.wait():
            raise SystemExit(f"'{file.name}' could not be written: exit code {process.returncode}")
    part.rename(file)
    return file


def _settings(c: LLMConfig) -> dict[str, Any]:
    """Methods of `gguf.GGUFWriter` and what they are called with."""
    return {
        "add_context_length": c.max_positions,
        "add_embedding_length": c.hidden_size,
        "add_block_count": c.num_layers,
        "add_feed_forward_length": c.shared_width,
        "add_expert_feed_forward_length": c.expert_width,
        "add_head_count": c.num_heads,
        "add_head_count_kv": c.num_kv_heads,
        "add_key_length": c.head_dim,
        "add_value_length": c.head_dim,
        "add_rope_dimension_count": c.head_dim,
        "add_rope_freq_base": c.rope_theta,
        "add_layer_norm_rms_eps": c.norm_eps,
        "add_expert_count": c.num_experts,
        "add_expert_used_count": c.top_k,
        "add_expert_shared_count": c.shared_width // c.expert_width,
        "add_expert_weights_scale": 1.0,
        "add_expert_weights_norm": c.normalize_top_k,
        "add_leading_dense_block_count": 0,
        "add_vocab_size": c.vocab_size,
        "add_tokenizer_model": "no_vocab",
    }


def _tensors(c: LLMConfig) -> Iterator[tuple[str, tuple[int, ...], Iterator[Any]]]:
    """Name and shape of each tensor of the file, with its matrices in float32. Of the three routers that of text."""
    checkpoint, hidden = RandomCheckpoint(), c.hidden_size

    def read(name: str, *shape: int) -> Any:
        checkpoint.require(f"model.{name}", shape)
        return checkpoint.read(f"model.{name}").float().numpy()

    def whole(name: str, *shape: int) -> tuple[tuple[int, ...], Iterator[Any]]:
        return shape, (read(name, *shape) for _ in range(1))

    yield "token_embd.weight", *whole("model.word_embeddings.weight", c.vocab_size, hidden)
    yield "output_norm.weight", *whole("model.norm.weight", hidden)
    yield "output.weight", *whole("lm_head.weight", c.vocab_size, hidden)
    for i in range(c.num_layers):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        yield f"{block}.attn_norm.weight", *whole(f"{layer}.input_layernorm.weight", hidden)
        yield f"{block}.ffn_norm.weight", *whole(f"{layer}.post_attention_layernorm.weight", hidden)
        yield f"{block}.attn_output.weight", *whole(f"{layer}.attention.dense.weight", hidden, c.query_width)
        place = 0
        for part, heads in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
            rows = heads * c.head_dim

            def projection(layer: str = layer, start: int = place, rows: int = rows, part: str = part) -> Iterator[Any]:
                name = f"{layer}.attention.query_key_value.weight"
                matrix = read(name, c.query_width + 2 * c.kv_width, hidden)[start : start + rows]
                yield matrix if part == "v" else _paired(matrix, c.head_dim)

            yield f"{block}.attn_{part}.weight", (rows, hidden), projection()
            place += rows
        yield f"{block}.ffn_gate_inp.weight", *whole(f"{layer}.mlp.gate.weight", c.num_experts, hidden)
        for part, size in (("gate", (c.expert_width, hidden)), ("up", (c.expert_width, hidden)),
                           ("down", (hidden, c.expert_width))):  # fmt: skip

            def experts(layer: str = layer, part: str = part, size: tuple[int, int] = size) -> Iterator[Any]:
                for e in range(c.num_experts):
                    yield read(f"{layer}.mlp.experts.{e}.{part}_proj.weight", *size)

            yield f"{block}.ffn_{part}_exps.weight", (c.num_experts, *size), experts()
            shared = tuple(c.shared_width if width == c.expert_width else width for width in size)
            name = f"{layer}.mlp.shared_experts.{part}_proj.weight"
            yield f"{block}.ffn_{part}_shexp.weight", *whole(name, *shared)


def _paired(matrix: Any, width: int) -> Any:
    """Rows of each head ordered 0, D/2, 1, D/2 + 1, ...: llama.cpp turns neighbours together for this architecture."""
    heads = matrix.reshape(-1, 2, width // 2, matrix.shape[-1])
    return heads.swapaxes(1, 2).reshape(matrix.shape)


if __name__ == "__main__":
    same_memory()
    main()
