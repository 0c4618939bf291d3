"""Options of a drawing request: presets, limits, and values that are none."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.errors import InputError
from ming_trt.processing.draw import MAX_STEPS, PRESETS, DrawOptions, draw_options


def test_presets() -> None:
    assert draw_options("draw", {}) == PRESETS["july"] == DrawOptions(512, 512, 30, 5.0, 1.0, 1, 0)
    assert draw_options("draw", {"preset": "september"}) == DrawOptions(512, 512, 30, 5.0, 2.0, 1, -1)
    changed = draw_options("draw", {"preset": "september", "image_cfg": 1.5, "steps": 7})
    assert (changed.image_cfg, changed.steps, changed.seed) == (1.5, 7, -1)


@given(st.integers(1, MAX_STEPS), st.floats(0, 50), st.integers(1, 6), st.integers(-1, 2**63 - 1))
def test_options_survive_json(steps: int, cfg: float, mode: int, seed: int) -> None:
    options = DrawOptions(steps=steps, cfg=cfg, cfg_mode=mode, seed=seed)
    assert draw_options("draw", asdict(options)) == options


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"steps": 1000},
        {"steps": 2.5},
        {"steps": True},
        {"cfg": -1},
        {"cfg": float("nan")},
        {"cfg": 51},
        {"image_cfg": -0.5},
        {"cfg_mode": 0},
        {"cfg_mode": 7},
        {"seed": -2},
        {"seed": "1"},
        {"width": 0},
        {"height": 100000},
        {"preview_every": -1},
        {"preset": "june"},
        {"colour": "red"},
    ],
)
def test_bad_values_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        draw_options("draw", bad)
    name = next(iter(bad))
    if name not in ("preset", "colour"):
        with pytest.raises(InputError, match=name):
            DrawOptions(**bad)


@pytest.mark.parametrize("bad", [None, [], "512x512", 3])
def test_not_an_object(bad: Any) -> None:
    with pytest.raises(InputError, match="draw"):
        draw_options("draw", bad)
