"""Videos: encoded bytes, a file or a folder of frames to patches.

Which frames: files with more than 2 frames a second and longer than 5 s count as int(total / fps · 2) frames, others as
all of theirs; from that base, `nframes` or `min_frames` and `max_frames` make the even number of frames to take
(`frame_count`), and `sample` says which ones of the file (`frame_indices`):

* `sequence`: evenly from the first to the last frame;
* `uniform`: the middle of equal intervals;
* `random`: one at random out of each interval (the generator is the caller's).

Size: 100352 pixels at least and, the more frames the less, 602112 at most, so that a video makes at most 9216 tokens
and 768 per pair of frames. A folder of frames is read in the order of the names, under the limits of pictures.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from ming_trt.errors import InputError
from ming_trt.processing.bicubic import resize_frames
from ming_trt.processing.image import FIRST_PASS, VisionInput, decode_image, first_pass, image_array, resize
from ming_trt.processing.patches import PatchShape, fit, patchify
from ming_trt.processing.request import VideoPart

FRAMES_PER_SECOND = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 128
MIN_PIXELS = 128 * 784
MAX_PIXELS = 768 * 784
TOTAL_PIXELS = 9216 * 784
# Files of more frames than this are refused before they are decoded a second time (an hour at 60 fps).
MAX_FILE_FRAMES = 216000
MAX_FILE_BYTES = 1 << 30
MAX_FRAME_PIXELS = 8192 * 8192
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def frame_count(part: VideoPart, base: int, pair: int = 2) -> int:
    """The even number of frames to take of `base`. Raises `InputError` where it is not within 2..base."""
    if base < pair:
        raise InputError(f"the video offers {base} frame(s) and {pair} are needed: send a longer one, or a picture")
    if part.nframes is not None:
        count = round(part.nframes / pair) * pair
    else:
        low = -(-(MIN_FRAMES if part.min_frames is None else part.min_frames) // pair) * pair
        high = (min(MAX_FRAMES, base) if part.max_frames is None else part.max_frames) // pair * pair
        count = max(min(base, high), low) // pair * pair
    if not pair <= count <= base:
        raise InputError(
            f"the video offers {base} frame(s) and its options ask for {count}: the number must lie in {pair}..{base}, "
            "set 'nframes' or 'min_frames' accordingly, or send a longer video"
        )
    return count


def frame_indices(
    part: VideoPart, total: int, frames_per_second: float, rng: np.random.Generator | None = None
) -> list[int]:
    """Indices of the frames to take from a file of `total` frames."""
    base = total
    if frames_per_second > FRAMES_PER_SECOND and total / frames_per_second > 5.0:
        base = int(total / frames_per_second * FRAMES_PER_SECOND)
    return _spread(part.sample, frame_count(part, base), total, rng)


def _spread(rule: str, count: int, total: int, rng: np.random.Generator | None = None) -> list[int]:
    if rule == "sequence":
        return [int(i) for i in np.linspace(0, total - 1, count, dtype=int)]
    edges = [int(i) for i in np.linspace(0, total, count + 1, dtype=int)]
    intervals = list(pairwise(edges))
    if rule == "uniform":
        return [(start + end - 1) // 2 for start, end in intervals]
    if rule == "random":
        rng = rng or np.random.default_rng()
        return [int(rng.integers(start, max(end, start + 1))) for start, end in intervals]
    raise InputError(f"'sample' is '{rule}': choose one of sequence, uniform, random")


def pixel_limits(part: VideoPart, frames: int, pair: int = 2) -> tuple[float, float]:
    """(low, high) pixels of one frame in the first pass."""
    low = MIN_PIXELS if part.min_pixels is None else part.min_pixels
    high: float = max(min(MAX_PIXELS, TOTAL_PIXELS / frames * pair), int(low * 1.05))
    return low, high if part.max_pixels is None else min(part.max_pixels, high)


def process_video(
    video: bytes | Path,
    part: VideoPart | None = None,
    *,
    rng: np.random.Generator | None = None,
    shape: PatchShape | None = None,
) -> VisionInput:
    """An encoded video (its bytes, its path, or a folder of frames) to patches. Raises `InputError`."""
    part, shape = part or VideoPart(), shape or PatchShape()
    if isinstance(video, Path) and video.is_dir():
        return process_frames(read_frame_folder(video, part, shape), shape)
    source = _source(video)
    total, rate = count_frames(source)
    indices = frame_indices(part, total, rate, rng)
    frames = decode_frames(source, indices, lambda frame: _first_pass(frame, len(indices), part, shape))
    return process_frames(frames, shape)


def process_frames(frames: Sequence[Image.Image], shape: PatchShape | None = None) -> VisionInput:
    """RGB frames of one size, already through the first pass, to patches (second pass included)."""
    shape = shape or PatchShape()
    height, width = fit(frames[0].height, frames[0].width, MIN_PIXELS, MAX_PIXELS, shape.factor)
    values, grid = patchify(np.stack([image_array(resize(frame, height, width)) for frame in frames]), shape)
    return VisionInput(values, grid)


def process_array(
    raw: npt.NDArray[np.uint8], frames_per_second: float, part: VideoPart | None = None, shape: PatchShape | None = None
) -> tuple[VisionInput, list[int]]:
    """All frames of a video, u8 [n, h, w, 3], to patches, and the indices that were taken."""
    part, shape = part or VideoPart(), shape or PatchShape()
    indices = frame_indices(part, len(raw), frames_per_second)
    frames = [_first_pass(Image.fromarray(raw[i]), len(indices), part, shape) for i in indices]
    return process_frames(frames, shape), indices


def _first_pass(frame: Image.Image, frames: int, part: VideoPart, shape: PatchShape) -> Image.Image:
    """One of `frames` RGB frames after the first resize."""
    size = fit(frame.height, frame.width, *pixel_limits(part, frames, shape.frames), shape.factor)
    return Image.fromarray(resize_frames(image_array(frame)[None], *size)[0])


def read_frame_folder(folder: Path, part: VideoPart, shape: PatchShape | None = None) -> list[Image.Image]:
    """The pictures of a folder, by name, padded to an even number; above `max_frames`, that many of them uniformly."""
    shape = shape or PatchShape()
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in FRAME_SUFFIXES)
    if not files:
        raise InputError(f"the folder '{folder}' holds no frames: put files of type {', '.join(FRAME_SUFFIXES)} there")
    if part.max_frames is None:
        raise InputError(f"the folder '{folder}' is a video of {len(files)} frames: give 'max_frames' too")
    files += files[-1:] * (-len(files) % shape.frames)
    if len(files) > part.max_frames:
        files = [files[i] for i in _spread("uniform", part.max_frames // shape.frames * shape.frames, len(files))]
    limits = (part.min_pixels or FIRST_PASS[0], part.max_pixels or FIRST_PASS[1])
    frames = [first_pass(decode_image(file.read_bytes()), *limits, shape.factor) for file in files]
    other = next((i for i, frame in enumerate(frames) if frame.size != frames[0].size), None)
    if other is not None:
        raise InputError(
            f"frame '{files[other].name}' has another size than '{files[0].name}': give all frames the same size"
        )
    return frames


def _source(video: bytes | Path) -> bytes | Path:
    if isinstance(video, Path) and not video.is_file():
        raise InputError(f"there is no video '{video}': give a file or a folder of frames")
    size = len(video) if isinstance(video, bytes) else video.stat().st_size
    if size == 0:
        raise InputError("the video has 0 bytes: send the content of an mp4, mkv, webm or avi file")
    if size > MAX_FILE_BYTES:
        raise InputError(f"the video has {size} bytes, more than {MAX_FILE_BYTES}: send a shorter one")
    return video


def _decoded(source: bytes | Path) -> Iterator[av.VideoFrame]:
    """Every frame in the order of showing. Raises `InputError` for what cannot be read."""
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            if not container.streams.video:
                raise InputError("the file has no video stream: send it as audio, or send a video")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise InputError("the video's codec is not known here: send H.264, H.265, VP9, AV1 or MPEG-4")
            _check_frame_size(stream.width, stream.height)
            for frame in container.decode(stream):
                _check_frame_size(frame.width, frame.height)
                yield frame
    except (av.FFmpegError, ValueError, OSError) as error:
        raise InputError(
            f"the video cannot be decoded ({_reason(error)}): send an intact mp4, mkv, webm or avi"
        ) from None


def _check_frame_size(width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise InputError(f"the video has {width}x{height} pixels a frame, more than {MAX_FRAME_PIXELS}: scale it down")


def count_frames(source: bytes | Path) -> tuple[int, float]:
    """(frames, frames per second), counted by decoding, since containers lie; the rate from the frames' own times."""
    total, first, last = 0, None, None
    for frame in _decoded(source):
        total += 1
        if total > MAX_FILE_FRAMES:
            raise InputError(f"the video has more than {MAX_FILE_FRAMES} frames: cut it")
        if frame.pts is not None and frame.time_base:
            time = frame.pts * Fraction(frame.time_base)
            first, last = time if first is None else first, time
    if total == 0:
        raise InputError("the video has no frame: send an intact file")
    if first is None or last is None or last <= first:
        # No times: one frame, or a raw stream. The rate then only matters for long videos, which have times.
        return total, FRAMES_PER_SECOND
    return total, float((total - 1) / (last - first))


def decode_frames(
    source: bytes | Path, indices: Sequence[int], shrink: Callable[[Image.Image], Image.Image] = lambda frame: frame
) -> list[Image.Image]:
    """The frames of these indices (ascending, repetitions allowed) as RGB pictures of one size, each through `shrink`.

    A frame is shrunk as soon as it is decoded, so that only one is held at full size.
    """
    wanted, pictures = set(indices), dict[int, Image.Image]()
    size: tuple[int, int] | None = None
    for i, frame in _numbered(_decoded(source), max(indices)):
        if i in wanted:
            size = size or (frame.height, frame.width)
            pictures[i] = shrink(resize(frame.to_image(), *size))
    missing = wanted - pictures.keys()
    if missing:
        raise InputError(f"the video ends before frame {min(missing)}: send an intact file")
    return [pictures[i] for i in indices]


def _numbered(frames: Iterable[av.VideoFrame], last: int) -> Iterator[tuple[int, av.VideoFrame]]:
    for i, frame in enumerate(frames):
        if i > last:
            return
        yield i, frame


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__
