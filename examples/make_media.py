"""Draws the demonstration media beside this file: `python examples/make_media.py [FOLDER]`.

Everything is made from the code below and nothing else: a landscape (scene.png, scene.jpg), the same landscape with a
ball that bounces through it (clip.mp4), syllables of a simple vowel synthesiser (speech.wav) and a long page of text
(page.png). The samples and pixels are the same at every run; encoded bytes may differ between versions of the encoders.
"""

from __future__ import annotations

import sys
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image, ImageDraw, ImageFont

NAMES = ("scene.png", "scene.jpg", "clip.mp4", "speech.wav", "page.png")
SAMPLE_RATE = 16000
FRAMES, FRAMES_PER_SECOND = 30, 12

PAGE = """The keeper's log

Monday. The wind turned north before dawn and brought
fog with it. I lit the lamp at a quarter past four and
let it burn until noon. Two boats passed: the Marigold
with salt, and a small one whose name I could not read.

Tuesday. Clear. I painted the rail and counted the oil:
41 cans, of which 3 leak. The boy from the mill brought
bread, eggs and a letter. The letter says that the new
lens will come in spring, if the road holds.

Wednesday. Rain, at last. The cistern stands at 620
litres, twice as much as on Sunday. I mended the net.

Thursday. A fox sat on the lower step in the evening,
as if it had an appointment. Neither of us knew about
what. It left when the lamp was lit.

Friday. Storm from the west, force 9. No boats. I wound
the clock every two hours so that the light would not
slow down. The glass held. I slept from six to eight.

Saturday. Calm, and very cold. The Marigold came back,
lower in the water than before, and greeted with three
short whistles. I answered with the lamp.

Sunday. Nothing to report. It was a good day."""


def scene(width: int, height: int) -> Image.Image:
    """A house under a hill, a tree, a lake and a red kite in an evening sky."""
    scale = 2  # drawn twice as large, for smooth edges
    w, h = width * scale, height * scale
    y, x = np.mgrid[0:h, 0:w] / np.array([h, w]).reshape(2, 1, 1)
    glow = np.exp(-(((x - 0.72) / 0.35) ** 2) - ((y - 0.42) / 0.3) ** 2)[..., None]
    sky = np.array([92, 140, 205]) * (1 - y[..., None]) + np.array([236, 190, 150]) * y[..., None]
    image = Image.fromarray((sky + glow * (np.array([255, 226, 160]) - sky)).astype(np.uint8))
    draw = ImageDraw.Draw(image)

    def at(*points: float) -> list[float]:
        """Fractions of the width and height to pixels."""
        return [value * (w, h)[i % 2] for i, value in enumerate(points)]

    draw.ellipse(at(0.68, 0.36, 0.77, 0.48), fill=(255, 240, 200))
    across = np.linspace(0, 1, 80)
    for level, depth, colour in ((0.52, 0.07, (96, 116, 138)), (0.60, 0.05, (74, 110, 86)), (0.70, 0.03, (62, 96, 56))):
        edge = level - depth * np.sin(across * 7 + level * 20) - depth / 2 * np.sin(across * 17 + level * 9)
        ridge = [value for pair in zip(across, edge, strict=True) for value in pair]
        draw.polygon(at(0, 1, *ridge, 1, 1), fill=colour)
    draw.ellipse(at(0.50, 0.80, 0.98, 0.95), fill=(120, 150, 176))
    draw.ellipse(at(0.55, 0.82, 0.93, 0.89), fill=(168, 180, 186))
    draw.rectangle(at(0.16, 0.60, 0.36, 0.80), fill=(226, 208, 178))
    draw.polygon(at(0.13, 0.61, 0.26, 0.47, 0.39, 0.61), fill=(150, 62, 48))
    draw.rectangle(at(0.24, 0.68, 0.29, 0.80), fill=(92, 62, 44))
    for left in (0.18, 0.31):
        draw.rectangle(at(left, 0.65, left + 0.04, 0.71), fill=(252, 228, 140))
    draw.rectangle(at(0.435, 0.60, 0.455, 0.84), fill=(84, 60, 42))
    for cx, cy, r in ((0.445, 0.52, 0.07), (0.41, 0.58, 0.05), (0.48, 0.58, 0.05)):
        draw.ellipse(at(cx - r, cy - 1.3 * r, cx + r, cy + 1.3 * r), fill=(48, 88, 44))
    string = [value for t in np.linspace(0, 1, 20) for value in (0.60 - 0.22 * t, 0.16 + 0.5 * t**1.7)]
    draw.line(at(*string), fill=(240, 240, 236), width=scale)
    draw.polygon(at(0.60, 0.07, 0.645, 0.15, 0.60, 0.26, 0.565, 0.15), fill=(206, 40, 44))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def photograph(width: int, height: int) -> Image.Image:
    """The scene with the grain and the darker corners of a photograph."""
    pixels = np.asarray(scene(width, height), np.float64)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    grain = np.random.default_rng(7).standard_normal((height, width, 1)) * 3
    return Image.fromarray((pixels * (1 - 0.22 * (x**2 + y**2))[..., None] + grain).clip(0, 255).astype(np.uint8))


