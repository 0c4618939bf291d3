"""Size buckets of image generation: which picture sizes the denoiser was trained on, and how any size is fitted to one.

The model draws only these sizes. A requested size, or a reference picture, goes to the bucket whose ratio height/width
is nearest; a picture is then resized so that it covers the bucket and cropped at its centre.
"""

from __future__ import annotations

from dataclasses import dataclass

from ming_trt.errors import InputError

# (ratio as the model names it, height, width). The stated ratio decides, not height / width: it is rounded.
BUCKETS: tuple[tuple[float, int, int], ...] = (
    (0.25, 256, 1024),
    (0.26, 256, 992),
    (0.27, 256, 960),
    (0.28, 256, 928),
    (0.32, 288, 896),
    (0.33, 288, 864),
    (0.35, 288, 832),
    (0.4, 320, 800),
    (0.42, 320, 768),
    (0.48, 352, 736),
    (0.5, 352, 704),
    (0.52, 352, 672),
    (0.57, 384, 672),
    (0.6, 384, 640),
    (0.68, 416, 608),
    (0.72, 416, 576),
    (0.78, 448, 576),
    (0.82, 448, 544),
    (0.88, 480, 544),
    (0.94, 480, 512),
    (1.0, 512, 512),
    (1.07, 512, 480),
    (1.13, 544, 480),
    (1.21, 544, 448),
    (1.29, 576, 448),
    (1.38, 576, 416),
    (1.46, 608, 416),
    (1.67, 640, 384),
    (1.75, 672, 384),
    (2.0, 704, 352),
    (2.09, 736, 352),
    (2.4, 768, 320),
    (2.5, 800, 320),
    (2.89, 832, 288),
    (3.0, 864, 288),
    (3.11, 896, 288),
    (3.62, 928, 256),
    (3.75, 960, 256),
    (3.88, 992, 256),
    (4.0, 1024, 256),
)

MAX_SIDE = 16384  # of a requested size, in pixels: beyond it the ratio is surely a mistake
MAX_RATIO = 16.0  # long side : short side that a bucket (at most 4:1) can still stand for


@dataclass(frozen=True, slots=True)
class FittedSize:
    """A bucket, and the size to which a picture is resized before it is cropped to the bucket; all in pixels."""

    height: int
    width: int
    resize_height: int
    resize_width: int


def fit_size(height: int, width: int) -> FittedSize:
    """The bucket for a picture of `height` x `width` pixels. A bucket's own size maps to itself.

    Raises `InputError` for sizes that no bucket can stand for: sides below 1 or above `MAX_SIDE`.
    """
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise InputError(f"picture size {width}x{height}: each side must be between 1 and {MAX_SIDE} pixels")
    ratio = height / width
    _, bucket_h, bucket_w = min(BUCKETS, key=lambda bucket: abs(bucket[0] - ratio))
    if bucket_h / height > bucket_w / width:
        return FittedSize(bucket_h, bucket_w, bucket_h, int(width * bucket_h / height))
    return FittedSize(bucket_h, bucket_w, int(height * bucket_w / width), bucket_w)


def requested_size(height: int, width: int) -> FittedSize:
    """`fit_size` for a size that a person asked for, with a check that the bucket still resembles it.

    Raises `InputError` if the sides differ by more than `MAX_RATIO`: the widest bucket is 4:1.
    """
    fitted = fit_size(height, width)
    if max(height, width) > MAX_RATIO * min(height, width):
        raise InputError(
            f"picture size {width}x{height}: the sides may differ by a factor of {MAX_RATIO:g} at most, "
            "and the model draws 4:1 at most; ask for a less narrow picture"
        )
    return fitted
