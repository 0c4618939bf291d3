"""Streamed audio against the audio of one run over all codes."""

import gc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ming_trt.errors import InputError
from ming_trt.processing.voice import Voice
from ming_trt.runtime.audio_stream import OVERLAP, OfficialStream, SeamlessStream
from ming_trt.runtime.detokenizer import MAX_FRAMES, Detokenizer
from ming_trt.runtime.flow_memory import FlowMemory

# The issue asks for 1e-3; what differs is the order in which a convolution adds, which depends on its length.
TOLERANCE = 1e-4
SLOW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def pieces_of(codes: list[int], cuts: list[int]) -> list[list[int]]:
    """`codes` in parts of the lengths `cuts`, again and again."""
    parts, place = [], 0
    while place < len(codes):
        size = cuts[len(parts) % len(cuts)]
        parts.append(codes[place : place + size])
        place += size
    return parts


def without_prompt(voice: Voice, keep: int) -> Voice:
    """The voice with the first `keep` frames of its prompt."""
    return Voice(
        voice.text, voice.codes, voice.speaker, voice.flow_codes[:keep], voice.flow_mel[:keep], voice.flow_speaker
    )


@SLOW
@given(
    count=st.integers(1, 330),
    cuts=st.lists(st.integers(1, 90), min_size=1, max_size=5),
    prompt=st.sampled_from([0, 1, 49, 50, 120]),
    seed=st.integers(0, 9),
)
def test_seamless(detokenizer: Detokenizer, voice: Voice, count: int, cuts: list[int], prompt: int, seed: int) -> None:
    """Equal everywhere, of the right length, and the joins are as smooth as the rest."""
    speaker = without_prompt(voice, prompt)
    codes = np.random.default_rng(seed).integers(0, detokenizer.vocabulary, count).tolist()

    def stream() -> SeamlessStream:
        return SeamlessStream(detokenizer, speaker, np.random.default_rng(seed))

    whole = stream()
    whole.hold(codes)
    expected = whole.finish()
    assert expected.size == count * detokenizer.hop
    streamed = stream()
    chunks = [chunk for part in pieces_of(codes, cuts) for chunk in streamed.push(part)]
    chunks.append(streamed.finish())
    joined = np.concatenate(chunks)
    assert joined.size == expected.size and streamed.codes == count
    assert np.abs(joined - expected).max() <= TOLERANCE
    jumps = np.abs(np.diff(joined))
    joins = np.cumsum([chunk.size for chunk in chunks[:-1]])
    assert all(jumps[join - 1] <= jumps.max() * 1.001 for join in joins)


def test_the_first_chunk_is_small_and_later_ones_larger(detokenizer: Detokenizer, voice: Voice) -> None:
    stream = SeamlessStream(detokenizer, voice, np.random.default_rng(0))
    codes = np.random.default_rng(1).integers(0, detokenizer.vocabulary, 600).tolist()
    first_codes, sizes = 0, []
    for code in codes:
        for chunk in stream.push([code]):
            sizes.append(chunk.size // detokenizer.hop)
            first_codes = first_codes or stream.codes
    assert first_codes == 30 + detokenizer.look_ahead, "the chunk in which the prompt's 120 frames end"
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3] == 200, sizes


def test_official_chunks_and_cross_fades(detokenizer: Detokenizer, voice: Voice) -> None:
    """Its chunks add up to the codes; the window's halves are those of a Hamming window."""
    stream = OfficialStream(detokenizer, voice, np.random.default_rng(0))
    codes = np.random.default_rng(1).integers(0, detokenizer.vocabulary, 140).tolist()
    sizes = [chunk.size for chunk in stream.push(codes)]
    sizes.append(stream.finish().size)
    hop = detokenizer.hop
    assert sizes == [(80 - OVERLAP) * hop, 50 * hop, (10 + OVERLAP) * hop]
    assert stream.fade[0] == pytest.approx(0.08) and stream.fade.size == 2 * OVERLAP * hop


def test_codes_that_cannot_be_decoded(detokenizer: Detokenizer, voice: Voice) -> None:
    stream = SeamlessStream(detokenizer, voice, np.random.default_rng(0), chunked=False)
    stream.hold([detokenizer.vocabulary])
    with pytest.raises(InputError, match="is not one of"):
        stream.finish()
    with pytest.raises(InputError, match="split the text"):
        detokenizer.to_mel(voice, np.zeros(MAX_FRAMES, np.int64), chunked=False, final=True)


@pytest.mark.parametrize("frames", [0, 160, 250])
def test_without_memory_the_same_audio_comes_later(
    detokenizer: Detokenizer, voice: Voice, monkeypatch: pytest.MonkeyPatch, frames: int
) -> None:
    """Room for `frames` frames in all streams: none from the beginning, or none after the first chunks."""
    codes = np.random.default_rng(1).integers(0, detokenizer.vocabulary, 230).tolist()

    def speak() -> list[np.ndarray]:
        stream = SeamlessStream(detokenizer, voice, np.random.default_rng(0))
        chunks = list(stream.push(codes))
        assert detokenizer.memory.used <= detokenizer.memory.budget
        return [*chunks, stream.finish()]

    expected = speak()
    assert detokenizer.memory.used == 0
    monkeypatch.setattr(detokenizer, "memory", FlowMemory(room(detokenizer, frames)))
    late = speak()
    assert len(late) < len(expected) and detokenizer.memory.used == 0
    assert np.abs(np.concatenate(late) - np.concatenate(expected)).max() <= TOLERANCE


def test_streams_share_the_memory(detokenizer: Detokenizer, voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for one: the second speaks late, and what the first leaves is there for the third."""
    monkeypatch.setattr(detokenizer, "memory", FlowMemory(room(detokenizer, 260)))
    codes = np.random.default_rng(1).integers(0, detokenizer.vocabulary, 90).tolist()
    first, second, third = (SeamlessStream(detokenizer, voice, np.random.default_rng(0)) for _ in range(3))
    heard = list(first.push(codes))
    assert heard and not list(second.push(codes))
    assert np.array_equal(np.concatenate([*heard, first.finish()]).shape, second.finish().shape)
    assert list(third.push(codes))
    del third
    gc.collect()
    assert detokenizer.memory.used == 0, "a stream that was left holds nothing"


def room(detokenizer: Detokenizer, frames: int) -> int:
    """Bytes of a stream with so many frames; 1 for none."""
    return detokenizer.stream_bytes(frames) if frames else 1
