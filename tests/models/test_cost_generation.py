"""The cost model of drawing and speaking against PyTorch's own counter, for configurations of many sizes.

All is exact: products and attention are what is counted on both sides. Modules and inputs are on the `meta` device,
where nothing is multiplied.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ming_trt.image_config import ConditionConfig, ConnectorConfig, DiTConfig, VAEConfig
from ming_trt.models import cost, cost_image, cost_speech, ops
from ming_trt.models.condition import Condition
from ming_trt.models.connector import Connector
from ming_trt.models.dit import DiT
from ming_trt.models.flow import FlowEncoder, encoder_caches
from ming_trt.models.flow_estimator import FlowEstimator, estimator_caches
from ming_trt.models.hift import F0Predictor, Vocoder
from ming_trt.models.talker import Talker
from ming_trt.models.vae import VAEDecoder, VAEEncoder
from ming_trt.speech_config import FlowConfig, HiftConfig, TalkerConfig

FEW = settings(deadline=None, max_examples=6)
counts = st.integers(1, 4)
DIT = DiTConfig(16, 2, 1536, 24, 64, 24, tuple(range(13)), 2, True, 128, 384, 128, True)
TALKER = TalkerConfig(184445, 151677, 896, 24, 14, 2, 64, 4864, 1e-6, 1e6, False, 2048, 192)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def whole(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int64)


def made(kind: type[nn.Module], config: object) -> nn.Module:
    with torch.device("meta"):
        return kind(config)


def flops(module: nn.Module, *inputs: torch.Tensor) -> int:
    with (
        pytest.MonkeyPatch.context() as patch,
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        # fused kernels are not known to the counter, nor are custom operators: it sees plain products
        sdpa_kernel(SDPBackend.MATH),
    ):
        patch.setattr(ops, "kv_update", ops.kv_update._init_fn)
        module(*inputs)
    return counter.get_total_flops()


def matrices(module: nn.Module, *but: str) -> int:
    """Weights of matrices and convolutions; norms, biases and tables are not counted by the model either."""
    return sum(p.numel() for n, p in module.named_parameters() if p.ndim > 1 and not any(word in n for word in but))


def weights(found: cost.Cost) -> float:
    return sum(found.weights.values())


@st.composite
def layers(draw: st.DrawFn) -> tuple[int, int, int, int, int, int]:
    """hidden, intermediate, layers, heads, kv_heads, head_dim"""
    shared, keys = draw(counts), draw(counts)
    return 8 * draw(counts), 4 * draw(counts), draw(counts), shared * keys, keys, 2 * draw(counts)


connectors = layers().map(lambda s: ConnectorConfig(24, *s, 1e6, 1e-6))


@FEW
@given(connectors, st.integers(1, 300))
def test_connector(config: ConnectorConfig, tokens: int) -> None:
    module, found = made(Connector, config), cost_image.connector(config, tokens)
    assert found.flops == flops(module, meta(1, tokens, config.llm_hidden))
    assert weights(found) == matrices(module)


@FEW
@given(st.tuples(*[st.integers(1, 50)] * 2), st.integers(1, 6), st.integers(1, 300))
def test_condition(sizes: tuple[int, int], groups: int, tokens: int) -> None:
    config = ConditionConfig(sizes[0], sizes[1], 6 * groups, 6, 32)
    module, found = made(Condition, config), cost_image.condition(config, tokens)
    assert found.flops == flops(module, meta(1, tokens, config.llm_hidden))
    assert weights(found) == matrices(module)


@st.composite
def denoisers(draw: st.DrawFn) -> DiTConfig:
    heads, head_dim, depth = draw(counts), 4 * draw(counts), draw(counts)
    dual = tuple(sorted(draw(st.sets(st.integers(0, depth - 1)))))
    return DiTConfig(
        draw(counts), 2, heads * head_dim, heads, head_dim, depth, dual, draw(counts), True, 32, 32, 32, True
    )


@FEW
@given(
    denoisers(),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 6),
    st.booleans(),
    st.integers(1, 64),
)
def test_dit(config: DiTConfig, height: int, width: int, rows: int, reference: bool, tokens: int) -> None:
    h, w, own = 2 * height, 2 * width, height * width
    other = (h, w) if reference else (2, 2)
    module, found = made(DiT, config), cost_image.dit(config, h, w, rows, reference, tokens)
    counted = flops(
        module, meta(rows, config.channels, h, w), meta(rows), meta(rows, tokens, config.hidden),
        meta(rows, config.hidden), meta(rows, config.channels, *other), whole(2 * own if reference else own),
    )  # fmt: skip
    assert found.flops == counted
    assert weights(found) == matrices(module, "pos_embed.pos_embed")


@st.composite
def autoencoders(draw: st.DrawFn) -> VAEConfig:
    widths = tuple(2 * width for width in draw(st.lists(counts, min_size=1, max_size=4)))
    flags = [draw(st.booleans()) for _ in range(3)]
    return VAEConfig(draw(counts), draw(counts), widths, draw(counts), 2, *flags, 1.0, 0.0)  # type: ignore[misc]


@FEW
@given(autoencoders(), st.integers(2, 8), st.integers(1, 8))
def test_autoencoder(config: VAEConfig, height: int, width: int) -> None:
    picture = height * config.factor, width * config.factor
    encoder, found = made(VAEEncoder, config), cost_image.vae_encoder(config, *picture)
    assert found.flops == flops(encoder, meta(1, config.picture_channels, *picture))
    assert weights(found) == matrices(encoder)
    decoder, found = made(VAEDecoder, config), cost_image.vae_decoder(config, height, width)
    assert found.flops == flops(decoder, meta(1, config.latent_channels, height, width))
    assert weights(found) == matrices(decoder)


talkers = layers().map(lambda s: TalkerConfig(90, 60, s[0], *s[2:], s[1], 1e-6, 1e6, False, 24, 12))


@FEW
@given(talkers, st.integers(1, 40), st.integers(0, 90), st.integers(1, 3), st.integers(1, 9))
def test_talker(config: TalkerConfig, tokens: int, past: int, batch: int, rows: int) -> None:
    cache = meta(batch, config.kv_heads, past + tokens, config.head_dim)
    ids = whole(batch, tokens)
    module, found = made(Talker, config), cost_speech.talker_step(config, tokens, past, batch, rows)
    counted = flops(
        module, ids, ids, meta(1, config.speaker_dim), ids, meta(rows, config.thinker_hidden), ids, ids, whole(batch),
        meta(batch, 1, tokens, past + tokens, dtype=torch.bool), whole(batch, 1), *[cache] * (2 * config.layers),
    )  # fmt: skip
    assert found.flops == counted
    assert weights(found) == matrices(module, "embed_tokens")
    assert found.cache == 2 * config.layers * batch * past * config.kv_heads * config.head_dim


@st.composite
def flows(draw: st.DrawFn) -> FlowConfig:
    heads, head_dim, channels = draw(counts), 2 * draw(counts), 4 * draw(counts)
    sizes = [draw(counts) for _ in range(6)]
    return FlowConfig(
        50, heads * head_dim, heads, 8 * sizes[0], *sizes[1:4], 6, 10, channels, 12, *sizes[4:], draw(counts),
        2 * draw(counts), 4 * draw(counts), 50, 0.7,
    )  # fmt: skip


def past_of(shapes: dict[str, tuple[int, ...]], rows: int, capacity: int) -> list[torch.Tensor]:
    return [meta(rows, *(capacity if size < 0 else size for size in shape)) for shape in shapes.values()]


@FEW
@given(flows(), st.integers(1, 60), st.integers(0, 90))
def test_flow_encoder(config: FlowConfig, codes: int, past: int) -> None:
    module, found = made(FlowEncoder, config), cost_speech.flow_encoder(config, codes, past)
    counted = flops(
        module, whole(1, codes), whole(1, config.look_ahead), meta(1, config.look_ahead, 1), whole(1),
        meta(1, 1, codes, past + codes, dtype=torch.bool), meta(1, config.speaker_dim),
        *past_of(encoder_caches(config), 1, past + codes),
    )  # fmt: skip
    assert found.flops == counted
    assert weights(found) == matrices(module, "input_embedding", "pos_bias")
    assert found.cache == sum(each.numel() for each in past_of(encoder_caches(config), 1, past)[2:])


@FEW
@given(flows(), st.integers(1, 60), st.integers(0, 90), st.sampled_from([1, 2, 4]))
def test_flow_estimator(config: FlowConfig, frames: int, past: int, rows: int) -> None:
    module, found = made(FlowEstimator, config), cost_speech.flow_estimator(config, frames, past, rows)
    part, shapes = meta(rows, config.mel, frames), estimator_caches(config)
    counted = flops(
        module, part, part, meta(rows, config.mel), part, meta(rows), whole(rows),
        meta(rows, 1, frames, past + frames, dtype=torch.bool), *past_of(shapes, rows, past + frames),
    )  # fmt: skip
    assert found.flops == counted
    assert weights(found) == matrices(module)
    keys = [each for name, each in zip(shapes, past_of(shapes, rows, past), strict=True) if "frames" not in name]
    assert found.cache == sum(each.numel() for each in keys)


@st.composite
def vocoders(draw: st.DrawFn) -> HiftConfig:
    rates = tuple(draw(st.lists(st.sampled_from([2, 3, 4, 5, 8]), min_size=1, max_size=3)))
    # officially: so wide that a place of the result has two of the input, or a little more than it
    kernels = tuple(rate + 2 * draw(counts) for rate in rates)
    odd = st.sampled_from([3, 5, 7])
    branches = tuple(draw(st.lists(odd, min_size=1, max_size=3)))
    dilations = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=3)))
    sources = tuple(draw(odd) for _ in rates)
    hop = draw(counts)
    return HiftConfig(
        5, 16 * draw(counts), draw(counts), 24000, 7, rates, kernels, branches, sources, dilations, 4 * hop, hop,
        0.1, 0.99, "", "weight",
    )  # fmt: skip


@FEW
@given(vocoders(), st.integers(4, 60))
def test_vocoder(config: HiftConfig, frames: int) -> None:
    module, found = made(Vocoder, config), cost_speech.vocoder(config, frames)
    source, harmonics = meta(1, frames, config.hop), config.harmonics + 1
    counted = flops(
        module, meta(1, config.mel, frames), meta(1, frames), meta(1, harmonics),
        meta(1, frames, config.hop, harmonics), source, meta(1, frames, dtype=torch.bool),
    )  # fmt: skip
    assert found.flops == counted
    assert weights(found) == matrices(module)


@FEW
@given(vocoders(), st.integers(1, 60))
def test_f0_predictor(config: HiftConfig, frames: int) -> None:
    module, found = made(F0Predictor, config), cost_speech.f0_predictor(config, frames)
    assert found.flops == flops(module, meta(1, config.mel, frames))
    assert weights(found) == matrices(module)


def test_a_run_twice_reads_its_weights_twice() -> None:
    one = cost_image.dit(DIT, 64, 64)
    assert (one * 3).flops == 3 * one.flops and weights(one * 3) == 3 * weights(one)
    spoken = cost_speech.talker_step(TALKER, 1, 100)
    assert cost.total([spoken] * 4) == spoken * 4


def test_official_sizes_are_of_the_known_magnitude() -> None:
    """The released weights: a denoiser of two billion and a talker of half a billion, whose embeddings are not read."""
    assert weights(cost_image.dit(DIT, 64, 64)) == pytest.approx(2.4e9, rel=0.1)
    body = weights(cost_speech.talker_step(TALKER)) - TALKER.hidden * TALKER.vocab_size
    assert body == pytest.approx(0.36e9, rel=0.05)
