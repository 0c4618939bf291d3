"""A request and its media to the arrays that the engines read (docs/DESIGN.md, 4.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ming_trt.config import MingConfig, TokenIds
from ming_trt.errors import CheckpointError, InputError
from ming_trt.processing.audio import AudioInput, process_audio
from ming_trt.processing.image import PixelLimits, VisionInput, process_image
from ming_trt.processing.patches import PatchShape
from ming_trt.processing.positions import position_ids
from ming_trt.processing.preprocessor import second_pass
from ming_trt.processing.prompt import WRAPPERS, Markup, Media, Span, Words, request_spans
from ming_trt.processing.request import ImagePart, MediaKind, Request, VideoPart, check_media
from ming_trt.processing.tokenizer import TextCodec
from ming_trt.processing.video import process_video

TEXT, IMAGE, AUDIO = 0, 1, 2

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `preprocess` gives for a prompt of L tokens.

    `feature_index` is the row of [vision rows, audio rows] that stands for a token, -1 for text. Pictures and videos
    are in the order of the text; without any (or without audio) the arrays have zero rows.
    """

    input_ids: Ints
    """i32 [L]"""
    modality: npt.NDArray[np.uint8]
    """u8 [L]: 0 text, 1 picture or video, 2 audio"""
    positions: Ints
    """i32 [3, L]: time, height, width"""
    position_delta: Ints
    """i32 [1]: the token at index i >= L has the position i + delta"""
    feature_index: Ints
    """i32 [L]"""
    pixel_values: Floats
    """f32 [N, 1176]"""
    image_grid: Ints
    """i32 [n, 3]: (t, h, w) in patches"""
    mel: Floats
    """f32 [frames of all clips, 128]"""
    mel_lengths: Ints
    """i32 [k]: frames of each clip"""

    @property
    def length(self) -> int:
        """L, the number of tokens."""
        return len(self.input_ids)

    def tensors(self) -> dict[str, npt.NDArray[np.generic]]:
        """All arrays by the names of the contract."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Processor:
    """Turns requests into arrays for one checkpoint. Holds no state between calls, so threads may share one.

    `max_prompt_tokens`: longest prompt that the server takes; `pixel_limits`: second pass of pictures, by default that
    of the checkpoint (image generation takes `image.GENERATION_PASS`); `end_assistant_turns`: see
    `prompt.request_spans`. Raises `CheckpointError` where the tokenizer and the configuration do not belong together,
    `ConfigError` for settings of pictures that are not implemented.
    """

    def __init__(
        self,
        config: MingConfig,
        tokenizer: TextCodec,
        *,
        max_prompt_tokens: int | None = None,
        pixel_limits: PixelLimits | None = None,
        end_assistant_turns: bool = False,
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.max_prompt_tokens = config.llm.max_positions if max_prompt_tokens is None else max_prompt_tokens
        self.pixel_limits = second_pass(config.folder) if pixel_limits is None else pixel_limits
        self.end_assistant_turns = end_assistant_turns
        vision = config.vision
        self.patch_shape = PatchShape(vision.patch_size, vision.temporal_patch, vision.merge_size)
        _check_tokens(config, tokenizer)
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def prepare(
        self,
        request: Request,
        images: Sequence[bytes] = (),
        videos: Sequence[bytes | Path] = (),
        audios: Sequence[bytes] = (),
        *,
        pixel_limits: PixelLimits | None = None,
    ) -> Prepared:
        """Arrays for a request and its encoded files, in the order in which the messages mention them. Raises
        `InputError`."""
        check_media(request, len(images), len(videos), len(audios))
        spans = request_spans(request, end_assistant_turns=self.end_assistant_turns)
        parts = [part for message in request.messages for part in message.content]
        vision: dict[tuple[MediaKind, int], VisionInput] = {}
        pictures = (part for part in parts if isinstance(part, ImagePart))
        for i, (picture, data) in enumerate(zip(pictures, images, strict=True)):
            vision["image", i] = process_image(
                data,
                min_pixels=picture.min_pixels,
                max_pixels=picture.max_pixels,
                pixel_limits=pixel_limits or self.pixel_limits,
                shape=self.patch_shape,
            )
            self._check_length(sum(map(self._rows, vision.values())), "at least ")
        films = [part for part in parts if isinstance(part, VideoPart)]
        # Made only where it is used: that takes as long as the checks of a request without media.
        rng = np.random.default_rng(request.sampling.seed) if films else None
        for i, (film, source) in enumerate(zip(films, videos, strict=True)):
            vision["video", i] = process_video(source, film, rng=rng, shape=self.patch_shape)
            self._check_length(sum(map(self._rows, vision.values())), "at least ")
        audio = self.config.audio
        clips = [process_audio(data, max_frames=audio.max_frames, num_mels=audio.num_mels) for data in audios]
        return self.assemble(spans, vision, clips)

    def assemble(
        self, spans: Sequence[Span], vision: dict[tuple[MediaKind, int], VisionInput], clips: Sequence[AudioInput]
    ) -> Prepared:
        """Arrays for a prompt whose media are processed already; `vision` by kind and number, `clips` in order."""
        order = [span for span in spans if isinstance(span, Media)]
        items = [vision[span.kind, span.index] for span in order if span.kind != "audio"]
        sounds = [clips[span.index] for span in order if span.kind == "audio"]
        sizes = {
            span: clips[span.index].tokens if span.kind == "audio" else self._rows(vision[span.kind, span.index])
            for span in order
        }
        return self.index(np.asarray(self.encode(spans, sizes), np.int32), items, sounds)

    def index(self, input_ids: Ints, items: Sequence[VisionInput], clips: Sequence[AudioInput]) -> Prepared:
        """Arrays for token ids whose patch tokens are expanded already; pictures, videos and clips in their order.

        Raises `InputError` for a prompt that is too long or whose patch tokens do not match the media.
        """
        self._check_length(len(input_ids))
        tokens = self.config.tokens
        grid = np.asarray([item.grid for item in items], np.int32).reshape(-1, 3)
        positions, delta = position_ids(
            input_ids,
            grid,
            image_patch=tokens.image_patch,
            rope_kind=self.config.llm.rope_kind,
            merge_size=self.patch_shape.merge,
        )
        modality, feature_index = index_features(input_ids, tokens)
        wanted, found = sum(clip.tokens for clip in clips), int((modality == AUDIO).sum())
        if wanted != found:
            raise InputError(
                f"the prompt has {found} audio tokens but its clips make {wanted}: keep <audioPatch> out of it"
            )
        width, mels = self.config.vision.patch_width, self.config.audio.num_mels
        return Prepared(
            input_ids=np.asarray(input_ids, np.int32),
            modality=modality,
            positions=positions,
            position_delta=np.asarray([delta], np.int32),
            feature_index=feature_index,
            pixel_values=_joined([item.pixel_values for item in items], width),
            image_grid=grid,
            mel=_joined([clip.mel for clip in clips], mels),
            mel_lengths=np.asarray([len(clip.mel) for clip in clips], np.int32),
        )

    def encode(self, spans: Sequence[Span], sizes: dict[Media, int]) -> list[int]:
        """Token ids of spans; `sizes` says how many patch tokens each item of media has.

        Special tokens split a text before anything else does, so encoding the runs between them one by one gives what
        encoding the whole string would, except that words never become special tokens.
        """
        ids: list[int] = []
        run: list[str] = []

        def close_run() -> None:
            ids.extend(self.tokenizer.encode("".join(run), special=False))
            run.clear()

        for span in spans:
            if isinstance(span, Words):
                run.append(span.text)
            elif isinstance(span, Markup):
                for i, piece in enumerate(self._special.split(span.text)):
                    if i % 2:
                        close_run()
                        ids.append(self.tokenizer.special_id(piece))
                    else:
                        run.append(piece)
            else:
                start, patch, end, after = WRAPPERS[span.kind]
                close_run()
                ids.append(self.tokenizer.special_id(start))
                ids += [self.tokenizer.special_id(patch)] * sizes[span]
                ids.append(self.tokenizer.special_id(end))
                run.append(after)
        close_run()
        return ids

    def _check_length(self, tokens: int, least: str = "") -> None:
        if tokens > self.max_prompt_tokens:
            raise InputError(
                f"the prompt has {least}{tokens} tokens, more than the {self.max_prompt_tokens} that are served: "
                "shorten the text, or send fewer or smaller media"
            )

    def _rows(self, item: VisionInput) -> int:
        return len(item.pixel_values) // self.patch_shape.merge**2


def index_features(input_ids: Ints, tokens: TokenIds) -> tuple[npt.NDArray[np.uint8], Ints]:
    """Modality u8 [L] and the feature row i32 [L] of every token: vision rows first, then audio rows, -1 for text."""
    vision, audio = input_ids == tokens.image_patch, input_ids == tokens.audio_patch
    modality = np.where(vision, IMAGE, np.where(audio, AUDIO, TEXT)).astype(np.uint8)
    index = np.full(len(input_ids), -1, np.int32)
    index[vision] = np.arange(vision.sum())
    index[audio] = np.arange(audio.sum()) + vision.sum()
    return modality, index


def _joined(arrays: Sequence[Floats], width: int) -> Floats:
    return np.concatenate(arrays) if arrays else np.zeros((0, width), np.float32)


def _check_tokens(config: MingConfig, tokenizer: TextCodec) -> None:
    known = config.tokens
    expected = {"<imagePatch>": known.image_patch, "<image>": known.image_start, "<video>": known.video_start}
    expected |= {"<audioPatch>": known.audio_patch}
    for name, number in expected.items():
        if tokenizer.special_id(name) != number:
            raise CheckpointError(
                f"the token '{name}' has the id {tokenizer.special_id(name)} in the tokenizer and {number} in "
                "config.json: use the two files of one checkpoint"
            )
    largest = max(tokenizer.special_tokens.values())
    if largest >= config.llm.vocab_size:
        raise CheckpointError(
            f"the tokenizer's last special token has the id {largest} but the model has {config.llm.vocab_size} rows: "
            "use the two files of one checkpoint"
        )
