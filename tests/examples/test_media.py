import importlib.util
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from ming_trt.processing.audio import process_audio
from ming_trt.processing.image import process_image
from ming_trt.processing.video import count_frames, process_video

EXAMPLES = Path(__file__).parents[2] / "examples"
SPEC = importlib.util.spec_from_file_location("make_media", EXAMPLES / "make_media.py")
assert SPEC is not None and SPEC.loader is not None
make_media = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_media)


def test_the_media_are_small() -> None:
    assert sum((EXAMPLES / name).stat().st_size for name in make_media.NAMES) < 250_000


@pytest.mark.parametrize("name", ["scene.png", "scene.jpg", "page.png"])
def test_pictures_are_read(name: str) -> None:
    got = process_image((EXAMPLES / name).read_bytes())
    assert got.pixel_values.std() > 0.3


def test_the_page_keeps_its_ratio() -> None:
    _, rows, columns = process_image((EXAMPLES / "page.png").read_bytes()).grid
    width, height = Image.open(EXAMPLES / "page.png").size
    assert abs(rows / columns - height / width) < 0.1


def test_the_film_is_read() -> None:
    data = (EXAMPLES / "clip.mp4").read_bytes()
    assert count_frames(data) == (make_media.FRAMES, pytest.approx(make_media.FRAMES_PER_SECOND))
    got = process_video(data)
    assert got.grid[0] == make_media.FRAMES // 2
    # something moves
    frames = got.pixel_values.reshape(got.grid[0], -1)
    assert np.abs(np.diff(frames, axis=0)).mean() > 0.01


def test_the_speech_is_two_seconds() -> None:
    got = process_audio((EXAMPLES / "speech.wav").read_bytes())
    assert got.mel.shape == (200, 128)
    assert got.tokens == 50


def test_the_files_are_what_the_script_draws(tmp_path: Path) -> None:
    """Samples to one unit and pixels to one level on average: libraries differ in the last bit between versions."""
    samples, rate = soundfile.read(EXAMPLES / "speech.wav", dtype="int16")
    assert rate == make_media.SAMPLE_RATE
    assert np.abs(samples.astype(int) - make_media.speech()).max() <= 1
    drawn = np.asarray(make_media.scene(320, 240), int)
    stored = np.asarray(Image.open(EXAMPLES / "scene.png").convert("RGB"), int)
    assert np.abs(drawn - stored).mean() < 1
