"""Schedule, guidance and noise against the reference cases, torch, and their own algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.errors import InputError
from ming_trt.image_config import schedule_config
from ming_trt.processing.draw import MAX_STEPS
from ming_trt.runtime.flow_match import Branch, FlowMatchSchedule, Guidance, initial_noise

from ..picture import cases, config

NEITHER, PICTURE, PROMPT, BOTH = (False, False), (False, True), (True, False), (True, True)


@pytest.fixture(scope="module")
def schedule() -> FlowMatchSchedule:
    read = schedule_config(config())
    return FlowMatchSchedule(read.shift, read.train_steps)


@pytest.mark.parametrize("steps", [4, 20, 30])
def test_levels(schedule: FlowMatchSchedule, steps: int) -> None:
    sigmas, times = schedule.levels(steps)
    cases().check(f"sched.{steps}.sigmas", sigmas)
    cases().check(f"sched.{steps}.timesteps", times)


@given(st.integers(1, MAX_STEPS))
def test_levels_fall_to_zero(steps: int) -> None:
    sigmas, times = FlowMatchSchedule(3.0).levels(steps)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (np.diff(sigmas) < 0).all()
    assert times.shape == (steps,) and sigmas.shape == (steps + 1,)


@pytest.mark.parametrize("steps", [0, -1, MAX_STEPS + 1, 1000])
def test_steps_out_of_range(schedule: FlowMatchSchedule, steps: int) -> None:
    with pytest.raises(InputError, match="denoising steps"):
        schedule.levels(steps)


NUMBERS = st.floats(-10, 10, width=32)


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.floats(0, 20, width=32), st.floats(1.015625, 20, width=32))
def test_guidance_formulas(u: float, i: float, x: float, f: float, g: float, a: float) -> None:
    values = {NEITHER: u, PICTURE: i, PROMPT: x, BOTH: f}
    expected = {
        1: u + a * (i - u) + g * (f - i),
        2: u + a * (i - u),
        3: x + a * (f - x),
        4: u + g * (x - u),
        5: i + g * (f - i),
        6: u + g * (x - u) + a * (i - u),
    }
    for mode, value in expected.items():
        guidance = Guidance(g, a, mode)
        given_rows = _rows(guidance, True, values)
        # float32 sums of terms up to 20 * 20
        np.testing.assert_allclose(guidance.combine(given_rows, True), value, atol=2e-3)
    plain = Guidance(g, 1.0, 3)
    np.testing.assert_allclose(plain.combine(_rows(plain, True, values), True), i + g * (f - i), atol=2e-3)
    np.testing.assert_allclose(plain.combine(_rows(plain, False, values), False), u + g * (x - u), atol=2e-3)


def _rows(guidance: Guidance, reference: bool, values: dict[Branch, float]) -> dict[Branch, np.ndarray]:
    return {branch: np.array([values[branch]], np.float32) for branch in guidance.branches(reference)}


@given(st.integers(0, 2**63), st.lists(st.integers(1, 7), min_size=1, max_size=4).filter(lambda s: np.prod(s) >= 16))
def test_noise_is_torchs(seed: int, shape: list[int]) -> None:
    """Within 1e-6: torch's vectorised log, sin and cos round differently from numpy's in the last places."""
    torch.manual_seed(seed)
    expected = torch.randn(shape).numpy()
    np.testing.assert_allclose(initial_noise(seed, tuple(shape)), expected, atol=1e-6)


def test_noise_of_the_cases() -> None:
    expected = cases().array("loop.edit.noise")
    got = initial_noise(cases().index["loop"]["noise_seed"], expected.shape)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_too_little_noise() -> None:
    with pytest.raises(InputError, match="at least 16"):
        initial_noise(0, (3, 5))
