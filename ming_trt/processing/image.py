"""Pictures: encoded bytes to patches, in the reference's two bicubic resize passes.

Pass 1 bounds a picture by the part's own limits (default 3136..802816 pixels); pass 2, the model's own, by
78400..802816 (image generation sets both of its limits to 451584), so that small pictures are enlarged and none exceeds
1024 tokens.
Documents are pictures: a long page keeps its ratio (up to 200:1) within those pixels.

Beyond the reference: the EXIF orientation is applied, transparency is laid over white, 16-bit greys are scaled, and of
an animation the first frame counts. A plain RGB picture gives the reference's values.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ming_trt.errors import InputError
from ming_trt.processing.patches import PatchShape, fit, patchify

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# A decoded picture of this many pixels takes 192 MB; no larger one is decoded.
MAX_DECODED_PIXELS = 64 * 1024 * 1024
MAX_FILE_BYTES = 64 << 20

PixelLimits = tuple[float, float]
# (low, high) in pixels of the first and the second pass.
FIRST_PASS: PixelLimits = (4 * 784, 1024 * 784)
SECOND_PASS: PixelLimits = (78400, 802816)
GENERATION_PASS: PixelLimits = (451584, 451584)

# What Pillow's readers raise on damaged files.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error, OverflowError)


@dataclass(frozen=True, slots=True)
class VisionInput:
    """`pixel_values` f32 [N, 1176] and the grid (t, h, w) in patches, N = t·h·w, of one picture or video."""

    pixel_values: npt.NDArray[np.float32]
    grid: tuple[int, int, int]


def decode_image(data: bytes) -> Image.Image:
    """An encoded picture as RGB, upright. Raises `InputError` where it cannot be read or is too large."""
    if not data:
        raise InputError("the image has 0 bytes: send the content of a PNG, JPEG or WebP file")
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"the image file has {len(data)} bytes, more than {MAX_FILE_BYTES}: send a smaller one")
    try:
        with warnings.catch_warnings():
            # Pillow's own size warning: the limit below is stricter.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(*image.size)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise InputError(
            f"the image of {len(data)} bytes is in no known format: send one of {', '.join(FORMATS)}"
        ) from None
    except Image.DecompressionBombError:
        raise InputError(f"the image has more than {MAX_DECODED_PIXELS} pixels: scale it down") from None
    except _DAMAGED as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"the image of {len(data)} bytes cannot be decoded ({reason}): send an intact file") from None


def image_array(image: Image.Image) -> npt.NDArray[np.uint8]:
    """RGB u8 [H, W, 3]."""
    return np.asarray(image.convert("RGB"), np.uint8)


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Bicubic, antialiased where it shrinks; the picture itself if the size is the same."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def first_pass(
    image: Image.Image, min_pixels: float | None = None, max_pixels: float | None = None, factor: int = 28
) -> Image.Image:
    """The picture after the loader's resize; `min_pixels` and `max_pixels` override its limits."""
    low = FIRST_PASS[0] if min_pixels is None else min_pixels
    high = FIRST_PASS[1] if max_pixels is None else max_pixels
    return resize(image, *fit(image.height, image.width, low, high, factor))


def process_image(
    image: Image.Image | bytes,
    *,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
    pixel_limits: PixelLimits = SECOND_PASS,
    shape: PatchShape | None = None,
) -> VisionInput:
    """A picture to patches. `min_pixels`, `max_pixels` override the limits of pass 1, `pixel_limits` those of pass 2.

    The still counts as two equal frames, so t = 1. Raises `InputError`.
    """
    shape = shape or PatchShape()
    rgb = decode_image(image) if isinstance(image, bytes) else image.convert("RGB")
    loaded = first_pass(rgb, min_pixels, max_pixels, shape.factor)
    final = resize(loaded, *fit(loaded.height, loaded.width, *pixel_limits, shape.factor))
    values, grid = patchify(image_array(final)[None], shape)
    return VisionInput(values, grid)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_DECODED_PIXELS:
        raise InputError(f"the image has {width}x{height} pixels, more than {MAX_DECODED_PIXELS} in all: scale it down")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.mode == "F":
        raise InputError("the image has floating-point pixels: convert it to 8 bits per channel")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    """16-bit greys (modes I;16 and its kin, I): Pillow would clip them at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise InputError(f"the image has grey values up to {values.max()}: convert it to 8 or 16 bits per channel")
    grey = (values + 128) // 257
    return Image.fromarray(grey.astype(np.uint8), "L").convert("RGB")
