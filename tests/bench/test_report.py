"""The report as a page: whole, self-contained, sortable; and two reports beside each other."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from ming_trt import cli
from ming_trt.bench import svg
from ming_trt.bench.compare import compare, read_report
from ming_trt.bench.html import table
from ming_trt.bench.machine import Ceiling
from ming_trt.bench.page import page
from ming_trt.bench.run import Options, run
from ming_trt.bench.write import comparison_table, latency_table, throughput_table, write
from ming_trt.errors import InputError

from .fake_server import Delays, FakeServer

VOID = {"meta", "br", "img", "input", "link", "hr"}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch, FakeServer(Delays(prefill=0.01, token=0.005, fail_every=5)) as server:
        patch.setattr("ming_trt.bench.run.measure_ceiling", lambda: None)
        options = Options(
            server.url, ("text", "image", "speech"), concurrency=(1, 2), requests=8, warmup=1, max_tokens=4
        )
        return json.loads(json.dumps(run(options)))


class Page(HTMLParser):
    """Checks that every element is closed, and collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_needs_nothing_else(report: dict[str, Any]) -> None:
    text = page(report)
    parsed = Page(text)
    for tag, attributes in parsed.tags:
        assert not {"src", "href", "srcset", "data", "action", "xlink:href"} & attributes.keys(), (tag, attributes)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://", text)
    # a browser would refuse anything that slipped through
    assert "default-src 'none'" in text


def test_page_shows_everything(report: dict[str, Any]) -> None:
    parsed = Page(page(report))
    tags = [tag for tag, _ in parsed.tags]
    shown = " ".join(parsed.text)
    assert tags.count("svg") == 2 * 3 + 2
    assert tags.count("polyline") == 2 * 2 * 4 + 2 * 2
    for point in report["points"]:
        assert f"{point['metrics']['ttft']['p50']['value']:.3g}" in shown
    for words in ("time to first token", "postprocess", "adds up", "the server has no output", "fake", "processor"):
        assert words in shown or any(words in str(a.values()) for _, a in parsed.tags), words
    errors = [a["title"] for tag, a in parsed.tags if tag == "span" and a.get("class") == "bad" and "title" in a]
    assert errors and all("the llm failed" in str(error) for error in errors)
    assert "EngineError: the llm failed: report it" in parsed.text, "also where nobody points"
    assert "The measurement ended early" not in shown


def test_page_of_a_run_that_ended_early(report: dict[str, Any]) -> None:
    assert "The measurement ended early: no server answers." in page({**report, "stopped": "no server answers"})


def test_numbers_at_the_edge_of_a_plot_are_whole() -> None:
    """The last tick of an axis stands at the edge: a long number ends there and a short one is centred."""
    for largest, anchor in ((1500.0, 'x="560.0" y="272.0" text-anchor="end">1500<'), (5.0, 'text-anchor="middle">5<')):
        assert anchor in svg.line_plot("title", "x", "y", {"a": [(largest, 1.0)]})


def test_a_picture_is_told_by_its_parts(report: dict[str, Any]) -> None:
    """The bars of a drawing have the colours of its parts, and the page's style knows each of them."""
    drawn = copy.deepcopy(report)
    parts = ("condition", "encode", "denoise", "decode", "by difference")
    for point in drawn["points"]:
        point["hops"]["rows"] += [{"hop": "image", "part": part, "ms": point["hops"]["total_ms"]} for part in parts]
    text = page(drawn)
    used = set(re.findall(r'<i class="key (s\d+)"></i>image ', text))
    assert len(used) == len(parts) and all(f".bar.{colour}{{" in text and f".key.{colour}{{" in text for colour in used)


def test_ceilings_stand_beside_what_is_known(report: dict[str, Any]) -> None:
    """Every part that the machine's rates bound has a row; one whose time is not known says so."""
    known = copy.deepcopy(report)
    known["ceiling"] = Ceiling(2, 1e10, 1e11).as_dict()
    bound = {"precision": "w8a8", "flops": 1e9, "least_ms": 10.0}
    parts = {"image denoise": {**bound, "mfu": 0.25}, "talker, an id": {**bound, "bytes": 5e6}}
    known["points"][0]["ceiling"] = {"precision": "int8", **parts}
    text = " ".join(Page(page(known)).text)
    assert "image denoise w8a8" in text and "25.0 % of matrix rate (MFU)" in text
    assert "talker, an id w8a8" in text and "its own time is not known" in text
    for point in known["points"]:
        point["ceiling"] = None
    assert "is known with --bundle" in page(known)
    known["manifest"] = {"target": "tensorrt"}
    assert "The engines are for tensorrt, whose ceiling is not measured" in page(known)


def test_text_is_escaped(report: dict[str, Any]) -> None:
    poisoned = copy.deepcopy(report)
    poisoned["environment"]["host"] = "<script>alert(1)</script>"
    poisoned["points"][0]["totals"]["errors"] = {'"><img src=x>': 1}
    tags = [tag for tag, _ in Page(page(poisoned)).tags]
    assert tags.count("script") == 1 and "img" not in tags
    assert "<b>" not in table(["<b>"], [["<b>"]])


