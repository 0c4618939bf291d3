"""How a picture is to be drawn: the options of a request, their limits, and the named sets of defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ming_trt.processing.fields import Check, choice, fields, integer, number
from ming_trt.processing.image_size import MAX_SIDE

MAX_STEPS = 200
MAX_CFG = 50.0
MODES = (1, 2, 3, 4, 5, 6)
MAX_SEED = (1 << 63) - 1

_CHECKS: dict[str, Check] = {
    "width": integer(1, MAX_SIDE),
    "height": integer(1, MAX_SIDE),
    "steps": integer(1, MAX_STEPS),
    "cfg": number(0, MAX_CFG),
    "image_cfg": number(0, MAX_CFG),
    "cfg_mode": integer(MODES[0], MODES[-1]),
    "seed": integer(-1, MAX_SEED),
    "preview_every": integer(0, MAX_STEPS),
}


@dataclass(frozen=True, slots=True)
class DrawOptions:
    """`width` and `height` in pixels are asked for; the size bucket nearest to them is drawn. An edit takes the size
    of its reference picture instead. `cfg` weighs the prompt, `image_cfg` (above 1) the reference picture, `cfg_mode`
    says how (see `runtime.flow_match.Guidance`). `seed` -1: a random one. A preview is made every `preview_every`
    steps, 0 = never. Raises `InputError` for a value out of range.
    """

    width: int = 512
    height: int = 512
    steps: int = 30
    cfg: float = 5.0
    image_cfg: float = 1.0
    cfg_mode: int = 1
    seed: int = 0
    preview_every: int = 0

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))


# The defaults of the release of July 2025, and those that the model's SDK set in September.
PRESETS: Mapping[str, DrawOptions] = {
    "july": DrawOptions(),
    "september": DrawOptions(image_cfg=2.0, seed=-1),
}


def draw_options(name: str, value: Any) -> DrawOptions:
    """The options in a request's JSON object: keys of `DrawOptions`, and `preset`, whose values stand for absent keys.

    Raises `InputError`.
    """
    given = fields(f"'{name}'", value, {**_CHECKS, "preset": choice(tuple(PRESETS))})
    return replace(PRESETS[given.pop("preset", "july")], **given)
