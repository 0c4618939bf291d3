"""The report in a real browser, from disk and without a network: plots are painted, tables sort, nothing complains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ming_trt.bench.run import Options, run
from ming_trt.bench.write import write

from .browser import Browser, find_browser
from .fake_server import Delays, FakeServer

# The columns of the latency table that the test sorts by.
_SCENARIO, _MEDIAN = 1, 5
_TABLE = "#latency table"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium` brings one")
    folder = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch, FakeServer(Delays(prefill=0.01, token=0.004, fail_every=7)) as server:
        patch.setattr("ming_trt.bench.run.measure_ceiling", lambda: None)
        options = Options(server.url, ("text", "image"), concurrency=(1, 2), rates=(), requests=6, max_tokens=4)
        write(run(options), folder)
    with Browser(program, folder / "profile") as browser:
        browser.open(folder / "report.html")
        yield browser


def test_nothing_is_loaded_and_nothing_complains(browser: Browser) -> None:
    assert [address for address in browser.requests if address != "about:blank"] == [
        address for address in browser.requests if address.startswith("file://") and address.endswith("/report.html")
    ]
    assert browser.value("document.readyState") == "complete"
    assert browser.complaints == []


def test_the_browser_would_tell() -> None:
    """What the test above hears of: an error on the console, an exception, a request."""
    heard = Browser("", Path())
    heard._take({"method": "Runtime.consoleAPICalled", "params": {"type": "error", "args": ["broken"]}})
    heard._take({"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": {"text": "thrown"}}})
    heard._take({"method": "Network.requestWillBeSent", "params": {"request": {"url": "https://example.org/x.js"}}})
    assert len(heard.complaints) == 2 and heard.requests == ["https://example.org/x.js"]


def test_plots_are_painted(browser: Browser) -> None:
    """Each plot fills a good part of its card, and its lines and bars have colours that reach the screen."""
    browser.value("document.documentElement.scrollTo(0, 0)")
    boxes: list[dict[str, Any]] = browser.value(
        "[...document.querySelectorAll('figure')].map(f=>{const s=f.querySelector('svg'),b=s.getBoundingClientRect();"
        "const marks=[...s.querySelectorAll('.line,.bar,.dot')];"
        "return {title:f.querySelector('figcaption').textContent,x:b.x,y:b.y+scrollY,w:b.width,h:b.height,"
        "colours:[...new Set(marks.map(m=>{const c=getComputedStyle(m);"
        "return m.classList.contains('line')?c.stroke:c.fill}))]}})"
    )
    screen = browser.picture().astype(int)
    assert len(boxes) == 2 * 3 + 1
    for box in boxes:
        assert box["w"] > 250 and box["h"] > 60, box
        top, left, height, width = (round(2 * box[side]) for side in "yxhw")
        shown = screen[top : top + height, left : left + width].reshape(-1, 3)
        assert box["colours"], box["title"]
        for colour in box["colours"]:
            wanted = np.array([int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(",")])
            # anti-aliased edges differ; the inside of a stroke of two pixels or of a bar does not
            assert (np.abs(shown - wanted).max(axis=1) <= 8).sum() >= 10, (box["title"], colour)


def column(browser: Browser, number: int) -> list[Any]:
    return list(
        browser.value(
            f"[...document.querySelectorAll({json.dumps(_TABLE + ' tbody tr')})].filter(r=>!r.hidden)"
            f".map(r=>{{const c=r.cells[{number - 1}];return c.dataset.v===undefined?c.textContent:+c.dataset.v}})"
        )
    )


@pytest.mark.parametrize("number", [_SCENARIO, _MEDIAN])
def test_tables_sort(browser: Browser, number: int) -> None:
    before = column(browser, number)
    head = f"{_TABLE} th:nth-child({number})"
    browser.click(head)
    assert column(browser, number) == sorted(before)
    assert browser.value(f"document.querySelector({json.dumps(head)}).getAttribute('aria-sort')") == "ascending"
    browser.click(head)
    assert column(browser, number) == sorted(before, reverse=True)
    assert len(set(before)) > 1


def test_tables_filter(browser: Browser) -> None:
    everything = column(browser, _SCENARIO)
    browser.click("#latency input[type=search]")
    browser.type("image first")
    assert set(column(browser, _SCENARIO)) == {"image"}
    assert 0 < len(column(browser, _SCENARIO)) < len(everything)


def test_narrow_screens_do_not_scroll_sideways(browser: Browser) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=420, height=900, deviceScaleFactor=1, mobile=True)
    assert browser.value("document.documentElement.scrollWidth") <= 420
    browser.call("Emulation.clearDeviceMetricsOverride")