def film(width: int, height: int) -> list[Image.Image]:
    """A yellow ball that bounces from left to right."""
    frames = []
    for i in range(FRAMES):
        frame = scene(width, height)
        progress = i / (FRAMES - 1)
        r = height * 0.09
        x, y = width * (0.05 + 0.9 * progress), height * (0.86 - 0.55 * abs(np.cos(progress * 3 * np.pi)))
        ImageDraw.Draw(frame).ellipse([x - r, y - r, x + r, y + r], fill=(250, 210, 40), outline=(120, 90, 10))
        frames.append(frame)
    return frames


def write_film(file: Path, frames: list[Image.Image]) -> None:
    with av.open(str(file), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "30", "preset": "slow"})
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        stream.thread_count = 1  # several threads would not always cut the film in the same way
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def speech() -> npt.NDArray[np.int16]:
    """Two seconds of syllables: a pulse train, or noise for the consonants, through three resonances."""
    vowels = {"a": (730, 1090, 2440), "e": (530, 1840, 2480), "i": (300, 2250, 3000), "o": (570, 840, 2410)}
    rng = np.random.default_rng(11)
    pieces, phase = [], 0.0
    for i, vowel in enumerate("aeioaeia"):
        count = SAMPLE_RATE // 4
        t = np.arange(count) / count
        pitch = (132 - 5 * i + 14 * np.sin(np.pi * t)) * (1 + 0.01 * np.sin(2 * np.pi * 5 * t))
        phases = phase + np.cumsum(pitch) / SAMPLE_RATE
        phase = float(phases[-1])
        source = np.diff(np.floor(phases), prepend=np.floor(phases[0])) * 4 + rng.standard_normal(count) * 0.02
        source[: count // 6] = rng.standard_normal(count // 6) * 0.35
        voice = sum(resonance(source, hertz, 60 + 30 * n) / (n + 1) for n, hertz in enumerate(vowels[vowel]))
        pieces.append(voice * np.minimum(1, 12 * t) * np.minimum(1, 6 * (1 - t)))
    samples = np.concatenate(pieces)
    return np.asarray(samples / np.abs(samples).max() * 0.7 * 32767, np.int16)


def resonance(source: npt.NDArray[np.float64], hertz: float, width: float) -> npt.NDArray[np.float64]:
    """A two-pole resonator, by its impulse response."""
    t = np.arange(SAMPLE_RATE // 20) / SAMPLE_RATE
    response = np.exp(-np.pi * width * t) * np.sin(2 * np.pi * hertz * t)
    return np.convolve(source, response)[: len(source)]


def page() -> Image.Image:
    """A long page of black text on paper."""
    font, heading = ImageFont.load_default(22), ImageFont.load_default(36)
    lines = PAGE.split("\n")
    image = Image.new("L", (680, 90 + 38 * len(lines)), 250)
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((40, 40 + 38 * i), line, fill=20, font=font if i else heading)
    # 8 greys are enough for smooth letters and keep the file small
    return image.quantize(8)


def main(folder: Path) -> None:
    """Writes all files and prints their sizes."""
    scene(320, 240).save(folder / "scene.png", optimize=True)
    photograph(448, 336).save(folder / "scene.jpg", quality=82)
    write_film(folder / "clip.mp4", film(192, 144))
    soundfile.write(folder / "speech.wav", speech(), SAMPLE_RATE, subtype="PCM_16")
    page().save(folder / "page.png", optimize=True)
    for name in NAMES:
        print(f"{name}: {(folder / name).stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
