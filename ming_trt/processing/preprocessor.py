"""What the checkpoint's `preprocessor_config.json` says of pictures: the limits of the model's own resize pass.

The rest of the file is the same in every checkpoint of the model, and is built in; another value is refused.
"""

from __future__ import annotations

import math
from pathlib import Path

from ming_trt.errors import ConfigError
from ming_trt.json_section import Section, read_json
from ming_trt.processing.image import SECOND_PASS, PixelLimits
from ming_trt.processing.patches import MEAN, STD

FILE = "preprocessor_config.json"
_BICUBIC = 3  # as Pillow counts


def second_pass(folder: Path) -> PixelLimits:
    """(low, high) in pixels; the official ones where `folder` lacks the file. Raises `ConfigError`."""
    file = Path(folder) / FILE
    if not file.is_file():
        return SECOND_PASS
    section = Section(read_json(file), "preprocessor_config", file)
    for key in ("do_resize", "do_rescale", "do_normalize"):
        section.refuse(key, True)
    section.refuse("resample", _BICUBIC)
    for key, built_in in (("image_mean", MEAN), ("image_std", STD)):
        given = section.values.get(key)
        if given is not None and not _same(given, built_in):
            raise ConfigError(f"'{key}' in '{file}' is {given!r}, but only {list(built_in)} is implemented")
    low, high = section.count("min_pixels", int(SECOND_PASS[0])), section.count("max_pixels", int(SECOND_PASS[1]))
    if low > high:
        raise ConfigError(f"'min_pixels' {low} in '{file}' is above 'max_pixels' {high}: download the file again")
    return low, high


def _same(given: object, built_in: tuple[float, ...]) -> bool:
    return (
        isinstance(given, list)
        and len(given) == len(built_in)
        and all(
            isinstance(a, int | float) and math.isclose(a, b, rel_tol=1e-6)
            for a, b in zip(given, built_in, strict=True)
        )
    )
