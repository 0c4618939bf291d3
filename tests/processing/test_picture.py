"""Drawing requests to arrays, against the whole requests of the reference cases."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ming_trt.errors import InputError
from ming_trt.golden.tokenizer import ByteTokenizer
from ming_trt.processing.picture import PreparedPicture, prepare_picture
from ming_trt.processing.prepare import Processor
from ming_trt.processing.query import APPENDED, QUERY_TOKENS
from ming_trt.processing.request import parse_request

from ..picture import cases, config


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(config(), ByteTokenizer.from_cases(cases().index))


def _png(pixels: Any, **save: Any) -> bytes:
    data = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(data, **{"format": "PNG", **save})
    return data.getvalue()


def _prepare(processor: Processor, text: str, *images: bytes, **draw: Any) -> PreparedPicture:
    content: list[dict[str, str]] = [{"type": "image"}] * len(images)
    content.append({"type": "text", "text": text})
    request = parse_request({"messages": [{"role": "user", "content": content}], "draw": draw})
    return prepare_picture(processor, request, images)


def test_words_to_picture(processor: Processor) -> None:
    prepared = _prepare(processor, cases().index["e2e"]["t2i"]["text"])
    ids = cases().array("e2e.t2i.input_ids")
    np.testing.assert_array_equal(prepared.prompt.input_ids[:-APPENDED], ids)
    cases().check("e2e.t2i.position_ids", prepared.prompt.positions)
    assert prepared.reference is None
    chosen = prepared.prompt.feature_index >= 0
    np.testing.assert_array_equal(prepared.prompt.feature_index[chosen], np.arange(QUERY_TOKENS))
    np.testing.assert_array_equal(prepared.prompt.modality, chosen)


def test_cells_of_three_patches() -> None:
    """Strips of the query tokens are counted in the checkpoint's own merge cells."""
    sizes = replace(config(), vision=replace(config().vision, merge_size=3))
    odd = Processor(sizes, ByteTokenizer.from_cases(cases().index))
    positions = _prepare(odd, cases().index["e2e"]["t2i"]["text"]).prompt.positions
    cases().check("e2e.t2i.position_ids", positions)


def test_edit(processor: Processor) -> None:
    prepared = _prepare(processor, cases().index["e2e"]["edit"]["text"], _png(cases().array("e2e.edit.raw")))
    np.testing.assert_array_equal(prepared.prompt.input_ids[:-APPENDED], cases().array("e2e.edit.input_ids"))
    cases().check("e2e.edit.position_ids", prepared.prompt.positions)
    cases().check("e2e.edit.grid_thw", prepared.prompt.image_grid[0])
    assert prepared.reference is not None
    cases().check("e2e.edit.ref_u8_rows", prepared.reference.pixels[::16], 1)


def test_query_rows_come_before_audio_rows(processor: Processor) -> None:
    """A spoken instruction: its rows stay last."""
    import soundfile

    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(8000, np.float32), 16000, format="WAV")
    request = parse_request({"messages": [{"role": "user", "content": [{"type": "audio"}]}], "draw": {}})
    prompt = prepare_picture(processor, request, audios=[sound.getvalue()]).prompt
    heard = prompt.feature_index[prompt.modality == 2]
    seen = prompt.feature_index[prompt.modality == 1]
    np.testing.assert_array_equal(seen, np.arange(QUERY_TOKENS))
    np.testing.assert_array_equal(heard, QUERY_TOKENS + np.arange(len(heard)))


def test_only_the_first_picture_is_edited(processor: Processor) -> None:
    red, blue = (_png(np.full((40, 80, 3), colour, np.uint8)) for colour in ((255, 0, 0), (0, 0, 255)))
    reference = _prepare(processor, "make them one", red, blue).reference
    assert reference is not None
    np.testing.assert_array_equal(reference.pixels[0, 0], [255, 0, 0])


@pytest.mark.parametrize("kind", ["exif", "alpha", "cmyk", "16 bit", "animated", "palette"])
def test_unusual_reference_pictures(processor: Processor, kind: str) -> None:
    """EXIF rotation is applied, transparency lies over white, CMYK and 16 bit are converted, the first frame counts."""
    wide = Image.new("RGB", (120, 40), (200, 10, 10))
    if kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        data = _png(wide, format="JPEG", exif=exif)
    elif kind == "alpha":
        data = _png(Image.new("RGBA", (120, 40), (200, 10, 10, 0)))
    elif kind == "cmyk":
        data = _png(wide.convert("CMYK"), format="JPEG")
    elif kind == "16 bit":
        data = _png(np.full((40, 120), 65535, np.uint16))
    elif kind == "animated":
        data = _png(wide, format="GIF", save_all=True, append_images=[Image.new("RGB", (120, 40), (0, 0, 255))])
    else:
        data = _png(wide.convert("P", palette=Image.Palette.ADAPTIVE))
    reference = _prepare(processor, "add candles", data).reference
    assert reference is not None
    upright = kind == "exif"
    assert (reference.size.height > reference.size.width) == upright
    expected = [255, 255, 255] if kind in ("alpha", "16 bit") else [200, 10, 10]
    # JPEG and CMYK change colours a little
    assert np.abs(reference.pixels.astype(int) - expected).max() <= 12


@pytest.mark.parametrize(
    ("images", "draw", "message"),
    [
        ([b"not a picture"], {}, "no known format"),
        ([b""], {}, "0 bytes"),
        ([], {"width": 4000, "height": 100}, "4:1"),
    ],
)
def test_refused(processor: Processor, images: list[bytes], draw: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _prepare(processor, "a kite", *images, **draw)


def test_truncated_picture(processor: Processor) -> None:
    data = _png(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="cannot be decoded"):
        _prepare(processor, "a kite", data[: len(data) // 2])


def test_prompt_must_leave_room_for_the_query_tokens() -> None:
    short = Processor(config(), ByteTokenizer.from_cases(cases().index), max_prompt_tokens=300)
    with pytest.raises(InputError, match="picture needs 342 more"):
        _prepare(short, "a kite")


@pytest.mark.parametrize("extra", [{"thinking": True}, {"task": "asr"}])
def test_picture_and_text_modes_do_not_mix(extra: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="'draw' comes together"):
        parse_request({"messages": [{"role": "user", "content": "a kite"}], "draw": {}, **extra})


def test_request_survives_json() -> None:
    request = parse_request({"messages": [{"role": "user", "content": "a kite"}], "draw": {"preset": "september"}})
    assert parse_request(request.to_json()) == request
