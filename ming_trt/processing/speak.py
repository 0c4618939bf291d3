"""How an answer is to be spoken: the options of a request and their limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ming_trt.processing.fields import Check, boolean, fields, integer, number, string

MAX_SEED = (1 << 63) - 1
MAX_AHEAD_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class SpeakOptions:
    """`read`: the text of the last message itself is spoken, and the language model is not asked. `voice`: name of a
    preset (None: by the text's language); `voice_text`: what a reference clip, which travels beside the request, says.
    Equal seeds, texts and voices give equal audio. `ahead`: seconds of sound that may be on their way beyond what the
    client has reported as heard; 0 = any. Raises `InputError` for a value out of range.
    """

    read: bool = False
    voice: str | None = None
    voice_text: str | None = None
    seed: int = 0
    ahead: float = 0.0


_CHECKS: dict[str, Check] = {
    "read": boolean,
    "voice": string,
    "voice_text": string,
    "seed": integer(0, MAX_SEED),
    "ahead": number(0.0, MAX_AHEAD_SECONDS),
}


def speak_options(name: str, value: Any) -> SpeakOptions:
    """The options in a request's JSON object. Raises `InputError`."""
    return SpeakOptions(**fields(f"'{name}'", value, _CHECKS))
