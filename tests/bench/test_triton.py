"""Delays inside a real Triton server are found, and attributed to the right hop, from its own statistics."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from ming_trt.bench.run import Options, run
from ming_trt.serving.assemble import assemble
from ming_trt.serving.launch import Server

from ..serving.conftest import free_ports
from ..serving.toy_bundle import write_bundle
from .slow_stages import read_slept, write_slow_stages

REQUESTS, TOKENS, TRACED = 5, 4, 3
# Milliseconds that a busy machine may take around a nap, in a stage and between processes.
FLOOR_MS = 10.0
# Row of the accounting, label of the naps, and how many of them a request takes.
HOPS = [
    (("preprocess", "compute"), "preprocess", 1),
    (("vision_encoder", "compute"), "vision_encoder", 1),
    (("llm", "queue"), "queue", 1),
    (("llm", "prefill"), "prefill", 1),
    (("llm", "decode"), "token", TOKENS - 1),
    (("postprocess", "compute"), "postprocess", 1),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("slow")
    write_bundle(folder / "bundle")
    stages = write_slow_stages(
        folder / "source", queue=0.12, prefill=0.15, token=0.05, preprocess=0.1, vision_encoder=0.2, postprocess=0.03
    )
    assemble(folder / "bundle", folder / "repo", source=stages)
    with Server(folder / "repo", free_ports(), ready_timeout_s=120, progress=print) as server:
        # the first request to a process of a stage costs 100 ms more, and some stages have two
        options = Options(
            server.grpc_url,
            ("image",),
            concurrency=(1,),
            rates=(),
            requests=REQUESTS,
            warmup=4,
            max_tokens=TOKENS,
            traces=TRACED,
        )
        return run(options), folder / "repo"


@pytest.mark.triton
@pytest.mark.parametrize(("hop", "label", "naps"), HOPS)
def test_delays_are_attributed(
    measured: tuple[dict[str, Any], Path], hop: tuple[str, str], label: str, naps: int
) -> None:
    report, repository = measured
    (point,) = report["points"]
    found = {(row["hop"], row["part"]): row["ms"] for row in point["hops"]["rows"]}
    slept = 1000 * naps * fmean(read_slept(repository, label))
    assert found[hop] == pytest.approx(slept, rel=0.1, abs=FLOOR_MS)


@pytest.mark.triton
def test_rows_add_up(measured: tuple[dict[str, Any], Path]) -> None:
    hops = measured[0]["points"][0]["hops"]
    assert hops["closes"], hops
    assert hops["sum_ms"] == pytest.approx(hops["total_ms"], rel=0.05)
    # everything that was not slept is small: nothing hides in the remainder
    rest = sum(row["ms"] for row in hops["rows"] if row["hop"] in ("scheduling and python", "client and network"))
    assert rest < 0.25 * hops["total_ms"]


@pytest.mark.triton
def test_traces_attribute_the_same_delays(measured: tuple[dict[str, Any], Path]) -> None:
    """Triton's traces of further requests, without what its statistics count: the language model's phases too."""
    report, repository = measured
    (point,) = report["points"]
    traces = point["traces"]
    assert report["traces"] == "by the server" and traces["requests"] == TRACED
    found = {(row["hop"], row["part"]): row["ms"] for row in traces["rows"]}
    for hop, label, naps in HOPS:
        slept = 1000 * naps * fmean(read_slept(repository, label))
        assert found[hop] == pytest.approx(slept, rel=0.1, abs=FLOOR_MS), hop
    # every moment of the request stands in one row
    assert sum(found.values()) == pytest.approx(traces["total_ms"], rel=0.001)
    rest = sum(ms for (hop, _), ms in found.items() if hop in ("scheduling and python", "client and network"))
    assert rest < 0.1 * traces["total_ms"]
    # and the two accounts of the same load tell the same
    assert traces["total_ms"] == pytest.approx(point["hops"]["total_ms"], rel=0.1)
    assert len(traces["timeline"]["tokens"]) == TOKENS


@pytest.mark.triton
def test_server_is_described(measured: tuple[dict[str, Any], Path]) -> None:
    server = measured[0]["server"]
    assert server["version"].startswith("2.")
    assert server["models"]["llm"]["backend"] == "python"
    assert server["models"]["ming"]["backend"] == "ensemble"
