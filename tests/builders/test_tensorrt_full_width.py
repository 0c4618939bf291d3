"""One decoder layer at the published widths, with all 64 experts, through the real builder within 8 GiB."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from builders.component import ExportOptions
from builders.export import bind_weights, facts, save
from builders.functions import add_bodies
from builders.llm import LLM
from builders.precision import Floats
from builders.tensorrt import Settings, compile_plan, expect_layers
from builders.tensorrt_graph import adapt
from builders.tensorrt_profiles import fixed_sizes, phases
from ming_trt.config import load_config
from ming_trt.presets import Profile
from tests.conftest import UNDERSTANDING

MEMORY = 8 * 2**30


@pytest.mark.slow
def test_a_layer_of_64_experts_compiles_within_8_gib(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: pip install 'ming-trt[rtx]'")
    config = load_config(UNDERSTANDING / "checkpoint")
    llm = replace(
        config.llm,
        num_layers=1,
        hidden_size=2048,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        num_experts=64,
        top_k=6,
        expert_width=1408,
        shared_width=2816,
        vocab_size=1024,
        rope_sections=(16, 24, 24),
    )
    profile = Profile(max_seq_len=2048, slots=4, prefill_chunk=256)
    options = ExportOptions("tensorrt", "bf16", Floats("bf16"), fixed=tuple(fixed_sizes("llm", profile).items()))
    model = LLM().graph(replace(config, llm=llm), options)
    bind_weights(model, {name: lambda v=value: _random(v.shape.numpy()) for name, value in _unbound(model)})
    add_bodies(model, "bf16")
    adapt(model, options)
    save(model, tmp_path)
    stated = facts(model)
    assert (tmp_path / "model.onnx.data").stat().st_size > 2 * 64 * 3 * 2048 * 1408

    built = compile_plan(
        tmp_path / "model.onnx",
        stated["inputs"],
        phases("llm", profile, {}),
        tmp_path,
        Settings("tensorrt-rtx", memory=MEMORY),
    )

    expect_layers(built, stated["operators"], "llm")
    assert built.peak_bytes < MEMORY
    assert built.plan_bytes > 2 * 64 * 3 * 2048 * 1408
    assert built.layers["KV_CACHE_UPDATE"] == 2 and built.layers["ROTARY_EMBEDDING"] == 2
    # what the plan loads for one token is decided by the plugin; without it all experts are computed
    assert built.stamp.plugin_abi == 0


def _unbound(model):
    return [(name, value) for name, value in model.graph.initializers.items() if value.const_value is None]


def _random(shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Small numbers, a piece at a time, as a checkpoint's tensors come; no two pieces are equal."""
    rows = shape[0] if len(shape) > 1 else 1
    size = int(np.prod(shape)) // rows
    numbers = (np.random.default_rng(0).standard_normal(size + 4096, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    for row in range(rows):
        first = row * 61 % 4096
        yield numbers[first : first + size]
