"""Drives the `llm` engine by hand, so that every position's logits can be looked at.

Serving never does this: `ming_trt.runtime` asks for the last position only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ming_trt.config import LLMConfig
from ming_trt.runtime.engine import Arrays, Engine

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer[Any]]


class LLMDriver:
    """One sequence with its own cache of `capacity` places."""

    def __init__(self, engine: Engine, config: LLMConfig, capacity: int) -> None:
        self.engine = engine
        self.capacity = capacity
        self.length = 0
        self.features: Floats = np.zeros((1, config.hidden_size), np.float32)
        shape = (1, config.num_kv_heads, capacity, config.head_dim)
        self.cache: Arrays = {
            f"{kind}_{i}": np.zeros(shape, np.float32) for i in range(config.num_layers) for kind in ("key", "value")
        }

    def step(
        self, ids: Ints, positions: Ints, modality: Ints | None = None, feature_index: Ints | None = None
    ) -> tuple[Floats, Floats, Floats]:
        """Runs S tokens: `ids` [S], `positions` [3, S]. Returns logits [S, V], hidden [S, H] and embeds [S, H]."""
        count = len(ids)
        seen = np.arange(self.capacity) <= (self.length + np.arange(count))[:, None]
        feeds: Arrays = {
            "input_ids": ids.astype(np.int64)[None],
            "features": self.features,
            "feature_index": np.full((1, count), -1, np.int64) if feature_index is None else feature_index[None],
            "modality": np.zeros((1, count), np.int64) if modality is None else modality[None],
            "position_ids": positions.astype(np.int64)[:, None],
            "write_index": np.array([self.length], np.int64),
            "attention_mask": seen[None, None],
            "logit_index": np.arange(count, dtype=np.int64)[None],
            **{f"past_{name}": values for name, values in self.cache.items()},
        }
        into = {f"present_{name}": values for name, values in self.cache.items()}
        out = self.engine.run(feeds, outputs=("logits", "hidden", "embeds"), into=into)
        self.length += count
        return out["logits"][0], out["hidden"][0], out["embeds"][0]
