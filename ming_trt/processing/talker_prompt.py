"""What the talker is given before it speaks: two id streams of equal length, and the rows that replace embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from ming_trt.errors import CheckpointError
from ming_trt.processing.tokenizer import TextCodec

Ints = npt.NDArray[np.int64]

# In the order of their ids, which are the last of the text vocabulary.
SPECIAL_TOKENS = (
    "<audio_bos>",
    "<audio_eos>",
    "<audio_pad>",
    "<text_bos>",
    "<text_eos>",
    "<text_pad>",
    "<prompt>",
    "</prompt>",
    "<thinker_prefix>",
    "</thinker_prefix>",
    "<vp>",
    "</vp>",
)


@dataclass(frozen=True, slots=True)
class TalkerTokens:
    """Ids of the talker's special tokens; `first_audio` is the id of the codec BPE's entry 0."""

    audio_bos: int
    audio_eos: int
    audio_pad: int
    text_bos: int
    text_eos: int
    text_pad: int
    prompt: int
    prompt_end: int
    thinker: int
    thinker_end: int
    speaker: int
    speaker_end: int
    first_audio: int

    @classmethod
    def of(cls, codec: TextCodec, first_audio: int) -> TalkerTokens:
        """From the talker's tokenizer. Raises `CheckpointError` if it lacks one or gives an id outside the text's."""
        found = {token: codec.encode(token) for token in SPECIAL_TOKENS}
        unknown = [token for token, ids in found.items() if len(ids) != 1]
        if unknown:
            raise CheckpointError(
                f"the talker's tokenizer has no token '{unknown[0]}': take the files of the checkpoint's talker folder"
            )
        ids = [number for (number,) in found.values()]
        if not all(0 <= token < first_audio for token in ids):
            raise CheckpointError(
                f"the talker's special tokens {ids} must lie below its {first_audio} text ids: take tokenizer and "
                "configuration from the same checkpoint"
            )
        return cls(**dict(zip(_NAMES, ids, strict=True)), first_audio=first_audio)

    @classmethod
    def by_position(cls, first_audio: int) -> TalkerTokens:
        """Where there is no tokenizer: the last ids of the text vocabulary, in the official order."""
        start = first_audio - len(SPECIAL_TOKENS)
        return cls(**{name: start + i for i, name in enumerate(_NAMES)}, first_audio=first_audio)


_NAMES = tuple(field.name for field in fields(TalkerTokens))[:-1]  # in the order of SPECIAL_TOKENS


@dataclass(frozen=True, slots=True)
class TalkerPrompt:
    """`audio_ids`, `text_ids` i64 [n]; `speaker_index`, `thinker_index` i64 [n] name rows, -1 = the embeddings stay.

    `later_text` are text ids for which the prompt has no place: one goes with each generated id, then `<text_pad>`.
    """

    audio_ids: Ints
    text_ids: Ints
    speaker_index: Ints
    thinker_index: Ints
    later_text: Ints

    def __len__(self) -> int:
        return len(self.audio_ids)


def talker_prompt(
    tokens: TalkerTokens,
    voice_entries: Sequence[int],
    voice_text: Sequence[int],
    text: Sequence[int],
    thinker_rows: int,
) -> TalkerPrompt:
    """Both streams for `text` (ids), spoken on after a recording: its codec BPE entries and its transcript's ids.

    The streams run in parallel after the common head: the recording's W ids (and the one that begins them) beside both
    texts, which `<text_eos>` ends and `<text_pad>` fills up. Longer texts continue while the talker generates; the
    official model refuses those.
    """
    t = tokens
    head = [t.prompt, t.prompt_end, t.thinker, *[t.audio_pad] * thinker_rows, t.thinker_end]
    speaker_place = len(head) + 1
    head += [t.speaker, t.audio_pad, t.speaker_end]
    audio = [t.audio_bos, *(t.first_audio + entry for entry in voice_entries)]
    words = [*voice_text, *text, t.text_eos]
    beside = words[: len(audio)] + [t.text_pad] * (len(audio) - len(words))
    count = len(head) + len(audio)
    speaker, thinker = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    speaker[speaker_place] = 0
    thinker[3 : 3 + thinker_rows] = np.arange(thinker_rows)
    return TalkerPrompt(
        np.array(head + audio, np.int64),
        np.array(head + beside, np.int64),
        speaker,
        thinker,
        np.array(words[len(audio) :], np.int64),
    )
