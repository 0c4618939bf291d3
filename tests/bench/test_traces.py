"""Traces as Triton writes them: read, matched to requests, and cut into rows without gaps."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt.bench.samples import Sample
from ming_trt.bench.svg import along_the_path
from ming_trt.bench.svg import timeline as plot
from ming_trt.bench.traces import Tracing, pieces, read_trace, summarize_traces, timeline
from ming_trt.errors import ServeError

_EVENTS = ("REQUEST_START", "QUEUE_START", "COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END")


def entries(start: float, steps: list[tuple[str, list[float]]], sent: list[float], request: str = "a") -> list[Any]:
    """A file of one request: the ensemble from `start` on, each step with the times of `_EVENTS`; seconds."""

    def stamps(pairs: list[tuple[str, float]]) -> list[dict[str, Any]]:
        return [{"name": name, "ns": round(1e9 * at)} for name, at in pairs]

    found: list[Any] = [{"id": 1, "model_name": "ming", "model_version": 1, "request_id": request}]
    found.append({"id": 1, "timestamps": stamps([("REQUEST_START", start), *(("GRPC_SEND_START", at) for at in sent)])})
    for number, (model, times) in enumerate(steps, 2):
        found.append({"id": number, "model_name": model, "model_version": 1, "parent_id": 1})
        found.append({"id": number, "timestamps": stamps(list(zip(_EVENTS, times, strict=True)))})
    return found


def one(start: float = 10.0) -> list[tuple[str, list[float]]]:
    """Steps of a request: 40 ms of preprocessing, of which 5 ms of copying run beside the encoders."""
    return [
        ("preprocess", [start + t for t in (0.001, 0.001, 0.003, 0.004, 0.034, 0.041)]),
        ("vision_encoder", [start + t for t in (0.036, 0.036, 0.037, 0.038, 0.098, 0.099)]),
        ("audio_encoder", [start + t for t in (0.036, 0.036, 0.037, 0.038, 0.039, 0.040)]),
        ("llm", [start + t for t in (0.100, 0.100, 0.101, 0.102, 0.103, 0.104)]),
        ("postprocess", [start + t for t in (0.202, 0.202, 0.203, 0.204, 0.206, 0.207)]),
        ("postprocess", [start + t for t in (0.302, 0.302, 0.303, 0.304, 0.306, 0.309)]),
    ]


def sample(request: str = "a") -> Sample:
    engine = {"queue": 0.02, "prefill": 0.08, "decode": 0.1}
    return Sample(0, 0.0, 0.32, 0.32, [(0.21, 1), (0.32, 1)], engine=engine, id=request, clock=9.99)


def cut() -> dict[tuple[str, str], float]:
    (trace,) = read_trace(json.dumps(entries(10.0, one(), [10.206, 10.307])))
    found: dict[tuple[str, str], float] = {}
    for piece in pieces(trace, sample()):
        key = (piece.hop, piece.part)
        found[key] = found.get(key, 0.0) + round(1000 * (piece.end - piece.start), 3)
    return found


def test_a_request_is_cut_at_what_the_server_noted() -> None:
    assert cut() == {
        # 10 ms until the server had the question, 3 ms after it sent the end of its answer
        ("client and network", ""): 13,
        ("scheduling and python", ""): 1,
        ("preprocess", "queue"): 2,
        ("preprocess", "input"): 1,
        ("preprocess", "compute"): 30,
        # until the encoder began, although Triton counts 7 ms
        ("preprocess", "output"): 2,
        # the encoder that handed over last
        ("vision_encoder", "queue"): 1,
        ("vision_encoder", "input"): 1,
        ("vision_encoder", "compute"): 60,
        ("vision_encoder", "output"): 2,
        ("llm", "input"): 2,
        ("llm", "queue"): 20,
        ("llm", "prefill"): 80,
        ("llm", "decode"): 100,
        ("postprocess", "queue"): 1,
        ("postprocess", "input"): 1,
        ("postprocess", "compute"): 2,
        ("postprocess", "output"): 1,
    }


@pytest.mark.parametrize(("gives", "hop"), [({"picture": 0.3}, "image"), ({"sounds": [(0.3, 1.0)]}, "speech")])
def test_what_goes_on_after_the_text_has_its_row(gives: dict[str, Any], hop: str) -> None:
    (trace,) = read_trace(json.dumps(entries(10.0, one(), [10.206, 10.5])))
    asked = sample()
    asked.seconds = 0.52
    for name, value in gives.items():
        setattr(asked, name, value)
    found = {(p.hop, p.part): p.end - p.start for p in pieces(trace, asked)}
    assert found[hop, "by difference"] == pytest.approx(0.5 - 0.306)
    last = timeline(trace, asked)["spans"][-1]
    assert (last["model"], last["start"], last["end"]) == (hop, 316, 510)


def test_a_drawing_is_cut_by_the_clock_of_its_model() -> None:
    """What its parts do not explain (waiting, the file of the picture) is left, and parts too long end with it."""
    (trace,) = read_trace(json.dumps(entries(10.0, one(), [10.206, 10.5])))
    asked = sample()
    asked.seconds, asked.picture = 0.52, 0.52
    asked.drawing = {"condition": 0.01, "denoise": 0.1, "decode": 0.05}
    found = {p.part: p.end - p.start for p in pieces(trace, asked) if p.hop == "image"}
    assert found == pytest.approx({"condition": 0.01, "denoise": 0.1, "decode": 0.05, "by difference": 0.034})
    spans = [span for span in timeline(trace, asked)["spans"] if span["model"] == "image"]
    assert [span["part"] for span in spans] == list(found) and spans[-1]["end"] == 510
    assert all(before["end"] == after["start"] for before, after in pairwise(spans))
    asked.drawing = {"denoise": 9.0}
    found = {p.part: p.end - p.start for p in pieces(trace, asked) if p.hop == "image"}
    assert found == pytest.approx({"denoise": 0.5 - 0.306})


def test_a_spoken_answer_is_cut_by_the_clock_of_its_model() -> None:
    (trace,) = read_trace(json.dumps(entries(10.0, one(), [10.206, 10.5])))
    asked = sample()
    asked.seconds, asked.sounds, asked.speaking = 0.52, [(0.3, 1.0)], {"talker": 0.1, "flow": 0.06}
    found = {p.part: p.end - p.start for p in pieces(trace, asked) if p.hop == "speech"}
    assert found == pytest.approx({"talker": 0.1, "flow": 0.06, "by difference": 0.034})
    spans = [span for span in timeline(trace, asked)["spans"] if span["model"] == "speech"]
    assert [span["part"] for span in spans] == list(found) and spans[-1]["end"] == 510


def test_rows_are_means_that_add_up() -> None:
    traces = {t.id: t for name in "ab" for t in read_trace(json.dumps(entries(10.0, one(), [10.307], name)))}
    longer = sample("b")
    longer.seconds = 0.42
    found = summarize_traces(traces, [sample("a"), longer, Sample(0, error="gone", id="c")])
    assert found["requests"] == 2 and found["total_ms"] == pytest.approx(370)
    assert sum(row["ms"] for row in found["rows"]) == pytest.approx(370)
    by_key = {(row["hop"], row["part"]): row for row in found["rows"]}
    assert by_key["client and network", ""]["ms"] == pytest.approx((13 + 113) / 2, abs=0.01)
    assert found["timeline"]["total_ms"] == 420


@given(
    st.lists(st.floats(0.0001, 0.05), min_size=36, max_size=36),
    st.floats(0, 0.05),
    st.floats(0, 0.5),
    st.floats(-0.05, 0.2),
)
def test_pieces_cover_the_request_without_gaps(gaps: list[float], late: float, queue: float, after: float) -> None:
    """Whatever the order in which steps overlap, and also if the client ended before the server noted (`after` < 0)."""
    steps, at = [], 5.0
    for number, (name, _) in enumerate(one()):
        times = []
        for gap in gaps[6 * number : 6 * number + 6]:
            at += gap
            times.append(at)
        steps.append((name, times))
        at -= gaps[6 * number]  # the next step begins before this one ends
    (trace,) = read_trace(json.dumps(entries(5.0, steps, [at])))
    ours = Sample(0, late, max(0.2, at + after - 4.9), engine={"queue": queue}, id="a", clock=4.9)
    found = pieces(trace, ours)
    assert found[0].start == pytest.approx(0, abs=1e-6) and found[-1].end == pytest.approx(ours.seconds)
    for before, after in pairwise(found):
        assert after.start == pytest.approx(before.end, abs=1e-9) and before.end > before.start


def test_traces_of_something_else_are_refused() -> None:
    (trace,) = read_trace(json.dumps(entries(10.0, one(), [10.307])))
    other = sample()
    other.clock = 5000.0
    with pytest.raises(ServeError, match="clock is not the client's"):
        pieces(trace, other)
    (headless,) = read_trace(json.dumps(entries(10.0, one()[1:], [10.307])))
    with pytest.raises(ServeError, match="no 'preprocess'"):
        pieces(headless, sample())
    with pytest.raises(ServeError, match="wrote no trace"):
        summarize_traces({}, [sample()])
    with pytest.raises(ServeError, match="not as Triton writes it"):
        read_trace('[{"name": 1}]')
    assert read_trace("[]") == []


class View:
    """A server that writes a trace file when it is told to trace."""

    def __init__(self, folder: Path, url: str = "127.0.0.1:1", **settings: str) -> None:
        self.url = url
        self.settings = {"trace_mode": "triton", "trace_file": str(folder / "trace.json"), "trace_level": "OFF"}
        self.settings |= settings
        self.asked: list[dict[str, str]] = []

    def trace_settings(self, **change: str) -> dict[str, str]:
        self.asked.append(change)
        return self.settings


def test_tracing_reads_new_files_and_puts_back_what_was_set(tmp_path: Path) -> None:
    (tmp_path / "trace.json.0").write_text(json.dumps(entries(10.0, one(), [10.3], "old")))
    view = View(tmp_path)
    tracing = Tracing(view)  # type: ignore[arg-type]
    assert tracing.why_not == ""
    with tracing.on():
        (tmp_path / "trace.json.1").write_text(json.dumps(entries(10.0, one(), [10.3], "a")))
        (tmp_path / "trace.json.2").write_text(json.dumps(entries(10.0, one(), [10.3], "another client's")))
    assert view.asked[1]["trace_level"] == "TIMESTAMPS" and view.asked[2] == {"trace_level": "OFF"}
    assert set(tracing.read(["a"])) == {"a"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "elsewhere:8001"}, "another machine"),
        ({"trace_file": ""}, "without a file"),
        ({"trace_mode": "opentelemetry"}, "without a file"),
        ({"trace_file": "/nowhere/at/all/trace.json"}, "cannot be seen"),
    ],
)
def test_servers_that_cannot_trace_say_why(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    assert message in Tracing(View(tmp_path, **settings)).why_not  # type: ignore[arg-type]


def test_timeline_shows_every_call() -> None:
    (trace,) = read_trace(json.dumps(entries(10.0, one(), [10.206, 10.307])))
    line = timeline(trace, sample())
    assert {span["model"] for span in line["spans"]} == {name for name, _ in one()}
    assert line["tokens"] == [210, 320] and line["server"][0] == pytest.approx(10)
    text = plot("title", line, 100.0)
    # what begins later is not drawn, what lasts longer is cut
    assert "preprocess, compute: 30 ms" in text and "llm, decode" not in text
    assert along_the_path([("llm", "decode"), ("new", ""), ("llm", "queue"), ("client", "")]) == [
        ("client", ""), ("llm", "queue"), ("llm", "decode"), ("new", ""),
    ]  # fmt: skip
