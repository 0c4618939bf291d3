"""The stages of a request between its arrays and the LLM, and how each is opened from a bundle.

Every stage is one model of the server and one call of the in-process pipeline; both come here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ming_trt.bundle import Bundle
from ming_trt.config import MingConfig, load_config
from ming_trt.errors import InputError
from ming_trt.processing.prepare import Processor
from ming_trt.processing.tokenizer import Tokenizer
from ming_trt.processing.vision_index import vision_indices
from ming_trt.runtime.cancel import CancelBoard
from ming_trt.runtime.engine import Engine, open_engine
from ming_trt.runtime.front import Front
from ming_trt.runtime.generator import LLM
from ming_trt.runtime.sequence import LLMOptions
from ming_trt.runtime.vision_runs import PLACES, runs

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


class VisionEncoder:
    """Patches to rows for the LLM. `max_tokens`: most rows of a request (four patches each)."""

    def __init__(self, engine: Engine, config: MingConfig, max_tokens: int | None = None) -> None:
        self._engine, self._config, self._max_tokens = engine, config, max_tokens

    def __call__(self, pixel_values: Floats, image_grid: Ints) -> Floats:
        """Rows f32 [N/4, H], unit length, in the order of `pixel_values` f32 [N, 1176]; `image_grid` int [n, 3] holds
        (t, h, w) of each picture or video in patches. Without any, no rows, and the engine does not run.

        Raises `InputError` for grids that do not fit the patches or are above the limit, `EngineError` for rows that
        are not finite.
        """
        merge, hidden = self._config.vision.merge_size, self._config.llm.hidden_size
        patches = image_grid.reshape(-1, 3).astype(np.int64).prod(axis=1)
        if len(pixel_values) != patches.sum():
            raise InputError(
                f"{len(pixel_values)} patches came with grids of {patches.sum()}: send both from one picture"
            )
        rows = int(patches.sum()) // merge**2
        if self._max_tokens is not None and rows > self._max_tokens:
            raise InputError(
                f"the images and videos make {rows} tokens and the limit is {self._max_tokens}: send fewer or smaller "
                "ones, or build with a larger profile.max_image_tokens"
            )
        # an engine of a small limit has no room for more places than that, be it for padding
        places = PLACES if self._max_tokens is None else min(PLACES, self._max_tokens * merge**2)
        parts = [np.zeros((0, hidden), np.float32)]
        for first, stop in runs(image_grid.astype(np.int64), places):
            start, end = int(patches[:first].sum()), int(patches[:stop].sum())
            indices = vision_indices(image_grid[first:stop], self._config.vision)
            parts.append(self._engine.run({"patches": pixel_values[start:end], **indices}, ["rows"])["rows"])
        return np.concatenate(parts)

    def close(self) -> None:
        """Frees the engine."""
        self._engine.close()


class AudioEncoder:
    """Mel frames to rows for the LLM, clip by clip: in a batch, padding would change the shorter clips.

    `max_frames`: longest clip in mel frames (10 ms).
    """

    def __init__(self, engine: Engine, config: MingConfig, max_frames: int | None = None) -> None:
        self._engine, self._config = engine, config
        self._max_frames = min(max_frames or config.audio.max_frames, config.audio.max_frames)

    def __call__(self, mel: Floats, mel_lengths: Ints) -> Floats:
        """Rows f32 [R, H], unit length, of all clips in order; `mel` f32 [sum of lengths, 128], `mel_lengths` int [k].
        Without any, no rows, and the engine does not run.

        Raises `InputError` for lengths that do not fit `mel` or are above the limit, `EngineError` for rows that are
        not finite.
        """
        lengths = [int(length) for length in mel_lengths]
        if sum(lengths) != len(mel) or min(lengths, default=1) < 1:
            raise InputError(
                f"{len(mel)} mel frames came with the lengths {lengths}: they must add up, each at least 1"
            )
        if max(lengths, default=0) > self._max_frames:
            raise InputError(
                f"an audio clip has {max(lengths)} mel frames ({max(lengths) / 100:.1f} s) and the limit is "
                f"{self._max_frames}: cut it, or build with a larger profile.max_audio_frames"
            )
        parts = [np.zeros((0, self._config.llm.hidden_size), np.float32)]
        for clip in np.split(mel, np.cumsum(lengths)[:-1]) if lengths else []:
            parts.append(self._engine.run({"mel": clip}, ["rows"])["rows"])
        return np.concatenate(parts)

    def close(self) -> None:
        """Frees the engine."""
        self._engine.close()


def open_vision_encoder(bundle: Bundle) -> VisionEncoder:
    """The bundle's vision stage. Raises `BundleError` or `EngineError`."""
    engine = _open_encoder(bundle, "vision_encoder")
    return VisionEncoder(engine, load_config(bundle.assets), bundle.preset.profile.max_image_tokens)


def open_audio_encoder(bundle: Bundle) -> AudioEncoder:
    """The bundle's audio stage. Raises `BundleError` or `EngineError`."""
    engine = _open_encoder(bundle, "audio_encoder")
    return AudioEncoder(engine, load_config(bundle.assets), bundle.preset.profile.max_audio_frames)


def open_llm(bundle: Bundle, board: CancelBoard | None = None) -> Front:
    """The bundle's LLM with the limits of its preset, running. Stop strings need a tokenizer in the bundle."""
    if bundle.component("llm").target == "tensorrt-llm":
        from ming_trt.trtllm.open import open_service

        return open_service(bundle, llm_options(bundle), board)
    engine = open_engine(bundle, "llm", threads=bundle.preset.threads)
    decoder = open_tokenizer(bundle) if (bundle.assets / "tokenizer.json").is_file() else None
    return LLM(engine, llm_options(bundle), decoder, board)


def llm_options(bundle: Bundle) -> LLMOptions:
    """The limits that the bundle's preset and the model's configuration set."""
    config, profile = load_config(bundle.assets), bundle.preset.profile
    max_seq_len = min(profile.max_seq_len, config.llm.max_positions)
    return LLMOptions(
        eos_token_ids=(config.tokens.eos,),
        max_seq_len=max_seq_len,
        slots=profile.slots,
        prefill_chunk=min(profile.prefill_chunk, max_seq_len),
        kv_budget=bundle.preset.kv_budget,
    )


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """The checkpoint's tokenizer. Raises `CheckpointError` if the bundle has none."""
    return Tokenizer.from_checkpoint(bundle.assets)


def open_processor(bundle: Bundle) -> Processor:
    """What turns requests into arrays. A prompt must leave room for one token of the answer."""
    limit = llm_options(bundle).max_seq_len - 1
    return Processor(load_config(bundle.assets), open_tokenizer(bundle), max_prompt_tokens=limit)


def _open_encoder(bundle: Bundle, component: str) -> Engine:
    return open_engine(bundle, component, threads=bundle.preset.threads, finite=["rows"], shrink_memory=True)
