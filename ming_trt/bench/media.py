"""The files that a benchmark sends: the user's, those of the examples, or small ones made here."""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ming_trt.errors import ConfigError, InputError
from ming_trt.resources import shipped

KINDS = ("image", "document", "video", "audio")
_EXAMPLES = {"image": "scene.jpg", "document": "page.png", "video": "clip.mp4", "audio": "speech.wav"}
_SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp"),
    "video": (".mp4", ".mkv", ".mov", ".webm", ".avi"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".m4a"),
}
_DOCUMENT = ("page", "doc", "scan")
_RATE = 16000


@dataclass(frozen=True, slots=True)
class Medium:
    """An encoded file and where it came from."""

    name: str
    content: bytes


def find_media(folder: Path | None) -> dict[str, Medium]:
    """Kind -> file. From `folder` (the first file of each kind, by name; a picture whose name says page, doc or scan is
    the document), else from the examples of a checkout, else made here; a kind that cannot be had is left out.

    Raises `InputError` if `folder` holds none.
    """
    if folder is not None:
        found = {kind: path for kind in KINDS if (path := _first(folder, kind)) is not None}
        if not found:
            raise InputError(f"'{folder}' holds no picture, video or recording: give a folder with some, or no --media")
        return _read(found)
    try:
        examples = shipped("examples")
    except ConfigError:
        return made_media()
    return _read({kind: examples / name for kind, name in _EXAMPLES.items() if (examples / name).is_file()})


def made_media(seed: int = 0) -> dict[str, Medium]:
    """Small files that need no examples: a picture, a page of text, a tone; and a video where PyAV is installed."""
    rng = np.random.default_rng(seed)
    made = {"image": _png(_picture(rng, 448, 336)), "document": _png(_page()), "audio": _tone(rng, 2.0)}
    film = _film(rng)
    return {
        kind: Medium(f"made here ({kind})", content)
        for kind, content in {**made, **({"video": film} if film else {})}.items()
    }


def _first(folder: Path, kind: str) -> Path | None:
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise InputError(f"'{folder}' cannot be read ({error.strerror}): give a folder of media files") from None
    suffixes = _SUFFIXES["image" if kind == "document" else kind]
    files = [path for path in files if path.suffix.lower() in suffixes]
    if kind in ("image", "document"):
        files = [path for path in files if any(word in path.stem.lower() for word in _DOCUMENT) == (kind == "document")]
    return files[0] if files else None


def _read(paths: Mapping[str, Path]) -> dict[str, Medium]:
    return {kind: Medium(path.name, path.read_bytes()) for kind, path in paths.items()}


def _picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth colours with grain: it compresses and resizes like a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray((pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8))


def _page() -> Image.Image:
    image = Image.new("L", (640, 800), 250)
    font = ImageFont.load_default(20)
    lines = [f"Line {i + 1}: the quick brown fox jumps over the lazy dog." for i in range(24)]
    ImageDraw.Draw(image).multiline_text((30, 30), "\n".join(lines), fill=20, font=font, spacing=8)
    return image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _tone(rng: np.random.Generator, seconds: float) -> bytes:
    t = np.arange(int(seconds * _RATE)) / _RATE
    voice = np.sin(2 * np.pi * 140 * t) * (1 + np.sin(2 * np.pi * 3 * t)) / 4 + rng.normal(0, 0.01, t.size)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes((voice.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def _film(rng: np.random.Generator) -> bytes | None:
    """Two seconds of a picture that moves; None without PyAV."""
    try:
        import av
    except ImportError:
        return None
    still = np.asarray(_picture(rng, 320, 144))
    buffer: Any = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 192, 144, "yuv420p"
        for frame in range(24):
            part = np.ascontiguousarray(still[:, 4 * frame : 4 * frame + 192])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(part, "rgb24")))
        container.mux(stream.encode())
    content: bytes = buffer.getvalue()
    return content
