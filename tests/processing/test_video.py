import io
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from ming_trt.errors import InputError
from ming_trt.golden.cases import Cases
from ming_trt.processing import video as video_module
from ming_trt.processing.request import VideoPart
from ming_trt.processing.video import (
    count_frames,
    decode_frames,
    frame_count,
    frame_indices,
    pixel_limits,
    process_array,
    process_video,
)
from tests.conftest import UNDERSTANDING

CASES = Cases(UNDERSTANDING)
RNG = np.random.default_rng(3)


def grey_film(levels: list[int], rate: int = 10, size: tuple[int, int] = (64, 48), codec: str = "mpeg4") -> bytes:
    """A film whose i-th frame is plain grey of that level."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


LEVELS = [10 * i for i in range(24)]
FILM = grey_film(LEVELS)


@pytest.mark.parametrize("case", CASES.index["video_frame_choice"], ids=lambda case: str(case["element"]))
def test_reference_frame_choice(case: dict) -> None:
    got = frame_indices(VideoPart(**case["element"]), case["total_frames"], case["fps"])
    assert got == case["frame_indices"]


def test_reference_video() -> None:
    case = next(case for case in CASES.index["cases"] if case["group"] == "video_processor")
    got, indices = process_array(CASES.array("proc.video.raw"), case["fps"], VideoPart(**case["element"]))
    assert indices == CASES.array("proc.video.frame_indices").tolist()
    assert list(got.grid) == CASES.array("proc.video.grid_thw").tolist()
    # 2e-5, as the cases state it
    CASES.check("proc.video.pixel_rows", got.pixel_values[CASES.array("proc.video.rows")])
    CASES.check("proc.video.row_mean", got.pixel_values.mean(axis=1))


@given(
    st.integers(1, 5000),
    st.floats(0.5, 120),
    st.builds(
        VideoPart,
        sample=st.sampled_from(["sequence", "uniform", "random"]),
        nframes=st.none() | st.integers(2, 300),
        min_frames=st.none() | st.integers(2, 300),
        max_frames=st.none() | st.integers(2, 300),
    ),
)
def test_any_choice_is_even_ascending_and_inside_the_file(total: int, rate: float, part: VideoPart) -> None:
    try:
        indices = frame_indices(part, total, rate, np.random.default_rng(0))
    except InputError as error:
        assert ("are needed" if total == 1 else "number must lie in") in str(error)
        return
    assert len(indices) % 2 == 0
    assert indices == sorted(indices)
    assert indices[0] >= 0
    assert indices[-1] < total


def test_random_choice_follows_the_seed() -> None:
    part = VideoPart(sample="random", nframes=8)
    first, second, other = (frame_indices(part, 200, 30.0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize(
    ("part", "base"),
    [
        (VideoPart(), 3),
        (VideoPart(nframes=6), 5),
        (VideoPart(min_frames=9), 8),
    ],
)
def test_a_budget_that_the_file_cannot_meet_is_refused(part: VideoPart, base: int) -> None:
    with pytest.raises(InputError, match=rf"offers {base} frame.*2\.\.{base}"):
        frame_count(part, base)


def test_a_single_frame_is_no_video() -> None:
    with pytest.raises(InputError, match=r"offers 1 frame.*a picture"):
        frame_count(VideoPart(), 1)


def test_pixels_of_a_frame_shrink_with_the_number_of_frames() -> None:
    assert pixel_limits(VideoPart(), 2) == (100352, 602112)
    assert pixel_limits(VideoPart(), 64) == (100352, 9216 * 784 / 64 * 2)
    assert pixel_limits(VideoPart(), 1000) == (100352, int(100352 * 1.05))
    assert pixel_limits(VideoPart(max_pixels=150000), 4) == (100352, 150000)
    assert pixel_limits(VideoPart(min_pixels=300000), 1000) == (300000, 315000)


def test_frames_come_from_the_file_by_number() -> None:
    assert count_frames(FILM) == (24, pytest.approx(10.0, rel=1e-3))
    frames = decode_frames(FILM, [0, 5, 5, 23])
    assert [frame.size for frame in frames] == [(64, 48)] * 4
    for frame, index in zip(frames, [0, 5, 5, 23], strict=True):
        # lossy coding and the limited range of YUV: a few levels
        assert abs(int(np.asarray(frame).mean()) - LEVELS[index]) <= 6


def test_a_film_becomes_patches(tmp_path: Path) -> None:
    got = process_video(FILM, VideoPart(max_frames=8, sample="uniform"))
    t, h, w = got.grid
    assert t == 4
    assert h * w * 196 * 8 <= 9216 * 784 * 2
    assert got.pixel_values.shape == (t * h * w, 1176)
    # the frames get brighter, so do the patches
    means = got.pixel_values.reshape(t, -1).mean(axis=1)
    assert (np.diff(means) > 0).all()
    file = tmp_path / "film.mkv"
    file.write_bytes(FILM)
    np.testing.assert_array_equal(process_video(file, VideoPart(max_frames=8)).pixel_values, got.pixel_values)


def test_a_folder_of_frames_is_read_by_name(tmp_path: Path) -> None:
    for i in (2, 0, 1, 4, 3):
        Image.new("RGB", (60, 40), (50 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    got = process_video(tmp_path, VideoPart(max_frames=64))
    assert got.grid[0] == 3
    assert (np.diff(got.pixel_values.reshape(3, -1).mean(axis=1)) > 0).all()
    assert process_video(tmp_path, VideoPart(max_frames=2)).grid[0] == 1
    with pytest.raises(InputError, match="max_frames"):
        process_video(tmp_path)
    Image.new("RGB", (80, 300)).save(tmp_path / "5.png")
    with pytest.raises(InputError, match=r"5\.png"):
        process_video(tmp_path, VideoPart(max_frames=64))


def test_unusable_videos_are_refused_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = io.BytesIO()
    with av.open(sound, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
    for data, words in [
        (b"", "0 bytes"),
        (b"not a film", "cannot be decoded"),
        (FILM[:200], "cannot be decoded|no frame"),
        (sound.getvalue(), "no video stream"),
        (tmp_path / "absent.mp4", "no video"),
    ]:
        with pytest.raises(InputError, match=words):
            process_video(data)
    with pytest.raises(InputError, match="holds no frames"):
        process_video(tmp_path, VideoPart(max_frames=4))
    with pytest.raises(InputError, match="offers 3 frame"):
        process_video(grey_film([1, 2, 3]))
    monkeypatch.setattr(video_module, "MAX_FILE_FRAMES", 23)
    with pytest.raises(InputError, match="more than 23 frames"):
        process_video(FILM)
    monkeypatch.setattr(video_module, "MAX_FRAME_PIXELS", 100)
    with pytest.raises(InputError, match="64x48"):
        process_video(FILM)


@given(st.integers(0, len(FILM) - 1), st.integers(0, 255))
@example(344, 0)  # a codec that nobody knows
def test_a_damaged_film_gives_patches_or_an_input_error(place: int, value: int) -> None:
    data = bytearray(FILM)
    data[place] = value
    try:
        assert process_video(bytes(data), VideoPart(nframes=2)).grid[0] == 1
    except InputError as error:
        assert str(error)
