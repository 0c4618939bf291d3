"""The clock of a spoken answer: paths add up, and blame whom the end has waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.processing.speech_text import Piece
from ming_trt.runtime.speech import Speech
from ming_trt.runtime.speech_clock import LABELS, Lane, Path

HOP = 480
# What a busy machine may take until threads have ended.
BUSY_S = 2.0


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.floats(0, 10)), max_size=20), st.floats(-1, 250))
def test_a_split_adds_up_from_any_moment(parts: list[tuple[str, float]], since: float) -> None:
    path, now = Path("", 0.0), 0.0
    for label, seconds in parts:
        now += seconds
        path = path.then(label, now)
    assert sum(path.split(since).values()) == pytest.approx(max(0.0, now - max(since, 0.0)), abs=1e-9)
    expected = {label: sum(seconds for name, seconds in parts if name == label) for label in LABELS}
    assert path.split() == pytest.approx(expected, abs=1e-9)


def test_who_waits_goes_on_with_the_path_of_what_came() -> None:
    talker, decoder = Lane(Path("", 0.0)), Lane(Path("", 0.0))
    talker.path = talker.path.then("talker", 3.0)
    decoder.took(talker.path)
    decoder.path = decoder.path.then("flow", 5.0)
    talker.path = talker.path.then("talker", 4.0)
    decoder.took(talker.path)
    assert decoder.path.split() == {**dict.fromkeys(LABELS, 0.0), "talker": 3.0, "flow": 2.0}, "it was there already"
    talker.path = talker.path.then("talker", 9.0)
    decoder.took(talker.path)
    assert decoder.path.split(8.0) == {**dict.fromkeys(LABELS, 0.0), "talker": 1.0}


class Toy(Speech):
    """Speech of known durations, seconds: of one code (two a piece), of the flow and the vocoder over a piece."""

    sample_rate = 24000

    def __init__(self, talker: float = 0.0, flow: float = 0.0, vocoder: float = 0.0) -> None:
        self.naps = {"talker": talker, "flow": flow, "vocoder": vocoder}

    def codes(self, *_: Any) -> Iterator[list[int]]:
        for code in range(2):
            time.sleep(self.naps["talker"])
            yield [code]

    def stream(self, piece: Piece, voice: Any, random: Any, lap: Callable[[str], None]) -> Any:
        return ToyStream(self.naps, lap)


class ToyStream:
    codes = 2

    def __init__(self, naps: dict[str, float], lap: Callable[[str], None]) -> None:
        self._naps, self._lap = naps, lap

    def push(self, codes: list[int]) -> Iterator[Any]:
        return iter(())

    def finish(self) -> Any:
        for label in ("flow", "vocoder"):
            time.sleep(self._naps[label])
            self._lap(label)
        return np.random.default_rng(0).normal(0, 0.1, 2 * HOP).astype(np.float32)


def spoken(speech: Toy, pieces: int = 4, text: float = 0.0, listener: float = 0.0) -> dict[str, float]:
    """Seconds by label of so many pieces; all but the first come after a pause of `text`, and each is listened to for
    `listener`. They add up to the time that it took."""

    def come() -> Iterator[Piece]:
        for number in range(pieces):
            time.sleep(text if number else 0.0)
            yield Piece("one", False)

    started, lane, count = time.perf_counter(), Lane(), 0
    for chunk in speech.speak(come(), None, lane=lane):  # type: ignore[arg-type]
        time.sleep(listener)
        count += chunk.last
    assert count == pieces
    found = lane.path.split()
    # the threads' end is not in it, which takes what a busy machine lets it
    passed = time.perf_counter() - started
    assert passed - BUSY_S <= sum(found.values()) <= passed
    return found


@pytest.mark.parametrize(
    ("durations", "around", "expected"),
    [
        # the slowest of three that work side by side, and the others only before and after it
        ({"talker": 0.05, "flow": 0.02}, {}, {"talker": 0.4, "flow": 0.02}),
        ({"talker": 0.01, "flow": 0.08, "vocoder": 0.04}, {}, {"talker": 0.02, "flow": 0.32, "vocoder": 0.16}),
        # here text and codes come from one thread
        ({"talker": 0.01, "flow": 0.01}, {"text": 0.1}, {"text": 0.3, "talker": 0.08, "flow": 0.01}),
        ({"vocoder": 0.02}, {"listener": 0.1}, {"vocoder": 0.02, "listener": 0.4}),
        # all queues are full: who fills them has waited for the listener, through the decoder
        ({"vocoder": 0.005}, {"listener": 0.03, "pieces": 14}, {"vocoder": 0.005, "listener": 0.42}),
    ],
)
def test_the_end_has_waited_for_the_slowest(
    durations: dict[str, float], around: dict[str, Any], expected: dict[str, float]
) -> None:
    found = spoken(Toy(**durations), **around)
    # naps last longer on a busy machine, and who was late shifts a little of the blame: the slowest keeps most of it
    slowest = max(expected, key=expected.__getitem__)
    assert found[slowest] >= 0.5 * expected[slowest]
    assert max(found, key=found.__getitem__) == slowest
