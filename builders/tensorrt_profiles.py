"""Optimisation profiles: from the limits of a preset to the sizes that each input of an engine may have.

An engine has one profile for each way it is run (decode and prefill; pictures and videos). The runtime takes the first
that a call fits into.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ming_trt.errors import BuildError
from ming_trt.presets import Profile
from ming_trt.processing.image_size import BUCKETS
from ming_trt.runtime import vision_runs
from ming_trt.runtime.talker import MAX_STEPS

# smallest, typical and largest size of an axis
Range = tuple[int, int, int]
# Merge cells are 2 x 2 patches; a window has at least one.
_CELL = 4
# Latent cells of a side, eight pixels each; two by two of them are a token of the denoiser. The gate's samples are
# smaller than any picture.
_LATENT: Range = (4, 64, max(h for _, h, _ in BUCKETS) // 8)
_TOKENS: Range = (_LATENT[0] ** 2 // 4, _LATENT[1] ** 2 // 4, _LATENT[2] ** 2 // 4)
_PICTURE_BATCH: Range = (1, 3, 6)
# Codes (and mel frames) of an utterance in one part; a part of a stream is about 25.
_CODES: Range = (1, 50, 1536)
# The RTX builder fails on a prefill profile that ends below 128 tokens, beside one of single tokens.
_TILE = 128
_LOGITS: Range = (1, 1, 8)


@dataclass(frozen=True, slots=True)
class Phase:
    """One profile: the range of each symbolic size in the inputs."""

    name: str
    sizes: Mapping[str, Range]

    def shapes(self, inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Input -> smallest, typical and largest shape, for those with a symbolic size; `inputs` as in the manifest.

        Raises `BuildError` naming a symbol without a range.
        """
        shapes = {}
        for name, spec in inputs.items():
            if any(isinstance(size, str) for size in spec["shape"]):
                shapes[name] = tuple(tuple(self._size(name, size, k) for size in spec["shape"]) for k in range(3))
        return shapes

    def _size(self, name: str, size: int | str, which: int) -> int:
        if isinstance(size, int):
            return size
        if size not in self.sizes:
            raise BuildError(f"profile '{self.name}' has no range for '{size}' of input '{name}': add it")
        return self.sizes[size][which]


def _clip(low: int, typical: int, high: int) -> Range:
    high = max(low, high)
    return (low, min(max(low, typical), high), high)


# Name, and most frames of a run. Each takes frames as long as the fewest that the one before does not take can be.
_FRAMES = (("pictures", 4), ("videos", 16), ("long videos", 64), ("small pictures", vision_runs.FRAMES))


