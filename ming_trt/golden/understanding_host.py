"""The cases that no engine is needed for: positions, processors, prompt strings, sizes, frame choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ming_trt.config import MingConfig
from ming_trt.golden.session import Session
from ming_trt.golden.tokenizer import ByteTokenizer
from ming_trt.processing import image, video
from ming_trt.processing.audio import process_waveform
from ming_trt.processing.patches import FACTOR, fit
from ming_trt.processing.positions import grids_in_text_order, position_ids
from ming_trt.processing.prepare import Prepared, Processor
from ming_trt.processing.prompt import chat_prompt, expand_prompt
from ming_trt.processing.request import VideoPart

Case = dict[str, Any]


def prepare_raw(
    config: MingConfig,
    tokenizer: ByteTokenizer,
    prompt: str,
    picture: npt.NDArray[np.uint8] | None,
    waveform: npt.NDArray[Any] | None,
) -> Prepared:
    """A prompt with markers, a raw picture u8 [h, w, 3] and samples at 16 kHz to the arrays of the contract."""
    processor, audio = Processor(config, tokenizer), config.audio
    items, clips = [], []
    if picture is not None:
        items.append(image.process_image(Image.fromarray(picture), shape=processor.patch_shape))
    if waveform is not None:
        clips.append(process_waveform(waveform, max_frames=audio.max_frames, num_mels=audio.num_mels))
    expanded = expand_prompt(prompt, [item.grid for item in items], (), [clip.tokens for clip in clips])
    return processor.index(np.asarray(tokenizer.encode(expanded), np.int32), items, clips)


def _positions(session: Session, case: Case) -> None:
    name, tokens = case["id"], session.config.tokens
    arrays = {kind.removeprefix(f"{name}."): session.cases.array(kind) for kind in case["inputs"]}
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    none = np.zeros((0, 3), np.int64)
    grids = grids_in_text_order(
        ids[mask.astype(bool)],
        arrays.get("image_grid_thw", none),
        arrays.get("video_grid_thw", none),
        image_patch=tokens.image_patch,
        video_start=tokens.video_start,
    )
    for rope in case["rope"]:
        positions, delta = position_ids(ids, grids, image_patch=tokens.image_patch, rope_kind=rope, mask=mask)
        session.add(name, "host", f"{name}.{rope}.position_ids", positions)
        session.add(name, "host", f"{name}.{rope}.delta", delta)


def _patches(session: Session, name: str, item: image.VisionInput, first_pass: tuple[int, int]) -> None:
    session.add(name, "host", f"{name}.size_first_pass", first_pass)
    stored = session.cases.arrays[f"{name}.grid_thw"]["shape"]
    session.add(name, "host", f"{name}.grid_thw", np.asarray(item.grid).reshape(stored))
    rows = session.cases.array(f"{name}.rows")
    session.add(name, "host", f"{name}.rows", rows[rows < len(item.pixel_values)])
    session.add(name, "host", f"{name}.pixel_rows", item.pixel_values[rows])
    session.add(name, "host", f"{name}.row_mean", item.pixel_values.mean(axis=1, dtype=np.float64))


def _image(session: Session, case: Case) -> None:
    raw = Image.fromarray(session.cases.array(case["inputs"][0]))
    first = image.first_pass(raw)
    _patches(session, case["id"], image.process_image(raw), (first.height, first.width))


def _video(session: Session, case: Case) -> None:
    raw, part = session.cases.array(case["inputs"][0]), VideoPart(**_known(case["element"]))
    item, indices = video.process_array(raw, case["fps"], part)
    session.add(case["id"], "host", f"{case['id']}.frame_indices", indices)
    first = fit(raw.shape[1], raw.shape[2], *video.pixel_limits(part, len(indices)), FACTOR)
    _patches(session, case["id"], item, first)


def _audio(session: Session, case: Case) -> None:
    waveform = session.cases.array(case["inputs"][0])
    clip = process_waveform(waveform, case["sample_rate"], max_frames=session.config.audio.max_frames)
    session.add(case["id"], "host", f"{case['id']}.mel", clip.mel)
    session.add(case["id"], "host", f"{case['id']}.encoder_length", clip.tokens)


HOST_GROUPS: dict[str, Callable[[Session, Case], None]] = {
    "position_ids": _positions,
    "image_processor": _image,
    "video_processor": _video,
    "audio_processor": _audio,
}


def _known(element: dict[str, Any]) -> dict[str, Any]:
    """The reference's video element without what names the file."""
    return {key: value for key, value in element.items() if key not in ("type", "video")}


def replay_lists(session: Session) -> None:
    """Compares the lists of `cases.json` that are no arrays."""
    index = session.cases.index
    for entry in index.get("image_sizes", []):
        first = fit(entry["height"], entry["width"], *image.FIRST_PASS, FACTOR)
        second = fit(*first, *image.SECOND_PASS, FACTOR)
        name = f"image_sizes.{entry['height']}x{entry['width']}"
        session.add_equal("image_sizes", name, [list(first), list(second)], [entry["first_pass"], entry["second_pass"]])
    for number, entry in enumerate(index.get("video_frame_choice", [])):
        chosen = video.frame_indices(VideoPart(**_known(entry["element"])), entry["total_frames"], entry["fps"])
        session.add_equal("video_frame_choice", f"video_frame_choice.{number}", chosen, entry["frame_indices"])
    for name, entry in index.get("chat", {}).items():
        prompt = chat_prompt(entry["conversation"], **entry["options"])
        session.add_equal("chat", f"chat.{name}.prompt", prompt, entry["prompt"])
        if entry["expanded"] is not None:
            media = entry["media"]
            expanded = expand_prompt(
                prompt, media.get("image_grid_thw", ()), media.get("video_grid_thw", ()), media.get("audio_lengths", ())
            )
            session.add_equal("chat", f"chat.{name}.expanded", expanded, entry["expanded"])
        if "prompt_a268188" in entry:
            variant = chat_prompt(entry["conversation"], **entry["options"], end_assistant_turns=True)
            session.add_equal("chat", f"chat.{name}.prompt_a268188", variant, entry["prompt_a268188"])
