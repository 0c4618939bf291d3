"""The suite of benchmarks: survives what fails, goes on after it was killed, and its results reach page and README."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"

ROW = {"what": "<decode>", "ours_ms": 1.0, "peer": "torch", "peer_ms": 3.0, "ratio": 3.0, "low": 2.9, "high": 3.1,
       "target": 2.5, "goal": 3.5, "verdict": "reached", "note": "", "more": {"MBU": 0.8}}  # fmt: skip
GROWTH = {
    **ROW, "what": "prompt", "peer": "", "ratio": 0.0, "target": 0.0, "verdict": "",
    "more": {
        "k": 1.1, "k_of_model": 1.0, "grows": "as the model", "why": "because",
        "ms": {"1": 2.0, "2": 4.0}, "model_ms": {"1": 1.0, "2": 2.0},
    },
}  # fmt: skip
TTFT = {**ROW, "what": "first token", "target": 0.0, "verdict": "", "more": {"asked": "at most 5 ms more: reached"}}
QUIET = {"load_average": [2.9, 2.0, 1.0]}
RESULT = {
    "benchmark": "llm_decode",
    "environment": QUIET,
    "ceiling": None,
    "note": "n",
    "threads": 2,
    "rows": [ROW, GROWTH, TTFT],
}
PACKAGES = {"torch": "2", "onnxruntime": "1"}
MERGED = {
    "host": "h",
    "created": "2026-01-02T03:04:05+00:00",
    "minutes": 12.5,
    "seconds": {"llm_decode": 9.0},
    "environment": {"processor": "P(R)", "cores": 2, "memory_bytes": 2**34, "packages": PACKAGES},
    "made_engines": {"llm_decode": ["llm-int8-0"]},
    "results": [RESULT],
    "failures": {"vision": "exit code 1: it broke"},
}


def options(out: Path, minutes: float = 15.0) -> argparse.Namespace:
    return argparse.Namespace(out=out, minutes=minutes, threads=1, tiny=False, fresh=False, collect=False)


def write_scripts(folder: Path, slow: str = "pass") -> None:
    """Three benchmarks: one that works and counts its runs, one that does `slow`, one that fails."""
    good = f"import json, pathlib\nwith open({str(folder / 'runs')!r}, 'a') as f: f.write('x')\n"
    good += f"print('a table')\nprint(json.dumps({RESULT!r}))\n"
    for name, text in (("good", good), ("slow", slow + "\n" + good), ("bad", "raise SystemExit('it broke')")):
        (folder / f"{name}.py").write_text(text)


def arrange(suite: Any, folder: Path, patch: pytest.MonkeyPatch, limit: float = 60.0) -> None:
    patch.setattr(suite, "HERE", folder)
    patch.setattr(suite, "BENCHMARKS", {name: suite.Share(1.0, limit) for name in ("good", "slow", "bad")})
    patch.setattr(suite, "show", lambda result: None)


def test_failures_are_named_and_the_others_still_run(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = scripts("suite")
    write_scripts(tmp_path, "import time; time.sleep(60)")
    arrange(suite, tmp_path, monkeypatch, limit=1.5)
    merged = suite.run_all(["slow", "bad", "good"], options(tmp_path))
    assert merged["failures"] == {"slow": "it was stopped after 2 s", "bad": "exit code 1: it broke"}
    assert [result["benchmark"] for result in merged["results"]] == ["llm_decode"]
    assert merged["minutes"] < 0.5 and merged["seconds"]["slow"] >= 1.5
    none_left = suite.run_all(["good"], options(tmp_path, minutes=0.0))
    assert none_left["failures"] == {"good": "no time was left for it"}
    (tmp_path / suite.host_id()).mkdir()
    (tmp_path / suite.host_id() / "good.json").write_text(
        json.dumps({**RESULT, "created": "2026-01-01T00:00:00+00:00"})
    )
    old = suite.run_all(["good"], options(tmp_path, minutes=0.0))
    assert not old["failures"] and "figures of 2026-01-01T00:00, since no time" in old["results"][0]["note"]
    collecting = options(tmp_path)
    collecting.collect = True
    together = suite.run_all(["good", "bad"], collecting)
    assert "measured alone" in together["results"][0]["note"]
    assert together["failures"] == {"bad": "it has not been measured"}
    assert "put together from single runs" in scripts("suite_page").page({**MERGED, **together})


def test_a_killed_suite_goes_on_where_it_was(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = scripts("suite")
    write_scripts(
        tmp_path, f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )
    driver = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\nimport argparse, pathlib, suite\n"
        f"suite.HERE = pathlib.Path({str(tmp_path)!r})\nsuite.show = lambda result: None\n"
        "suite.BENCHMARKS = {name: suite.Share(1.0, 60.0) for name in ('good', 'slow', 'bad')}\n"
        f"suite.run_all(['good', 'slow'], argparse.Namespace(out=pathlib.Path({str(tmp_path)!r}), minutes=15.0, "
        "threads=1, tiny=False, fresh=False, collect=False))"
    )
    first = subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    child = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{child}/stat").is_file() and ") Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline, "the benchmark outlived its suite"
        time.sleep(0.02)
    arrange(suite, tmp_path, monkeypatch)
    write_scripts(tmp_path)
    merged = suite.run_all(["good", "slow"], options(tmp_path))
    assert len(merged["results"]) == 2 and not merged["failures"]
    assert (tmp_path / "runs").read_text() == "xx", "what was done ran again"
    suite.run_all(["good", "slow"], options(tmp_path))
    assert (tmp_path / "runs").read_text() == "xxxx", "a suite that ended is not taken up"
    assert not list(tmp_path.glob(".*.suite*"))


def test_journal_is_of_its_options(scripts: Any, tmp_path: Path) -> None:
    suite = scripts("suite")
    journal = suite.Journal(tmp_path / "j", [["a"], 15.0])
    journal.note("a", {"seconds": 2.0, "failure": "x"})
    assert suite.Journal(tmp_path / "j", [["a"], 15.0]).spent == 2
    assert suite.Journal(tmp_path / "j", [["b"], 15.0]).done == {}


def test_a_disk_that_is_too_small_is_told_at_once(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = scripts("suite")
    monkeypatch.setattr(suite, "CACHE", tmp_path)
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "model.onnx").write_bytes(b"x" * 1000)
    free = suite.shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(suite.shutil, "disk_usage", lambda path: argparse.Namespace(free=free))
    monkeypatch.setattr(suite, "_DISK_BYTES", free + 1000)
    suite._check_disk()
    monkeypatch.setattr(suite, "_DISK_BYTES", free + 10**9)
    with pytest.raises(SystemExit, match=r"GB left and .* need .* GB: free some"):
        suite._check_disk()


def test_page_of_results(scripts: Any) -> None:
    text = scripts("suite_page").page(MERGED)
    assert "&lt;decode&gt;" in text and "<decode>" not in text
    for words in (
        "reached",
        "it broke",
        "<svg",
        "12.5 minutes",
        "llm-int8-0",
        "k 1.10, the model",
        "because",
        "1: 2, 2: 4",
    ):
        assert words in text, words
    assert text.count("<figure>") == 2 and "goal 3.5×" in text


def test_a_busy_machine_is_told(scripts: Any) -> None:
    written, readme = scripts("suite_page"), scripts("readme")
    assert written.disturbed(MERGED) == "" and "not quiet" not in readme.section(MERGED, readme.RESULTS / "h.json")
    busy = {**MERGED, "results": [RESULT, {**RESULT, "environment": {"load_average": [5.2, 4.0, 4.0]}}]}
    told = "The machine was not quiet: load average 2.9 to 5.2 with 2 cores"
    assert told in written.page(busy) and told in readme.section(busy, readme.RESULTS / "h.json")


def test_readme_table_and_picture(scripts: Any) -> None:
    readme = scripts("readme")
    text = readme.section(MERGED, readme.RESULTS / "h.json")
    assert "Measured on P, 2 cores, 16 GiB (2026-01-02; torch 2, ONNX Runtime 1)" in text
    assert "| <decode> | 1 ms | 3 ms, torch | 3.00 (2.90 to 3.10) | 2.5, goal 3.5: reached |" in text
    assert "at most 5 ms more: reached" in text and "prompt" not in text
    assert "vision: exit code 1: it broke" in text
    page = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    assert readme.filled(page, "new") == f"before\n{readme.BEGIN}\n\nnew\n{readme.END}\nafter\n"
    assert readme.filled(readme.filled(page, "new"), "new") == readme.filled(page, "new")
    with pytest.raises(ValueError, match="has no"):
        readme.filled("nothing", "new")
    drawn = readme.picture(MERGED)
    assert drawn.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "&lt;decode&gt;" in drawn
    import xml.etree.ElementTree as ElementTree

    assert ElementTree.fromstring(drawn).tag.endswith("svg")


def test_readme_is_what_the_result_says(scripts: Any) -> None:
    """Of the result that README.md names, if one is there."""
    readme = scripts("readme")
    named = [
        line.split("`")[1] for line in readme.README.read_text().splitlines() if line.startswith("`benchmarks/results/")
    ]
    if not named:
        pytest.skip("README.md names no result yet")
    source = FOLDER.parent / named[0]
    merged = json.loads(source.read_text())
    shown = readme.README.read_text()
    assert readme.filled(shown, readme.section(merged, source)) == shown
    assert readme.PICTURE.read_text() == readme.picture(merged)


def test_serving_overhead_counts_what_is_added(scripts: Any) -> None:
    overhead = scripts("serving_overhead")
    value, low, high = overhead.added_ms([12.0, 13.0, 14.0] * 10, [10.0, 11.0, 12.0] * 10)
    assert value == 2 and low <= 2 <= high
    from ming_trt.bench.samples import Sample

    def pairs(token: float, first: float) -> list[tuple[Sample, Sample]]:
        served = Sample(0, 0, 1, 1, [(first, 1), (first + token, 1)])
        return [(served, Sample(0, 0, 1, 1, [(0.1, 1), (0.12, 1)])) for _ in range(10)]

    itl, ttft = overhead.compared("x", pairs(0.0205, 9.0), pairs(9.0, 0.104), asked=True)
    assert itl.verdict == "reached" and ttft.more["asked"].endswith("more: reached")
    itl, ttft = overhead.compared("x", pairs(0.0215, 9.0), pairs(9.0, 0.106), asked=True)
    assert itl.verdict == "not reached" and ttft.more["asked"].endswith("not reached")
    assert not overhead.compared("x", pairs(0.03, 0.1), pairs(0.03, 0.1), asked=False)[0].target


def test_growth_counts_processor_time(scripts: Any) -> None:
    """Sleeping costs nothing, and ten times the work about ten times as much (a busy machine: 5 to 20)."""
    growth = scripts("growth")

    def burn(n: int) -> Any:
        return lambda: sum(i * i for i in range(n))

    idle, one, ten = growth.processor_seconds([lambda: time.sleep(0.02), burn(20_000), burn(200_000)], 0.1)
    assert idle < 0.01 and 5 < ten / one < 20
