"""What the machine could do at best beside what was measured: shares of memory bandwidth (MBU) and of the matrix rate
(MFU)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ming_trt.bench.load import Load
from ming_trt.bench.machine import Ceiling
from ming_trt.bundle import ASSETS, MANIFEST, Bundle
from ming_trt.config import LLMConfig, load_config
from ming_trt.models.cost import llm_step


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The language model behind a server, from its bundle."""

    config: LLMConfig
    precision: str
    manifest: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> ServedModel:
        """Reads the bundle at `folder`. Raises `BundleError` or `ConfigError`."""
        bundle = Bundle.open(folder)
        entry = bundle.component("llm")
        digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        facts = {
            "sha256": digest,
            "model": dict(bundle.manifest.model),
            "target": bundle.manifest.target,
            "precision": bundle.manifest.precision,
            "versions": dict(bundle.manifest.versions),
            "gate": bundle.manifest.gate,
        }
        return cls(load_config(folder / ASSETS).llm, entry.precision, facts)


def shares(
    model: ServedModel,
    ceiling: Ceiling,
    load: Load,
    metrics: Mapping[str, Mapping[str, Any]],
    prompt: float,
    answer: float,
) -> dict[str, Any]:
    """MBU of decoding and MFU of the prefill at the medians, with the times that the ceiling allows (ms).

    `prompt` and `answer`: mean tokens. Under load decoding steps are shared: as many sequences as the load has at
    once are assumed in each, none is known for a rate.
    """
    found: dict[str, Any] = {"precision": model.precision}
    itl, prefill = metrics.get("itl"), metrics.get("prompt_tokens_per_s")
    if itl and load.kind == "concurrency":
        step = llm_step(model.config, 1, int(prompt + answer / 2), int(load.value))
        size = step.bytes(model.precision)
        found["decode"] = {
            "bytes": size,
            "flops": step.flops,
            "least_ms": 1000 * step.seconds(model.precision, ceiling.read_bytes_per_s, ceiling.float32_flops_per_s),
            "mbu": size / (itl["p50"]["value"] / 1000) / ceiling.read_bytes_per_s,
        }
    if prefill:
        cost = llm_step(model.config, max(1, int(prompt)))
        seconds = prompt / prefill["p50"]["value"]
        found["prefill"] = {
            "flops": cost.flops,
            "least_ms": 1000 * cost.seconds(model.precision, ceiling.read_bytes_per_s, ceiling.float32_flops_per_s),
            "mfu": cost.flops / seconds / ceiling.float32_flops_per_s,
        }
    return found