def _vision(p: Profile, _: Mapping[str, Any]) -> list[Phase]:
    """Frames are padded to the longest, so what a profile allows is F * L places: few long ones or many short ones.

    A run has no more places than a request may have patches (`runtime/vision_runs.py`); together they take them all.
    """
    patches = _CELL * p.max_image_tokens
    shared = {"N": _clip(_CELL, 4096, patches), "W": _clip(1, 64, patches // _CELL)}
    found: list[Phase] = []
    fewest = 1
    for name, most in _FRAMES:
        length = _clip(_CELL, 4 * 4096 // most, patches // fewest)
        found.append(Phase(name, {**shared, "F": _clip(1, most if found else 1, most), "L": length}))
        fewest = most + 1
    return found


def _audio(p: Profile, facts: Mapping[str, Any]) -> list[Phase]:
    longest = min(p.max_audio_frames, int(facts.get("max_frames", p.max_audio_frames)))
    return [Phase("clip", {"frames": _clip(1, 1500, longest)})]


def _decoder(p: Profile, batch: Range, rows: Mapping[str, Range]) -> list[Phase]:
    decode: dict[str, Range] = {"B": batch, "S": (1, 1, 1), "K": (1, 1, 1)}
    # Prefill runs one slot at a time.
    prefill: dict[str, Range] = {
        "B": (1, 1, 1),
        "S": _clip(1, p.prefill_chunk, max(p.prefill_chunk, _TILE)),
        "K": _LOGITS,
    }
    return [Phase("decode", {**decode, **rows}), Phase("prefill", {**prefill, **rows})]


def _llm(p: Profile, _: Mapping[str, Any]) -> list[Phase]:
    return _decoder(p, _clip(1, p.slots, p.slots), {"R": _clip(1, 1, p.max_seq_len)})


def _talker(p: Profile, _: Mapping[str, Any]) -> list[Phase]:
    # Each generation is a run of its own, with its speaker; the gate's sample has two speakers and three rows.
    return _decoder(p, (1, 1, 1), {"P": (1, 1, 2), "R": _clip(1, 1, max(3, p.max_seq_len))})


def _pictures(_: Profile, __: Mapping[str, Any]) -> list[Phase]:
    sides = dict.fromkeys(("height", "width"), _LATENT)
    return [Phase("pictures", {"batch": _PICTURE_BATCH, **sides})]


def _dit(_: Profile, __: Mapping[str, Any]) -> list[Phase]:
    # A picture without a reference passes a 2 x 2 stand-in; with one it has twice as many tokens. The
    # largest sizes must fit each other: TensorRT evaluates a profile's corners.
    reference: Range = (2, _LATENT[1], _LATENT[2])
    sizes = {"batch": _PICTURE_BATCH, "height": _LATENT, "width": _LATENT}
    sizes |= {
        "reference_height": reference,
        "reference_width": reference,
        "tokens": (_TOKENS[0], _TOKENS[1], 2 * _TOKENS[2]),
    }
    return [Phase("denoise", sizes)]


def _vae_encoder(_: Profile, facts: Mapping[str, Any]) -> list[Phase]:
    factor = int(facts.get("factor", 8))
    side = tuple(size * factor for size in _LATENT)
    return [Phase("pictures", {"batch": (1, 1, 2), "height": side, "width": side})]  # type: ignore[dict-item]


def _vae_decoder(_: Profile, __: Mapping[str, Any]) -> list[Phase]:
    return [Phase("pictures", {"batch": (1, 1, 2), "height": _LATENT, "width": _LATENT})]


def _part(batch: Range) -> list[Phase]:
    return [Phase("part", {"B": batch, "C": _CODES, "T": _CODES})]


def _speech(_: Profile, __: Mapping[str, Any]) -> list[Phase]:
    """Utterances have caches of their own, and are rendered one by one."""
    return _part((1, 1, 1))


def _guided(_: Profile, __: Mapping[str, Any]) -> list[Phase]:
    """Always two rows, with the condition and without, however few requests there may be."""
    return _part((2, 2, 2))


_PHASES: dict[str, Callable[[Profile, Mapping[str, Any]], list[Phase]]] = {
    "vision_encoder": _vision,
    "audio_encoder": _audio,
    "llm": _llm,
    "connector": _pictures,
    "condition": _pictures,
    "dit": _dit,
    "vae_encoder": _vae_encoder,
    "vae_decoder": _vae_decoder,
    "talker": _talker,
    "flow_encoder": _speech,
    "flow_estimator": _guided,
    "f0_predictor": _speech,
    "vocoder": _speech,
}


def phases(component: str, profile: Profile, facts: Mapping[str, Any]) -> list[Phase]:
    """The profiles of an engine. `facts` are those of its export. Raises `BuildError` for an unknown engine."""
    if component not in _PHASES:
        raise BuildError(f"there are no profiles for engine '{component}': add them to {__name__}")
    return _PHASES[component](profile, facts)


def fixed_sizes(component: str, profile: Profile) -> dict[str, int]:
    """Symbols that are one number in TensorRT: caches that are updated in place have a static capacity.

    It is rounded up to whole tiles of the attention kernels. The talker reads what the language model read and goes on.
    """
    tokens = {"llm": profile.max_seq_len, "talker": profile.max_seq_len + MAX_STEPS}
    if component in tokens:
        return {"T": -(-tokens[component] // _TILE) * _TILE}
    return {"T": _CODES[2]} if component in ("flow_encoder", "flow_estimator") else {}
