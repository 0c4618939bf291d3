"""The flow in parts: equal to the whole, and independent of what must not be seen."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ming_trt.checkpoint import Checkpoint
from ming_trt.models.detokenizer_weights import encoder_weights, estimator_weights
from ming_trt.models.flow import FlowEncoder, encoder_caches
from ming_trt.models.flow_estimator import FlowEstimator, estimator_caches
from ming_trt.models.weights import load_weights
from ming_trt.speech_config import load_speech_config

CHECKPOINT = Path(__file__).parents[1] / "data" / "golden" / "generation" / "checkpoint"
CONFIG = load_speech_config(CHECKPOINT).flow
CHUNK = 6  # smaller than the model's, for speed
# Float32 sums of some hundred terms in another order.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def encoder() -> FlowEncoder:
    with torch.device("meta"):
        module = FlowEncoder(CONFIG)
    return load_weights(module, Checkpoint(CHECKPOINT), encoder_weights(CONFIG))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def estimator() -> FlowEstimator:
    with torch.device("meta"):
        module = FlowEstimator(CONFIG)
    return load_weights(module, Checkpoint(CHECKPOINT), estimator_weights(CONFIG))  # type: ignore[return-value]


def zeros(shapes: dict[str, tuple[int, ...]], rows: int, capacity: int) -> list[torch.Tensor]:
    return [torch.zeros(rows, *(capacity if size < 0 else size for size in shape)) for shape in shapes.values()]


def mask(start: int, length: int, capacity: int) -> torch.Tensor:
    query, key = start + torch.arange(length)[:, None], torch.arange(capacity)
    return ((key < (query // CHUNK + 1) * CHUNK) & (key < start + length))[None, None]


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 40), st.integers(0, 99))
def test_encoder_in_parts(encoder: FlowEncoder, count: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, CONFIG.vocabulary, (1, count), generator=draw)
    speaker = torch.randn(1, CONFIG.speaker_dim, generator=draw)
    look_ahead, capacity = CONFIG.look_ahead, count + 5

    def run(start: int, length: int, past: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        follow = codes[:, start + length : start + length + look_ahead]
        ahead = torch.zeros(1, look_ahead, dtype=torch.int64)
        ahead[:, : follow.shape[1]] = follow
        look = (torch.arange(look_ahead) < follow.shape[1]).float()[None, :, None]
        part, write = codes[:, start : start + length], torch.tensor([start])
        mu, _, *present = encoder(part, ahead, look, write, mask(start, length, capacity), speaker, *past)
        return mu, present

    with torch.no_grad():
        whole, _ = run(0, count, zeros(encoder_caches(CONFIG), 1, capacity))
        parts, past = [], zeros(encoder_caches(CONFIG), 1, capacity)
        for start in range(0, count, CHUNK):
            mu, past = run(start, min(CHUNK, count - start), past)
            parts.append(mu)
    assert torch.allclose(torch.cat(parts, dim=2), whole, atol=TOLERANCE)


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 40), st.integers(0, 99))
def test_estimator_in_parts(estimator: FlowEstimator, count: int, seed: int) -> None:
    draw, rows = torch.Generator().manual_seed(seed), 2
    z, mu, cond = (torch.randn(rows, CONFIG.mel, count, generator=draw) for _ in range(3))
    spk, time, capacity = torch.randn(rows, CONFIG.mel, generator=draw), torch.tensor([0.1, 0.8]), count + 3

    def run(start: int, length: int, past: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        part = slice(start, start + length)
        seen = mask(start, length, capacity).expand(rows, -1, -1, -1)
        write = torch.full((rows,), start)
        velocity, *present = estimator(z[:, :, part], mu[:, :, part], spk, cond[:, :, part], time, write, seen, *past)
        return velocity, present

    with torch.no_grad():
        whole, _ = run(0, count, zeros(estimator_caches(CONFIG), rows, capacity))
        parts, past = [], zeros(estimator_caches(CONFIG), rows, capacity)
        for start in range(0, count, CHUNK):
            velocity, past = run(start, min(CHUNK, count - start), past)
            parts.append(velocity)
    assert torch.allclose(torch.cat(parts, dim=2), whole, atol=TOLERANCE)


def test_full_size_has_the_published_number_of_parameters() -> None:
    """110,762,992 in the flow and 20,821,295 in the vocoder, with the official configuration."""
    from ming_trt.models.hift import F0Predictor, Vocoder
    from ming_trt.speech_config import FlowConfig, HiftConfig

    flow = FlowConfig(4096, 512, 8, 2048, 6, 4, 3, 80, 192, 256, 1024, 12, 4, 8, 64, 1024, 50, 0.7)
    hift = HiftConfig(
        80,
        512,
        8,
        24000,
        512,
        (8, 5, 3),
        (16, 11, 7),
        (3, 7, 11),
        (7, 7, 11),
        (1, 3, 5),
        16,
        4,
        0.1,
        0.99,
        "",
        "weight",
    )
    with torch.device("meta"):
        modules = [FlowEncoder(flow), FlowEstimator(flow)]
        vocoder = [Vocoder(hift), F0Predictor(hift)]
    assert sum(p.numel() for m in modules for p in m.parameters()) == 110_762_992
    convolutions = {
        f"{i}.{name}": module
        for i, part in enumerate(vocoder)
        for name, module in part.named_modules()
        if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d) and not name.startswith("source_downs")
    }
    # weight norm stores a length for each entry of the first dimension
    lengths = sum(module.weight.shape[0] for module in convolutions.values())
    assert sum(p.numel() for m in vocoder for p in m.parameters()) + lengths == 20_821_295
