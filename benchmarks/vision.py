"""The vision encoder, four layers at full width (three with windows), one picture of 448 x 448 pixels.

python benchmarks/vision.py [--threads N] [--seconds S]
"""

from __future__ import annotations

import numpy as np
from encoder import compare
from harness import arguments
from random_model import config

from builders.vision import Vision
from ming_trt.models import cost
from ming_trt.models.vision import INPUT_NAMES
from ming_trt.processing.vision_index import vision_indices


def main() -> None:
    options = arguments(str(__doc__), pixels={"type": int, "default": 448, "help": "side of the picture"})
    model = config(options.tiny)
    side = 8 if options.tiny else options.pixels // model.vision.patch_size
    grid = (1, side, side)
    indices = vision_indices([list(grid)], model.vision)
    patches = np.random.default_rng(0).standard_normal((side * side, model.vision.patch_width), dtype=np.float32)
    feeds = {name: patches if name == "patches" else indices[name] for name in INPUT_NAMES}
    work = cost.vision(model.vision, model.llm.hidden_size, grid)
    compare("vision", f"{options.pixels} x {options.pixels} pixels", Vision(), model, feeds, work, options)


if __name__ == "__main__":
    main()
