"""The benchmark against a server whose delays are known: found, attributed, and never mixed with errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from ming_trt.bench.metrics import Slo
from ming_trt.bench.run import INTERRUPTED, Options, run
from ming_trt.bench.write import summary
from ming_trt.errors import InputError, ServeError

from .fake_server import Delays, FakeServer

# Injected delays are tens of milliseconds; this much is what a busy machine adds around them.
FLOOR_MS = 4.0


def measured(delays: Delays, **options: Any) -> tuple[dict[str, Any], FakeServer]:
    settings = {"scenarios": ("text",), "concurrency": (1,), "rates": (), "requests": 6, "warmup": 0, "max_tokens": 4}
    with FakeServer(delays) as server:
        return run(Options(server.url, **{**settings, **options})), server


def rows(point: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["hop"], row["part"]): row["ms"] for row in point["hops"]["rows"]}


@pytest.mark.parametrize(
    ("delays", "scenario", "hop"),
    [
        (Delays(preprocess=0.06), "text", ("preprocess", "compute")),
        (Delays(preprocess_queue=0.06), "text", ("preprocess", "queue")),
        (Delays(vision_encoder=0.06, preprocess=0.02), "image", ("vision_encoder", "compute")),
        (Delays(audio_encoder=0.06, preprocess=0.02), "audio", ("audio_encoder", "compute")),
        (Delays(llm_queue=0.06, prefill=0.02), "text", ("llm", "queue")),
        (Delays(prefill=0.06, token=0.005), "text", ("llm", "prefill")),
        (Delays(token=0.02, prefill=0.02), "text", ("llm", "decode")),
        (Delays(postprocess=0.06, token=0.005), "text", ("postprocess", "compute")),
        # longer, since this row also holds what gRPC takes, in two threads of one busy process
        (Delays(network=0.2), "text", ("client and network", "")),
    ],
)
def test_a_delay_is_found_in_its_hop(delays: Delays, scenario: str, hop: tuple[str, str]) -> None:
    report, server = measured(delays, scenarios=(scenario,))
    (point,) = report["points"]
    slept = fmean(server.slept["network" if hop[0].startswith("client") else " ".join(hop)])
    assert slept >= 55
    # within 10 %, as the benchmark promises
    assert rows(point)[hop] == pytest.approx(slept, rel=0.1, abs=FLOOR_MS)
    assert max(rows(point), key=rows(point).__getitem__) == hop
    assert point["hops"]["closes"] and not point["hops"]["note"]
    assert point["hops"]["sum_ms"] == pytest.approx(point["hops"]["total_ms"], rel=0.05)


def test_latencies_are_those_of_the_server() -> None:
    # long ones: the first token also waits for gRPC, in two threads of one busy process
    report, server = measured(Delays(prefill=0.2, token=0.03), max_tokens=6)
    metrics = report["points"][0]["metrics"]
    assert metrics["ttft"]["p50"]["value"] == pytest.approx(fmean(server.slept["llm prefill"]), rel=0.1, abs=FLOOR_MS)
    assert metrics["itl"]["p50"]["value"] == pytest.approx(fmean(server.slept["llm decode"]) / 5, rel=0.1, abs=FLOOR_MS)
    low, value, high = (metrics["e2e"]["p50"][key] for key in ("low", "value", "high"))
    assert low <= value <= high
    assert metrics["itl"]["requests"] == 6


def test_a_stall_is_an_underrun() -> None:
    slo = Slo(first_token=1, per_token=0.03)
    smooth, _ = measured(Delays(token=0.005), max_tokens=8, slo=slo)
    stalled, _ = measured(Delays(token=0.005, stall=0.3), max_tokens=8, slo=slo)
    assert smooth["points"][0]["metrics"]["underruns"]["max"] == 0
    assert stalled["points"][0]["metrics"]["underruns"]["min"] >= 1
    assert stalled["points"][0]["metrics"]["gap"]["max"] >= 300
    # the mean time per token is over the objective as well: 0.3 s in 7 tokens
    assert stalled["points"][0]["totals"]["goodput_share"] == 0


def test_errors_are_counted_and_never_averaged() -> None:
    # A failed request ends before its tokens: averaged in, it would halve the latency.
    report, _ = measured(Delays(token=0.04, fail_every=3), requests=9, max_tokens=4)
    (point,) = report["points"]
    assert point["totals"]["succeeded"] == 6
    assert point["totals"]["errors"] == {"EngineError: the llm failed: report it": 3}
    assert point["metrics"]["e2e"]["requests"] == 6
    assert point["metrics"]["e2e"]["min"] >= 115
    assert point["totals"]["goodput_share"] <= 6 / 9
    assert sum(bool(sample["error"]) for sample in point["samples"]) == 3
    assert "3 requests failed" in point["hops"]["note"]


def test_only_errors_is_a_failure() -> None:
    with pytest.raises(ServeError, match=r"no request succeeded: EngineError: the llm failed"):
        measured(Delays(fail_every=1), requests=2)


def test_a_server_that_goes_away_leaves_what_was_measured() -> None:
    """Three of the five requests of the second load fail with it; the rates and the next scenario find nobody."""
    lines: list[str] = []
    with FakeServer(Delays(die_after=7)) as server:
        options = Options(server.url, ("text", "image"), (1, 2), requests=5, warmup=0, max_tokens=2)
        report = run(options, lines.append)
    assert [point["totals"]["succeeded"] for point in report["points"]] == [5, 2]
    assert report["points"][0]["hops"]["closes"] and report["points"][1]["hops"] is None
    assert "no server answers" in report["stopped"] and report["skipped"] == {"image": report["stopped"]}
    assert "2 of 5 requests" in lines[-1] and "ServeError" in lines[-1]
    json.dumps(summary(report, (Path("a"), Path("b"))), allow_nan=False)


def test_a_server_that_goes_away_in_the_last_load_is_noticed() -> None:
    report, _ = measured(Delays(die_after=3), requests=5)
    (point,) = report["points"]
    assert point["totals"]["succeeded"] == 3 and sum(point["totals"]["errors"].values()) == 2
    assert "no server answers" in report["stopped"] and not report["skipped"]


@pytest.mark.parametrize(("rates", "loads"), [((), 2), ((5.0,), 3)])
def test_ctrl_c_leaves_what_was_measured(rates: tuple[float, ...], loads: int) -> None:
    """It comes with the fourth request of the last load, of the closed or the open loop: what had ended by then is
    kept, what is under way is cancelled and counts for nothing, and no more is asked."""
    before = 5 * (loads - 1)
    with FakeServer(Delays(interrupt_after=before + 3)) as server:
        options = Options(server.url, ("text", "image"), (1, 2), rates=rates, requests=5, warmup=0, max_tokens=2)
        report = run(options)
        assert server.cancelled
    *complete, last = report["points"]
    assert [point["totals"]["succeeded"] for point in complete] == [5] * (loads - 1)
    assert 1 <= last["totals"]["requests"] == last["totals"]["succeeded"] <= 3 and not last["totals"]["errors"]
    assert last["hops"] is None and last["traces"] is None
    assert report["stopped"] == INTERRUPTED and report["skipped"] == {"image": INTERRUPTED}


def test_ctrl_c_before_any_result() -> None:
    with pytest.raises(KeyboardInterrupt), FakeServer(Delays(interrupt_after=1)) as server:
        run(Options(server.url, ("text",), (1,), rates=(), requests=3, warmup=2, max_tokens=2))


def test_no_server() -> None:
    with pytest.raises(ServeError, match="no server answers"):
        run(Options("127.0.0.1:9"))


def test_concurrency_is_kept() -> None:
    report, server = measured(Delays(prefill=0.05), concurrency=(3,), requests=9)
    assert server.most == 3
    assert report["points"][0]["totals"]["requests"] == 9


def test_time_is_limited() -> None:
    """Ten requests of 60 ms do not fit into 0.15 s; what began is finished and counted."""
    report, _ = measured(Delays(prefill=0.06), requests=10, seconds=0.15)
    (point,) = report["points"]
    assert 1 <= point["totals"]["requests"] <= 4
    assert point["totals"]["succeeded"] == point["totals"]["requests"] == len(point["samples"])


def test_rates_follow_the_throughput() -> None:
    report, _ = measured(Delays(prefill=0.02), rates=None, concurrency=(1, 2))
    loads = [point["load"] for point in report["points"]]
    assert [load["kind"] for load in loads] == ["concurrency", "concurrency", "rate", "rate"]
    best = max(point["totals"]["requests_per_s"] for point in report["points"][:2])
    assert [load["value"] for load in loads[2:]] == pytest.approx([0.5 * best, 0.8 * best])


def test_what_cannot_be_measured_is_said() -> None:
    report, _ = measured(Delays(), scenarios=("text", "speech", "drawing"))
    assert [point["scenario"] for point in report["points"]] == ["text"]
    assert report["skipped"]["speech"] == "the server has no output 'audio'"
    assert report["skipped"]["drawing"] == "the server has no output 'image'"


def test_report_is_json_and_says_its_conditions() -> None:
    report, _ = measured(Delays())
    assert report["traces"] == "the server was started without a file for traces"
    assert report["points"][0]["traces"] is None
    report = json.loads(json.dumps(report))
    assert report["server"]["version"] == "2.51.0"
    assert len(report["server"]["models"]["llm"]["config_sha256"]) == 64
    assert report["environment"]["packages"]["numpy"]
    assert report["ceiling"]["read_bytes_per_s"] > 1e8
    assert report["options"]["seed"] == 0
    assert len(report["points"][0]["samples"]) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requests": 0}, "--requests is 0"),
        ({"warmup": -1}, "--warmup is -1"),
        ({"traces": -1}, "--traces is -1"),
        ({"seconds": -0.5}, "--seconds is -0.5"),
        ({"steps": -1}, "--steps is -1"),
        ({"concurrency": (), "rates": ()}, "no load"),
        ({"concurrency": (0,)}, "--concurrency has 0"),
        ({"concurrency": (10**6,)}, "give 1 to 256"),
        ({"rates": (0.0,)}, "--rate has 0"),
        ({"rates": (1.0, math.nan)}, "--rate has nan"),
        ({"rates": (math.inf,)}, "--rate has inf"),
        ({"seconds": math.nan}, "--seconds is nan"),
        ({"seed": -1}, "--seed is -1"),
        ({"slo": Slo(per_token=math.nan)}, "objective per_token_s is nan"),
        ({"slo": Slo(first_token=-1)}, "objective first_token_s is -1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Options("localhost:1", **options)


def test_unknown_scenario() -> None:
    with pytest.raises(InputError, match="no scenario 'smell'"):
        measured(Delays(), scenarios=("smell",))
