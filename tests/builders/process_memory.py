"""A process that opens the engines of a stage as serving does, runs them at given sizes, and says what that took.

    python process_memory.py '{"bundle": …, "shrink": …, "engines": {name: [{symbol: size}, …]}}'

Prints JSON, bytes: `ready` (resident when all engines are open), `weights` (their files), `caches` (the largest given
to any engine), `peak` (the most that was ever resident). Each engine runs twice at each of its sizes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status does not state {key}")


def feeds_of(engine: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """Random numbers, and indices that are valid at any size."""
    rng = np.random.default_rng(0)
    feeds = {}
    for name, spec in engine.inputs.items():
        shape = [size if isinstance(size, int) else sizes[size] for size in spec.shape]
        if spec.dtype.kind == "f":
            value = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1)
        elif spec.dtype.kind == "b":
            value = np.ones(shape, bool)
        elif name in ("window_slot", "frame_slot", "token_index"):
            value = np.arange(shape[0])
        elif name in ("window_index", "frame_index"):
            value = np.arange(shape[0] * shape[1]).reshape(shape) % sizes["N"]
        elif name.endswith("_length"):
            value = np.full(shape, {"window_length": 64}.get(name, sizes.get("L", 1)))
        else:
            value = np.zeros(shape, np.int64)
        feeds[name] = np.ascontiguousarray(value, spec.dtype)
    return feeds


def main() -> None:
    from ming_trt.bundle import Bundle
    from ming_trt.runtime.engine import open_engine

    job = json.loads(sys.argv[1])
    bundle = Bundle.open(job["bundle"])
    engines = {name: open_engine(bundle, name, threads=1, shrink_memory=job["shrink"]) for name in job["engines"]}
    files = [bundle.model_path(name).parent / "model.onnx.data" for name in engines]
    said = {"ready": resident("VmRSS"), "weights": sum(file.stat().st_size for file in files), "caches": 0}
    for name, engine in engines.items():
        slots: dict[str, Any] = {}
        for sizes in job["engines"][name]:
            feeds = feeds_of(engine, sizes)
            caches = {key for key in feeds if key.startswith(("past_key", "past_value"))}
            for key in caches:
                # a prompt is read into one row of the cache of all requests
                whole = slots.setdefault(key, feeds[key])
                feeds[key] = whole[: len(feeds[key])]
            said["caches"] = max(said["caches"], sum(array.nbytes for array in slots.values()))
            into = {key.replace("past_", "present_", 1): feeds[key] for key in caches}
            for _ in range(2):
                engine.run(feeds, into=into)
            del feeds, into
    print(json.dumps({**said, "peak": resident("VmHWM")}))


if __name__ == "__main__":
    main()
