"""The voices of a bundle: presets by name, and voices taken from a reference clip."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ming_trt.errors import InputError, UnavailableError
from ming_trt.processing.speech_text import has_cjk
from ming_trt.processing.voice import Floats, Voice, bfloat16_rounded, check_clip, load_voice, speaker_features
from ming_trt.runtime.engine import Engine, open_engine

SPEAKER_MODEL, CODEC_MODEL = "campplus.onnx", "speech_tokenizer_v1.onnx"
PRESET_FOLDERS = ("talker/spks", "data/spks", "spks")


class Voices:
    """`presets` by name; `folder` may hold the two models that a reference clip needs (opened when first asked for)."""

    def __init__(self, presets: Mapping[str, Voice], folder: Path | None = None, mel: int = 80) -> None:
        self.presets = dict(presets)
        self._folder, self._mel = folder, mel
        self._engines: dict[str, Engine] = {}
        self._lock = threading.Lock()

    @classmethod
    def of_assets(cls, assets: Path, mel: int) -> Voices:
        """The `.pt` files in the bundle's assets, by their names without ending; `luna` finds `luna_v2.pt` too."""
        presets = {
            file.stem: load_voice(file) for folder in PRESET_FOLDERS for file in sorted((assets / folder).glob("*.pt"))
        }
        return cls(presets, assets / "talker", mel)

    def named(self, name: str | None, text: str) -> Voice:
        """The preset `name`, or the default for the language of `text`: luna for Chinese, eng for the rest.

        Raises `InputError` for a name that is not there, `UnavailableError` if there is no voice at all.
        """
        if not self.presets:
            raise UnavailableError(
                "this bundle has no voices: put luna_v2.pt and eng_v2.pt into talker/spks of the checkpoint and build "
                "again, or send a reference clip"
            )
        if name is None:
            wanted = "luna" if has_cjk(text) else "eng"
            return self._find(wanted) or next(iter(self.presets.values()))
        found = self._find(name)
        if found is None:
            raise InputError(f"there is no voice '{name}': choose one of {', '.join(self.presets)}")
        return found

    def _find(self, name: str) -> Voice | None:
        if name in self.presets:
            return self.presets[name]
        return next((voice for stem, voice in self.presets.items() if stem.startswith(f"{name}_")), None)

    def from_clip(self, samples: Floats, text: str) -> Voice:
        """The voice of a recording, `samples` f32 [n] at 16 kHz, that says `text`.

        Raises `InputError` for a clip that is too short, too long or silent, or without its text, and
        `UnavailableError` where the bundle lacks the models that it needs.
        """
        from ming_trt.processing.audio import log_mel

        if not text.strip():
            raise InputError("a reference clip needs the text that it says: send it as 'voice_text'")
        samples = check_clip(samples)
        speaker = self._run(SPEAKER_MODEL, speaker_features(samples)[None])
        codes = self._run(CODEC_MODEL, log_mel(samples).T[None]).reshape(-1).astype(np.int64)
        vector = bfloat16_rounded(speaker.reshape(-1).astype(np.float32))
        return Voice(text, codes, vector, np.empty(0, np.int64), np.empty((0, self._mel), np.float32), vector)

    def _run(self, model: str, features: Floats) -> Floats:
        """A model of the checkpoint whose inputs are features [1, …] and, for some, their length."""
        with self._lock:
            if model not in self._engines:
                file = None if self._folder is None else self._folder / model
                if file is None or not file.is_file():
                    raise UnavailableError(
                        f"a reference clip needs {model}, which this bundle does not have: choose a preset voice, or "
                        f"build from a checkpoint with talker/{model}"
                    )
                self._engines[model] = open_engine(file, model)
            engine = self._engines[model]
            feeds = {}
            for name, spec in engine.inputs.items():
                if len(spec.shape) == features.ndim:
                    feeds[name] = np.ascontiguousarray(features, spec.dtype)
                else:
                    feeds[name] = np.full([1] * len(spec.shape), features.shape[-1], spec.dtype)
            return next(iter(engine.run(feeds).values()))

    def close(self) -> None:
        """Frees the models."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
