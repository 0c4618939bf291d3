"""The limits of pictures that a checkpoint states itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ming_trt.errors import ConfigError
from ming_trt.golden.tokenizer import ByteTokenizer
from ming_trt.mini.understanding import _PREPROCESSOR
from ming_trt.processing.image import SECOND_PASS
from ming_trt.processing.prepare import Processor
from ming_trt.processing.preprocessor import FILE, second_pass
from ming_trt.processing.request import parse_request

from ..picture import cases, config
from .test_picture import _png


def written(folder: Path, **changes: Any) -> Path:
    (folder / FILE).write_text(json.dumps({**_PREPROCESSOR, **changes}))
    return folder


def test_official_limits(tmp_path: Path) -> None:
    assert second_pass(tmp_path) == SECOND_PASS
    assert second_pass(written(tmp_path)) == SECOND_PASS


def test_a_processor_takes_those_of_its_checkpoint(tmp_path: Path) -> None:
    sizes = replace(config(), folder=written(tmp_path, min_pixels=784, max_pixels=28 * 28 * 12))
    processor = Processor(sizes, ByteTokenizer.from_cases(cases().index))
    request = parse_request({"messages": [{"role": "user", "content": [{"type": "image"}]}]})
    grid = processor.prepare(request, [_png(np.zeros((112, 224, 3), np.uint8))]).image_grid
    assert grid.tolist() == [[1, 4, 8]], "8 cells; the official limits ask for 100 at least"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, r"'image_mean' in .* is \[0.5, 0.5, 0.5\], but only"),
        ({"image_std": 1}, "'image_std' in .* is 1, but only"),
        ({"resample": 2}, "'preprocessor_config.resample' is 2"),
        ({"min_pixels": 10, "max_pixels": 5}, "'min_pixels' 10 in .* is above 'max_pixels' 5"),
        ({"min_pixels": 0}, "expected at least 1"),
    ],
)
def test_others_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        second_pass(written(tmp_path, **changes))