def test_script_sorts(report: dict[str, Any], tmp_path: Path) -> None:
    """The page's script on a table of a few lines of DOM, in Node; a browser runs the same file."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node on this machine: the script of the page was not run")
    script = re.search(r"<script>(.*)</script>", page(report), re.S)
    assert script
    harness = """
const cell = v => ({textContent: String(v), dataset: typeof v === "number" ? {v: String(v)} : {}});
const rows = [["b", 10], ["a", 9], ["c", 100]].map(r => ({cells: r.map(cell), name: r[0]}));
const head = () => ({attributes: {}, listeners: {},
  getAttribute(n) { return this.attributes[n] ?? null }, setAttribute(n, v) { this.attributes[n] = v },
  removeAttribute(n) { delete this.attributes[n] }, addEventListener(n, f) { this.listeners[n] = f }});
const heads = [head(), head()];
const body = {rows, append(...sorted) { this.rows = sorted }};
const table = {tBodies: [body], querySelectorAll: () => heads};
globalThis.document = {querySelectorAll: () => [table]};
const order = () => body.rows.map(r => r.name).join("");
%s
const seen = [];
heads[1].listeners.click(); seen.push(order());
heads[1].listeners.click(); seen.push(order());
heads[0].listeners.keydown({key: "Enter"}); seen.push(order());
console.log(JSON.stringify([seen, heads.map(h => h.getAttribute("aria-sort"))]));
"""
    file = tmp_path / "sort.js"
    file.write_text(harness % script.group(1))
    done = subprocess.run([node, str(file)], capture_output=True, text=True, check=True, timeout=60)
    # 9 < 10 < 100 as numbers; as text 10 < 100 < 9
    assert json.loads(done.stdout) == [["abc", "cba", "abc"], ["ascending", None]]


def test_in_a_browser(report: dict[str, Any], tmp_path: Path) -> None:
    """Plots have a size, tables sort on a click, and nothing is on the console."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: the report was parsed, not rendered")
    _, html = write(report, tmp_path)
    probe = (
        "<script>window.onerror=m=>document.title='error '+m;addEventListener('load',()=>{"
        "const box=[...document.querySelectorAll('svg')].map(s=>s.getBoundingClientRect());"
        "const table=document.querySelector('table'),head=table.querySelectorAll('th')[5];head.click();"
        "const v=[...table.tBodies[0].rows].map(r=>+r.cells[5].dataset.v);"
        "document.title=JSON.stringify([box.every(b=>b.width>100&&b.height>50),box.length,"
        "v.every((x,i)=>!i||v[i-1]<=x)])})</script></body>"
    )
    html.write_text(html.read_text().replace("</body>", probe))
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [browser, *arguments, profile, html.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title and json.loads(title.group(1)) == [True, 8, True]
    assert "CONSOLE" not in done.stderr


def test_axis_ends_at_round_numbers() -> None:
    for largest in (0.0, 1e-6, 0.07, 1, 99, 12345):
        axis = svg.Axis.over("ms", [largest])
        assert axis.ticks[0] == 0 and axis.ticks[-1] == axis.top >= largest
        assert 3 <= len(axis.ticks) <= 7


def shifted(report: dict[str, Any], factor: float) -> dict[str, Any]:
    """The report of a server that is so much slower to the first token."""
    other = copy.deepcopy(report)
    for point in other["points"]:
        for sample in point["samples"]:
            moved = (factor - 1) * sample["arrivals"][0][0] if sample["arrivals"] else 0.0
            sample["arrivals"] = [[at + moved, n] for at, n in sample["arrivals"]]
            sample["seconds"] += moved
    return other


def spread(report: dict[str, Any], requests: int = 40) -> dict[str, Any]:
    """The report with so many requests, whose times vary by 5 %."""
    rng = np.random.default_rng(5)
    wide = copy.deepcopy(report)
    for point in wide["points"]:
        good = next(sample for sample in point["samples"] if not sample["error"])
        made = [copy.deepcopy(good) for _ in range(requests)]
        for sample in made:
            factor = 1 + 0.05 * float(rng.standard_normal())
            sample["arrivals"] = [[at * factor, n] for at, n in sample["arrivals"]]
            sample["seconds"] *= factor
        point["samples"] = made
    return wide


def test_compare_finds_what_changed(report: dict[str, Any]) -> None:
    a = spread(report)
    changes = compare(a, shifted(a, 1.5)).changes
    by_metric = {name: [c for c in changes if c.metric == name] for name in ("ttft", "itl", "e2e")}
    assert all(c.verdict == "slower" and c.low < 1.5 < c.high for c in by_metric["ttft"])
    assert all(c.verdict == "no difference" for c in by_metric["itl"])
    back = compare(shifted(a, 1.5), a).changes
    assert all(c.verdict == "faster" for c in back if c.metric == "ttft")


def test_compare_of_the_same_server_finds_nothing(report: dict[str, Any]) -> None:
    a = spread(report)
    same = compare(a, a)
    assert same.changes and all(c.verdict == "no difference" and c.ratio == 1 for c in same.changes)
    assert not same.unmatched and not same.differences


def test_compare_says_what_else_changed(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    other["environment"]["cores"] = 4096
    other["points"] = other["points"][1:]
    result = compare(report, other)
    assert any("4096" in line for line in result.differences)
    assert result.unmatched == ("text, 1 at once: only in A",)
    assert all(entry["a"] and entry["b"] for entry in result.errors) and result.errors
    with pytest.raises(InputError, match="in common"):
        compare(report, {**other, "points": []})


def test_tables_fit_a_narrow_terminal(report: dict[str, Any]) -> None:
    """Nothing is cut off at 80 columns: what does not fit is broken into lines."""
    comparison = compare(spread(report), shifted(spread(report), 1.5))
    for made, words in (
        (latency_table(report), ("scenario", "ttft", "e2e")),
        (throughput_table(report), ("scenario", "in time", "errors", "hops", "add up")),
        (comparison_table(comparison), ("scenario", "ttft, ms", "verdict", "slower")),
    ):
        text = io.StringIO()
        Console(file=text, width=80).print(made)
        assert "…" not in text.getvalue()
        for word in (*words, "1 at once", "text", "image"):
            assert word in text.getvalue(), (word, text.getvalue())


def test_few_requests_have_no_verdict(report: dict[str, Any]) -> None:
    few = copy.deepcopy(report)
    for point in few["points"]:
        point["samples"] = [sample for sample in point["samples"] if not sample["error"]][:3]
    assert {c.verdict for c in compare(few, shifted(few, 3)).changes} == {"too few requests"}


def test_requests_that_cannot_show_a_difference_are_too_few(report: dict[str, Any]) -> None:
    """Six on each side are enough for one comparison and not for dozens: no verdict, instead of "no difference"."""
    six = spread(report, 6)
    many = compare(six, shifted(six, 3)).changes
    assert len(many) > 10 and {c.verdict for c in many} == {"too few requests"}
    alone = copy.deepcopy(six)
    alone["points"] = alone["points"][:1]
    found = {c.metric: c.verdict for c in compare(alone, shifted(alone, 3)).changes}
    assert found["ttft"] == "slower" and found["itl"] == "no difference"


def test_reports_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_report(tmp_path)
    for content, message in (("{", "not JSON"), ("[]", "no report"), ('{"kind": "ming-trt bench"}', "schema None")):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(InputError, match=message):
            read_report(tmp_path)


@pytest.mark.parametrize(
    ("delays", "code", "why"),
    [
        (Delays(die_after=3), 1, "no server answers"),
        (Delays(interrupt_after=3), 130, "it was interrupted (Ctrl-C)"),
    ],
)
def test_command_that_ends_early(tmp_path: Path, delays: Delays, code: int, why: str) -> None:
    """The report is there, the last line says why it ends early, and so does the exit code."""
    cli._register() if not cli.app.registered_commands else None
    with FakeServer(delays) as server:
        arguments = ["bench", "--url", server.url, "-o", str(tmp_path), "--scenario", "text", "--warmup", "0"]
        done = CliRunner().invoke(cli.app, [*arguments, "--requests", "3", "--concurrency", "1,1", "--rate", "1"])
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.exit_code == code and why in last["stopped"] and last["points"][0]["errors"] == 0
    assert why in (tmp_path / "report.html").read_text()
    assert read_report(tmp_path)["points"]


def test_command(tmp_path: Path) -> None:
    cli._register() if not cli.app.registered_commands else None
    runner = CliRunner()
    with FakeServer(Delays()) as server:
        arguments = ["bench", "--url", server.url, "-o", str(tmp_path / "a"), "--scenario", "text"]
        arguments += ["--requests", "6", "--concurrency", "1", "--rate", "", "--max-tokens", "3"]
        done = runner.invoke(cli.app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["requests"] == 6 and last["errors"] == 0 and last["points"][0]["hops_add_up"]
    assert Path(last["html"]).read_text().startswith("<!doctype html>")
    done = runner.invoke(cli.app, ["bench", "--compare", str(tmp_path / "a"), str(tmp_path / "a")])
    assert done.exit_code == 0
    assert json.loads(done.stdout.strip().splitlines()[-1])["changes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "fast", "-o", "x"], "--rate is 'fast'"),
        (["--concurrency", "1.5", "-o", "x"], "--concurrency is '1.5': give whole numbers"),
        (["--concurrency", "nan", "-o", "x"], "--concurrency is 'nan': give whole numbers"),
        (["--compare", "a", "b", "-o", __file__], "give another folder by -o"),
        ([], "give -o FOLDER"),
    ],
)
def test_command_refuses(arguments: list[str], message: str) -> None:
    cli._register() if not cli.app.registered_commands else None
    done = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert done.exit_code == 1 and message in str(done.exception)
