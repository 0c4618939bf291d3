"""The scripts of `benchmarks/`: their harness, and that the candidates compute the same thing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


def test_candidates_take_turns(scripts: Any) -> None:
    order: list[str] = []
    work = {name: lambda name=name: order.append(name) for name in ("a", "b", "c")}
    times = scripts("harness").interleave(work, seconds=0, repeats=2, warmup=1)
    assert {name: len(m.seconds) for name, m in times.items()} == {"a": 6, "b": 6, "c": 6}
    # after the warm-up three rounds, each begun by another candidate, three calls each
    assert order == list("abc") + list("aaabbbccc") + list("bbbcccaaa") + list("cccaaabbb")


def test_ratio_against_the_best_peer(scripts: Any) -> None:
    harness = scripts("harness")
    work = {"ours": lambda: time.sleep(0.004), "good": lambda: time.sleep(0.012), "bad": lambda: time.sleep(0.02)}
    times = harness.interleave(work, seconds=0, repeats=2, warmup=0)
    row = harness.against(times["ours"], [times["bad"], times["good"]], "sleep", target=1.5)
    assert row.peer == "good"
    assert row.ratio == pytest.approx(row.peer_ms / row.ours_ms)
    # sleeps of 12 and 4 ms; a busy machine adds milliseconds to both
    assert 1.3 < row.ratio < 3.3
    assert row.verdict == ("reached" if row.ratio >= 1.5 else "not reached")


def test_host_id_names_no_host(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = scripts("harness")
    monkeypatch.setattr("platform.node", lambda: "secret-name")
    assert "secret" not in harness.host_id()
    assert harness.host_id() == harness.host_id().lower()


def test_random_weights_follow_their_names(scripts: Any) -> None:
    checkpoint = scripts("random_model").RandomCheckpoint()

    def read(name: str, *shape: int) -> torch.Tensor:
        checkpoint.require(name, shape)
        return checkpoint.read(name)

    one = read("a.weight", 64, 256)
    assert torch.equal(one, read("a.weight", 64, 256))
    assert not torch.equal(one, read("b.weight", 64, 256))
    assert one.float().std() == pytest.approx(1 / 16, rel=0.05)
    assert read("norm.weight", 100).float().mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("way", ["looped_experts", "gathered_experts", "grouped_experts"])
def test_peers_compute_the_mixture(scripts: Any, way: str) -> None:
    """Every form of the experts that torch is timed with gives the definition's result (bfloat16: 2 digits)."""
    from ming_trt.models import ops

    torch.manual_seed(0)
    dtype = torch.bfloat16 if way == "grouped_experts" else torch.float32
    x, logits = torch.randn(5, 32).to(dtype), torch.randn(5, 8)
    gate_up, down = torch.randn(8, 32, 32).div(5).to(dtype), torch.randn(8, 32, 16).div(5).to(dtype)
    expected = ops.sparse_moe(x, logits, gate_up, down, 3, True).float()
    got = getattr(scripts("llm_step"), way)(x, logits, gate_up, down, 3, True).float()
    assert torch.allclose(
        got, expected, **({"atol": 2e-2, "rtol": 2e-2} if dtype is torch.bfloat16 else {"atol": 1e-5})
    )


def test_torch_operators_are_put_back(scripts: Any) -> None:
    from ming_trt.models import ops

    before = ops.sparse_moe
    with scripts("llm_step").torch_operators(scripts("llm_step").looped_experts):
        assert ops.sparse_moe is not before
    assert ops.sparse_moe is before


def test_exponent_of_a_power(scripts: Any) -> None:
    sizes = [1, 2, 4, 8, 16]
    assert scripts("growth").exponent(sizes, [3.0 * n**1.7 for n in sizes]) == pytest.approx(1.7)


def test_chunks_cost_what_one_step_costs_but_reread(scripts: Any) -> None:
    """Chunks multiply as much as one step, less the places that are still empty, and read the weights again."""
    model = scripts("random_model").config(tiny=True)
    from ming_trt.models import cost

    one, many = cost.llm_step(model.llm, 1024), scripts("growth").chunks(model, 1024)
    assert many.flops < one.flops + 2 * model.llm.hidden_size * model.llm.vocab_size + 1
    assert many.weights["attention"] == 2 * one.weights["attention"]


@pytest.mark.slow
def test_our_engine_and_torch_agree(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny widths: the int8 engine's logits against torch's on the same random weights."""
    from builders.llm import LLM

    random_model, llm_step = scripts("random_model"), scripts("llm_step")
    monkeypatch.setattr(random_model, "CACHE", tmp_path)
    model = random_model.config(tiny=True)
    file = random_model.engine_file(LLM(), model, "int8")
    assert random_model.engine_file(LLM(), model, "int8") == file
    ours, module = llm_step.OurStep(file, 1), llm_step.load_torch(model.llm, torch.float32)
    # 8-bit weights on random matrices: a few percent; other weights would give an error of 1.4
    assert llm_step.difference(ours, module, torch.float32) < 0.1
    arrays = llm_step.step_inputs(model.llm, 1, 16, 1, 32)
    peers = llm_step.torch_peers(module, arrays, torch.float32, False, 1)
    for step in (ours.step(arrays), *peers.values()):
        result = step()
        logits = result["logits"] if isinstance(result, dict) else result
        assert np.isfinite(np.asarray(logits)).all() and np.asarray(logits).shape == (1, 1, model.llm.vocab_size)
