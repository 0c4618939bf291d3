"""A headless Chromium, driven by the DevTools protocol through a pair of pipes: no driver and no further package."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_TIMEOUT_S = 30.0
# The browser reads commands from this descriptor and writes to the next one; a message ends with a zero byte.
_READS, _WRITES = 3, 4


def find_browser() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a headless browser without a network. Use as a context manager.

    `requests`: addresses that pages asked for; `complaints`: errors and warnings on the console, and exceptions.
    """

    def __init__(self, program: str, profile: Path, width: int = 1280, height: int = 1600) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._program, self._profile, self._size = program, profile, (width, height)
        self._answers: dict[int, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._count = 0
        self._session = ""

    def __enter__(self) -> Browser:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()

        def numbers() -> None:
            # through high numbers: one of the four may already be 3 or 4
            low, high = os.dup(theirs_in), os.dup(theirs_out)
            spare = [os.dup2(low, 100, inheritable=True), os.dup2(high, 101, inheritable=True)]
            os.dup2(spare[0], _READS, inheritable=True)
            os.dup2(spare[1], _WRITES, inheritable=True)

        command = [
            self._program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={self._profile}",
            f"--window-size={self._size[0]},{self._size[1]}", "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        silent = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdin=silent, stdout=silent, stderr=silent, close_fds=False, preexec_fn=numbers
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb")
        threading.Thread(target=self._listen, name="browser", daemon=True).start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        conditions = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.call("Network.emulateNetworkConditions", **conditions)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()  # the browser ends when its pipe does
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command. Raises RuntimeError if the browser refuses it or does not answer."""
        self._count += 1
        number = self._count
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        with self._news:
            if not self._news.wait_for(lambda: number in self._answers, _TIMEOUT_S):
                raise RuntimeError(f"{method}: no answer from the browser after {_TIMEOUT_S} s")
            answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return dict(answer["result"])

    def open(self, file: Path) -> None:
        """Shows a file and waits until it is loaded."""
        before = len(self._events)
        self.call("Page.navigate", url=file.resolve().as_uri())
        with self._news:
            loaded = self._news.wait_for(
                lambda: any(event["method"] == "Page.loadEventFired" for event in self._events[before:]), _TIMEOUT_S
            )
        if not loaded:
            raise RuntimeError(f"'{file}' was not loaded after {_TIMEOUT_S} s")

    def value(self, script: str) -> Any:
        """The JSON value of a script's last expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def click(self, selector: str) -> None:
        """The mouse on the middle of the element."""
        box = self.box(selector)
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type="mousePressed", **at)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **at)

    def type(self, text: str) -> None:
        """As if it was typed."""
        self.call("Input.insertText", text=text)

    def box(self, selector: str) -> dict[str, float]:
        """Where the element is on the screen, after it was scrolled there."""
        script = (
            f"(()=>{{const e=document.querySelector({json.dumps(selector)});e.scrollIntoView({{block:'center'}});"
            "const b=e.getBoundingClientRect();return {x:b.x,y:b.y,width:b.width,height:b.height}})()"
        )
        return dict(self.value(script))

    def picture(self) -> Any:
        """What the page shows from top to bottom, u8 [2 · height, 2 · width, 3]: two dots to a pixel of the style."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=self._whole())
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"))

    def _whole(self) -> dict[str, float]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 2}

    def _listen(self) -> None:
        rest = b""
        while part := os.read(self._in.fileno(), 1 << 16):
            *messages, rest = (rest + part).split(b"\0")
            with self._news:
                for message in messages:
                    self._take(json.loads(message))
                self._news.notify_all()

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        self._events.append(message)
        params = message.get("params", {})
        match message["method"]:
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(params["entry"]["text"])
