"""llama.cpp in a process and an environment of its own (`llama-cpp-python`, `gguf`); imports nothing of this project.

    python llama_worker.py write FILE.gguf     reads a header line (JSON) and float32 weights from its input
    python llama_worker.py run FILE.gguf THREADS CAPACITY

`run` says first what it is. Then each line of its input, {"tokens": [...], "past": N}, is a step with those tokens
behind the first N of the cache; the answer has its seconds, and with "logits": true the logits of the last token.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
import time
from typing import Any


def write(path: str) -> None:
    """One tensor at a time; those of two axes and more in the format that the header names."""
    import gguf
    import numpy as np

    header = json.loads(sys.stdin.buffer.readline())
    writer = gguf.GGUFWriter(path, header["architecture"])
    for method, value in header["settings"].items():
        getattr(writer, method)(value)
    formats = []
    for name, shape, label in header["tensors"]:
        kind = gguf.GGMLQuantizationType[label]
        stored = gguf.quants.quant_shape_to_byte_shape(shape, kind) if label != "F32" else shape
        size = math.prod(stored) * (4 if label == "F32" else 1)
        writer.add_tensor_info(name, stored, np.dtype(np.float32 if label == "F32" else np.uint8), size, kind)
        formats.append((name, tuple(shape), kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, kind in formats:
        # a stack of experts comes matrix by matrix, so that only one is held in float32
        matrix = shape[-2:] if len(shape) > 1 else shape
        parts = []
        for _ in range(math.prod(shape) // math.prod(matrix)):
            data = sys.stdin.buffer.read(4 * math.prod(matrix))
            if len(data) != 4 * math.prod(matrix):
                raise SystemExit(f"the weights ended within '{name}'")
            parts.append(gguf.quants.quantize(np.frombuffer(data, np.float32).reshape(matrix), kind))
        writer.write_tensor_data(np.stack(parts) if len(shape) > 2 else parts[0])
    writer.close()


class Model:
    """A GGUF file with a context of one sequence."""

    def __init__(self, path: str, threads: int, capacity: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load '{path}'")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = context.n_ubatch = capacity
        context.n_threads = context.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise SystemExit("llama.cpp cannot make a context")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def step(self, tokens: list[int], past: int) -> float:
        """Seconds of a step with `tokens` behind the first `past` of the cache; later places are dropped before it."""
        self.api.llama_memory_seq_rm(self.memory, 0, past, -1)
        array = (self.api.llama_token * len(tokens))(*tokens)
        batch = self.api.llama_batch_get_one(array, len(tokens))
        started = time.perf_counter()
        code = self.api.llama_decode(self.context, batch)
        # reading the logits waits for them
        self.api.llama_get_logits_ith(self.context, -1)
        took = time.perf_counter() - started
        if code:
            raise SystemExit(f"llama_decode gave {code}")
        return took

    def logits(self) -> list[float]:
        """Those of the last token."""
        found = self.api.llama_get_logits_ith(self.context, -1)
        return [float(found[i]) for i in range(self.vocabulary)]


def run(path: str, threads: int, capacity: int) -> None:
    """Answers until its input ends."""
    model = Model(path, threads, capacity)
    system: Any = model.api.llama_print_system_info()
    print(json.dumps({"version": model.api.__version__, "system": system.decode()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any] = {"seconds": model.step(asked["tokens"], asked["past"])}
        if asked.get("logits"):
            answer["logits"] = model.logits()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    # what the library prints on its own must not get between the answers
    answers = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(answers, "w")
    if sys.argv[1] == "write":
        write(sys.argv[2])
    else:
        run(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
