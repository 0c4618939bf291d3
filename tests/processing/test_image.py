import io
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ming_trt.errors import InputError
from ming_trt.golden.cases import Cases
from ming_trt.processing import image as image_module
from ming_trt.processing.image import (
    FIRST_PASS,
    GENERATION_PASS,
    SECOND_PASS,
    decode_image,
    first_pass,
    image_array,
    process_image,
)
from ming_trt.processing.patches import PatchShape, fit, patchify
from tests.conftest import GENERATION, UNDERSTANDING

CASES = Cases(UNDERSTANDING)
PICTURES = [case["id"] for case in CASES.index["cases"] if case["group"] == "image_processor"]
RNG = np.random.default_rng(5)
NOISE = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", PICTURES)
def test_reference_pictures(name: str) -> None:
    raw = Image.fromarray(CASES.array(f"{name}.raw"))
    # a lossless file must give what the array gives
    got = process_image(encoded(raw))
    loaded = first_pass(raw)
    assert [loaded.height, loaded.width] == CASES.array(f"{name}.size_first_pass").tolist()
    assert list(got.grid) == CASES.array(f"{name}.grid_thw").tolist()
    for what, values in (
        ("pixel_rows", got.pixel_values[CASES.array(f"{name}.rows")]),
        ("row_mean", got.pixel_values.mean(axis=1)),
    ):
        # 2e-5, as the cases state it: far below one grey level (0.015)
        verdict = CASES.compare(f"{name}.{what}", values)
        assert verdict.passed, verdict


def test_pictures_were_compared() -> None:
    assert len(PICTURES) >= 2


@pytest.mark.parametrize("case", CASES.index["image_sizes"], ids=str)
def test_reference_sizes(case: dict) -> None:
    first = fit(case["height"], case["width"], *FIRST_PASS)
    assert list(first) == case["first_pass"]
    assert list(fit(*first, *SECOND_PASS)) == case["second_pass"]


@pytest.mark.parametrize("case", Cases(GENERATION).index["image_token_grid"], ids=str)
def test_reference_sizes_of_image_generation(case: dict) -> None:
    first = fit(case["height"], case["width"], *FIRST_PASS)
    assert list(first) == case["first_pass"]
    assert list(fit(*first, *GENERATION_PASS)) == case["second_pass"]


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_fitted_sizes_keep_limits_and_ratio(height: int, width: int) -> None:
    low, high = SECOND_PASS
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InputError, match="200:1"):
            fit(height, width, low, high)
        return
    h, w = fit(height, width, low, high)
    assert h % 28 == w % 28 == 0
    assert h * w <= high
    assert h * w >= low
    # both sides are off by less than one factor, in the same direction, from a size of the picture's own ratio
    if min(h, w) > 28:
        off = abs(math.log(h / w) - math.log(height / width))
        assert off <= max(math.log(side / (side - 28)) for side in (h, w)) + 1e-9


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9))
def test_patch_rows_hold_the_pixels_of_the_documented_order(t: int, cells_h: int, cells_w: int, seed: int) -> None:
    shape = PatchShape()
    frames = np.random.default_rng(seed).integers(0, 256, (2 * t - 1, 28 * cells_h, 28 * cells_w, 3), dtype=np.uint8)
    values, grid = patchify(frames, shape)
    assert grid == (t, 2 * cells_h, 2 * cells_w)
    assert values.shape == (t * 4 * cells_h * cells_w, 1176)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    row = 0
    for a in range(t):
        for cell_y in range(cells_h):
            for cell_x in range(cells_w):
                for y in range(2):
                    for x in range(2):
                        top, left = 28 * cell_y + 14 * y, 28 * cell_x + 14 * x
                        # an odd number of frames repeats the last one
                        pair = [frames[min(2 * a + i, len(frames) - 1)] for i in range(2)]
                        block = np.stack([frame[top : top + 14, left : left + 14] for frame in pair])
                        want = ((block / 255 - mean) / std).transpose(3, 0, 1, 2).reshape(-1)
                        np.testing.assert_allclose(values[row], want, atol=1e-6)
                        row += 1


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned = decode_image(encoded(Image.fromarray(NOISE), exif=exif))
    np.testing.assert_array_equal(image_array(turned), np.rot90(NOISE, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_lies_over_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    image.paste((10, 10, 10, 255), (0, 0, 4, 8))
    form = "TIFF" if mode == "LA" else "PNG"
    data = encoded(image.quantize(8) if mode == "PA" else image.convert(mode), form)
    pixels = image_array(decode_image(data))
    assert (pixels[:, 4:] == 255).all()
    assert (np.abs(pixels[:, :4].astype(int) - 10) <= 1).all()


def test_a_transparent_colour_of_a_plain_png_lies_over_white() -> None:
    pixels = image_array(decode_image(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))))
    assert (pixels == 255).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(form: str) -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    pixels = image_array(decode_image(encoded(Image.fromarray(values), form)))
    np.testing.assert_allclose(pixels[..., 0], values / 257, atol=0.51)


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "P", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    form = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    grey = Image.new("RGB", (30, 30), (255, 255, 255)).convert(mode)
    pixels = image_array(decode_image(encoded(grey, form)))
    assert pixels.shape == (30, 30, 3)
    assert (pixels >= 253).all()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(form: str) -> None:
    first, second = Image.new("RGB", (9, 9), (0, 0, 250)), Image.new("RGB", (9, 9), (0, 250, 0))
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(first, form, save_all=True, append_images=[second], **options)
    assert (image_array(decode_image(data)) == (0, 0, 250)).all()


def test_webp_and_bmp_are_read() -> None:
    for form, options in (("WEBP", {"lossless": True}), ("BMP", {})):
        np.testing.assert_array_equal(
            image_array(decode_image(encoded(Image.fromarray(NOISE), form, **options))), NOISE
        )


def test_unusable_pictures_are_refused_with_a_sentence() -> None:
    good = encoded(Image.fromarray(NOISE))
    for data, words in [
        (b"", "0 bytes"),
        (b"not a picture", "no known format"),
        (good[: len(good) // 2], "cannot be decoded"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
    ]:
        with pytest.raises(InputError, match=words):
            decode_image(data)
    with pytest.raises(InputError, match=r"10000x1 pixels, a ratio of 10000:1"):
        process_image(encoded(Image.new("L", (10000, 1))))


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MAX_DECODED_PIXELS", 2399)
    with pytest.raises(InputError, match="60x40 pixels, more than 2399"):
        decode_image(encoded(Image.fromarray(NOISE)))
    monkeypatch.undo()
    # 24000 x 24000 is beyond Pillow's own limit too, and would take 1.7 GB
    data = encoded(Image.new("1", (24000, 24000)))
    with warnings.catch_warnings(), pytest.raises(InputError, match="pixels"):
        warnings.simplefilter("error")
        decode_image(data)


def test_pixel_limits_too_small_for_the_ratio_are_refused() -> None:
    with pytest.raises(InputError, match="max_pixels"):
        process_image(Image.new("RGB", (4000, 30)), max_pixels=784)


@given(st.integers(0, 10_000), st.integers(0, 255), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF"]))
def test_a_damaged_file_gives_a_picture_or_an_input_error(place: int, value: int, form: str) -> None:
    data = bytearray(encoded(Image.fromarray(NOISE), form))
    data[place % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged metadata that it ignores
        try:
            assert decode_image(bytes(data)).mode == "RGB"
        except InputError as error:
            assert str(error)
