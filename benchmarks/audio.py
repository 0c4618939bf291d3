"""The audio encoder, four layers at full width, one clip of 30 seconds.

python benchmarks/audio.py [--threads N] [--seconds S] [--clip SECONDS]
"""

from __future__ import annotations

import numpy as np
from encoder import compare
from harness import arguments
from random_model import config

from builders.audio_encoder import Audio
from ming_trt.models import cost


def main() -> None:
    options = arguments(str(__doc__), clip={"type": int, "default": 30, "help": "length of the clip in seconds"})
    model = config(options.tiny)
    frames = 100 * (2 if options.tiny else options.clip)
    mel = np.random.default_rng(0).uniform(-1, 1, (frames, model.audio.num_mels)).astype(np.float32)
    work = cost.audio(model.audio, model.llm.hidden_size, frames)
    compare("audio", f"{frames // 100} s", Audio(), model, {"mel": mel}, work, options)


if __name__ == "__main__":
    main()
