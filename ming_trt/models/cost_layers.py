"""What a layer that several components have must do; conventions as in `cost.py`."""

from __future__ import annotations

from ming_trt.image_config import ConnectorConfig
from ming_trt.models.cost import ATTENTION, Cost, attend, product
from ming_trt.speech_config import TalkerConfig


def qwen2_layer(sizes: ConnectorConfig | TalkerConfig, tokens: int, past: int = 0, batch: int = 1) -> Cost:
    """One layer over `tokens` new tokens of each of `batch` sequences behind `past` ones."""
    s, rows = sizes, batch * tokens
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    projections = product(rows, s.hidden, 2 * (queries + keys), ATTENTION)
    scores = attend(tokens, past + tokens, queries, batch)
    feed_forward = product(rows, s.hidden, 3 * s.intermediate)
    return projections + scores + feed_forward + Cost(0, {}, 2.0 * batch * past * keys)
