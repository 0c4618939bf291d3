"""The cost model against PyTorch's own counter of operations, and against the weights that the definitions have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from builders.quantize import BLOCKS, SCHEMES
from ming_trt.config import LLMConfig, MingConfig, load_config
from ming_trt.errors import ConfigError
from ming_trt.models import cost, ops
from ming_trt.models.audio import AudioEncoder
from ming_trt.models.llm import MingLLM, input_names
from ming_trt.models.vision import INPUT_NAMES, VisionEncoder
from ming_trt.processing.vision_index import vision_indices

from ..conftest import UNDERSTANDING


@pytest.fixture(scope="module")
def config() -> MingConfig:
    folder = next(path.parent for path in sorted(Path(UNDERSTANDING).rglob("config.json")))
    return load_config(folder)


def flops(run: object, *inputs: torch.Tensor) -> int:
    # the fused kernels of CPUs are not known to the counter; plain products are
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        run(*inputs)  # type: ignore[operator]
    return counter.get_total_flops()


def random_module(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return module.eval()


@pytest.mark.parametrize(("batch", "tokens", "past"), [(1, 1, 0), (1, 1, 9), (3, 1, 4), (1, 7, 0), (2, 5, 3)])
def test_llm_step(config: MingConfig, monkeypatch: pytest.MonkeyPatch, batch: int, tokens: int, past: int) -> None:
    # The counter does not look into custom operators: their bodies run in its sight instead.
    for name in ("mrope", "sparse_moe", "kv_update"):
        monkeypatch.setattr(ops, name, getattr(ops, name)._init_fn)
    c = config.llm
    names = input_names(c)
    cache = torch.zeros(batch, c.num_kv_heads, past + tokens, c.head_dim)
    step = {
        "input_ids": torch.randint(0, c.vocab_size, (batch, tokens)),
        "features": torch.zeros(1, c.hidden_size),
        "feature_index": torch.full((batch, tokens), -1),
        "modality": torch.randint(0, 3, (batch, tokens)),
        "position_ids": torch.zeros(3, batch, tokens, dtype=torch.long),
        "write_index": torch.full((batch,), past),
        "attention_mask": torch.ones(batch, 1, tokens, past + tokens, dtype=torch.bool),
        "logit_index": torch.zeros(batch, 1, dtype=torch.long),
    }
    inputs = [step.get(name, cache) for name in names]
    counted = flops(random_module(MingLLM(c)), *inputs)
    # exact: products and attention are all that is counted on both sides
    assert cost.llm_step(c, tokens, past, batch).flops == counted


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 10, 14), (2, 4, 6)])
def test_vision(config: MingConfig, grid: tuple[int, int, int]) -> None:
    indices = vision_indices([list(grid)], config.vision)
    patches = np.zeros((int(np.prod(grid)), config.vision.patch_width), np.float32)
    inputs = [torch.from_numpy(np.asarray(patches if n == "patches" else indices[n])) for n in INPUT_NAMES]
    counted = flops(random_module(VisionEncoder(config.vision, config.llm)), *inputs)
    assert cost.vision(config.vision, config.llm.hidden_size, grid).flops == counted


@pytest.mark.parametrize("frames", [8, 61])
def test_audio(config: MingConfig, frames: int) -> None:
    counted = flops(random_module(AudioEncoder(config.audio, config.llm)), torch.zeros(frames, config.audio.num_mels))
    assert cost.audio(config.audio, config.llm.hidden_size, frames).flops == counted


def matrices(module: torch.nn.Module, *but: str) -> int:
    """Weights of matrices and convolutions; norms, biases and tables are not counted by the model either."""
    return sum(p.numel() for n, p in module.named_parameters() if p.ndim > 1 and not any(word in n for word in but))


def test_weights_are_those_of_the_definitions(config: MingConfig) -> None:
    llm = config.llm
    with torch.device("meta"):
        modules = MingLLM(llm), VisionEncoder(config.vision, llm), AudioEncoder(config.audio, llm)
    # so many tokens that every expert is chosen
    everything = sum(cost.llm_step(llm, 10_000).weights.values())
    assert everything == pytest.approx(matrices(modules[0], "word_embeddings"), rel=1e-9)
    seen = sum(cost.vision(config.vision, llm.hidden_size, (1, 4, 4)).weights.values())
    assert seen == matrices(modules[1])
    assert sum(cost.audio(config.audio, llm.hidden_size, 8).weights.values()) == matrices(
        modules[2], "positional_embedding"
    )


def test_one_token_reads_top_k_experts(config: MingConfig) -> None:
    c = config.llm
    assert cost.distinct_experts(c, 1) == pytest.approx(c.top_k)
    assert c.top_k < cost.distinct_experts(c, 4) < min(c.num_experts, 4 * c.top_k)
    assert cost.distinct_experts(c, 10_000) == pytest.approx(c.num_experts)


def test_bytes_follow_the_schemes_of_the_builders(config: MingConfig) -> None:
    names = {cost.EXPERTS: "experts", cost.ATTENTION: "attention", cost.LINEARS: "linears", cost.HEAD: "head"}
    for precision, scheme in SCHEMES.items():
        for group, field in names.items():
            bits = getattr(scheme, field)
            assert cost.BYTES_PER_WEIGHT[precision][group] == pytest.approx(bits / 8 + 4 / max(BLOCKS))


def official() -> LLMConfig:
    return LLMConfig(
        vocab_size=126464, hidden_size=2048, num_layers=28, num_heads=16, num_kv_heads=4, head_dim=128, num_experts=64,
        top_k=6, expert_width=1408, shared_width=2816, norm_eps=1e-5, rope_theta=6e5, rope_kind="3D",
        rope_sections=(16, 24, 24), max_positions=32768, normalize_top_k=True, multi_gate=True, tie_embeddings=False,
    )  # fmt: skip


def test_official_sizes() -> None:
    """Active bytes per token of the official decoder without its head, as a trial with real kernels counted them."""
    step = dataclasses.replace(official(), num_layers=4)
    for precision, gigabytes, tolerance in (("fp32", 1.28, 0.02), ("bf16", 0.644, 0.02), ("int8", 0.335, 0.02)):
        body = cost.llm_step(step, 1, logits=0).bytes(precision)
        assert body / 1e9 == pytest.approx(gigabytes, rel=tolerance), precision


def test_unknown_precision(config: MingConfig) -> None:
    with pytest.raises(ConfigError, match="int3"):
        cost.llm_step(config.llm, 1).bytes("int3")


def test_sum_and_time() -> None:
    one = cost.Cost(10, {"head": 2.0}) + cost.Cost(5, {"head": 1.0, "experts": 4.0}, cache=3)
    assert (one.flops, one.weights, one.cache) == (15, {"head": 3.0, "experts": 4.0}, 3)
    assert one.bytes("fp32") == 40
    assert one.seconds("fp32", 40, 1e9) == 1
    assert one.seconds("fp32", 1e9, 15) == 1
