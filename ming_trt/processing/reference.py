"""The picture that an edit starts from, as the VAE encoder takes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ming_trt.processing.image_size import FittedSize, fit_size


@dataclass(frozen=True, slots=True)
class Reference:
    """An edit's reference picture; its size is also the size of the result.

    pixels: u8 [H, W, 3], cropped to the bucket `size`.
    """

    pixels: npt.NDArray[np.uint8]
    size: FittedSize

    def vae_input(self) -> npt.NDArray[np.float32]:
        """f32 [1, 3, H, W] in [-1, 1]."""
        unit = self.pixels.astype(np.float32) / np.float32(255)
        values: npt.NDArray[np.float32] = (unit - np.float32(0.5)) * np.float32(2)
        return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def prepare_reference(picture: Image.Image) -> Reference:
    """Covers the nearest bucket with an RGB picture (bilinear, antialiased) and crops it at the centre.

    `picture` is what the LLM's first resize pass made (`processing.image`), not the file: the model was trained with
    the reference resized twice, and the first pass can even change the bucket.
    """
    size = fit_size(picture.height, picture.width)
    resized = picture.convert("RGB").resize((size.resize_width, size.resize_height), Image.Resampling.BILINEAR)
    top = round((size.resize_height - size.height) / 2)
    left = round((size.resize_width - size.width) / 2)
    cropped = resized.crop((left, top, left + size.width, top + size.height))
    return Reference(np.asarray(cropped, np.uint8), size)
