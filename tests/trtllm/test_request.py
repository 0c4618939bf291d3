"""What a request carries: the rotary table and the coded prompt."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.config import ROPE_3D, ROPE_VIDEO, LLMConfig, load_config
from ming_trt.errors import InputError
from ming_trt.models import rope
from ming_trt.trtllm.prompt_table import modality_of, prompt_table
from ming_trt.trtllm.rope_table import frequency_axes, rope_table
from tests.conftest import UNDERSTANDING

CONFIG = load_config(UNDERSTANDING / "checkpoint").llm


@pytest.mark.parametrize("kind", [ROPE_3D, ROPE_VIDEO])
@given(length=st.integers(1, 40), rest=st.integers(0, 20), delta=st.integers(-5, 50), seed=st.integers(0, 1000))
def test_table_is_the_models_rope(kind: str, length: int, rest: int, delta: int, seed: int) -> None:
    """Cosines and sines of the torch definition; float32 angles up to 3000 differ by an ulp: 4e-4."""
    config = dataclasses.replace(CONFIG, rope_kind=kind)
    positions = np.random.default_rng(seed).integers(0, 3000, (3, length))
    table = rope_table(config, positions, delta, length + rest)
    assert table.dtype == np.float32 and table.shape == ((length + rest) * config.head_dim,)
    pairs = table.reshape(length + rest, config.head_dim // 2, 2)
    after = np.tile(np.arange(length, length + rest) + delta, (3, 1))
    places = torch.from_numpy(np.concatenate((positions, after), axis=1))[:, None]
    cos, sin = rope.cos_sin(places, config.rope_theta, kind, config.rope_sections)
    np.testing.assert_allclose(pairs[..., 0], cos[0].numpy(), atol=4e-4)
    np.testing.assert_allclose(pairs[..., 1], sin[0].numpy(), atol=4e-4)


@pytest.mark.parametrize("kind", [ROPE_3D, ROPE_VIDEO])
def test_axes_are_the_models(kind: str) -> None:
    sections = (16, 24, 24)
    assert frequency_axes(kind, sections).tolist() == rope.frequency_axes(kind, sections)


def test_too_long_a_prompt() -> None:
    with pytest.raises(InputError, match="has 9 tokens and the engine's rotary table 8 places"):
        rope_table(CONFIG, np.zeros((3, 9)), 0, 8)


@given(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=60), st.integers(300, 130_000), st.randoms())
def test_coding_keeps_rows_and_modality(codes: list[int], vocabulary: int, random: np.random.RandomState) -> None:
    """Ids below the vocabulary stay; each media id finds its own row; the modality can be read from the id alone."""
    modality = np.array(codes)
    media = int((modality > 0).sum())
    order = list(range(media))
    random.shuffle(order)
    index = np.full(len(codes), -1)
    index[modality > 0] = order
    features = np.arange(media * 4, dtype=np.float32).reshape(media, 4)
    ids = np.arange(len(codes)) % 300
    made = prompt_table(ids, modality, index, features, vocabulary, 200)
    assert made.input_ids.dtype == np.int32
    assert (modality_of(made.input_ids, vocabulary) == modality).all()
    text = modality == 0
    assert (made.input_ids[text] == ids[text]).all()
    rows = made.input_ids[~text] - vocabulary
    assert len(set(rows.tolist())) == media and (rows < len(made.rows)).all()
    assert (made.rows[rows] == features[index[~text]]).all()
    # at most every second place is empty
    assert len(made.rows) <= 2 * media


def test_limits() -> None:
    features = np.ones((3, 4), np.float32)
    with pytest.raises(InputError, match="take 5 places of the engine's table of 4"):
        prompt_table([1, 1, 1], [1, 1, 1], [0, 1, 2], features, 320, 4)
    with pytest.raises(InputError, match="modality but no row"):
        prompt_table([1, 1], [1, 0], [-1, -1], features, 320, 4)
    with pytest.raises(InputError, match="above 16777216"):
        prompt_table([1, 1, 1], [1, 1, 1], [0, 1, 2], features, 16777213, 10)


def test_text_only() -> None:
    made = prompt_table([4, 5], [0, 0], [-1, -1], np.zeros((0, 8), np.float32), 320, 0)
    assert made.rows.shape == (0, 8) and made.input_ids.tolist() == [4, 5]


def official() -> LLMConfig:
    """The published sizes."""
    return dataclasses.replace(CONFIG, head_dim=128, rope_sections=(16, 24, 24), rope_theta=6e5)


def test_size_of_the_official_table() -> None:
    assert rope_table(official(), np.zeros((3, 1)), 0, 8192).nbytes == 4 << 20
