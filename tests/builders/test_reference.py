"""A definition whose layers come and go gives exactly what the whole one gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from builders import registry
from builders.reference import reference, reference_bytes
from builders.verify import reference_outputs, sample
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import load_config

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "understanding" / "checkpoint"


@pytest.mark.parametrize("name", ["vision_encoder", "audio_encoder", "llm"])
def test_streamed_equals_whole(name: str) -> None:
    component, config, checkpoint = registry.component(name), load_config(CHECKPOINT), Checkpoint(CHECKPOINT)
    whole_bytes, streamed_bytes = reference_bytes(component, config)
    assert whole_bytes == sum(info.nbytes for info in _tensors(component.sources(config), checkpoint))
    assert streamed_bytes < whole_bytes
    whole = reference(component, config, checkpoint, whole_bytes)
    streamed = reference(component, config, checkpoint, whole_bytes - 1)
    assert whole is not None and streamed is not None
    held = sum(p.nbytes for p in streamed.parameters() if p.device.type == "cpu")
    assert held < streamed_bytes
    feeds = sample(component, config)
    with torch.inference_mode():
        count = len(_flat(whole(*map(torch.from_numpy, map(np.array, feeds.values())))))
    names = [str(i) for i in range(count)]
    first, second = reference_outputs(whole, feeds, names), reference_outputs(streamed, feeds, names)
    for output in names:
        np.testing.assert_array_equal(first[output], second[output])
    assert sum(p.nbytes for p in streamed.parameters() if p.device.type == "cpu") == held
    assert reference(component, config, checkpoint, streamed_bytes - 1) is None


def _tensors(sources: dict, checkpoint: Checkpoint) -> list:
    return [checkpoint.info(name) for source in sources.values() for name in source.names]


def _flat(result: object) -> list:
    return [x for item in result for x in _flat(item)] if isinstance(result, list | tuple) else [result]
