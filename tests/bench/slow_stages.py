"""Toy stages that sleep, for a real Triton server: what it counts is then known.

Each stage notes what it really slept (a busy machine oversleeps) in `<repository>/../slept/<stage>`, a number per line.
"""

from __future__ import annotations

from pathlib import Path

from ..serving.toy_bundle import write_stages

SLEPT = "slept"
_NAP = """

import time as _time


def nap(stage, label, seconds):
    started = _time.perf_counter()
    _time.sleep(seconds)
    slept = _time.perf_counter() - started
    folder = stage.repository.parent / "slept"
    folder.mkdir(exist_ok=True)
    with open(folder / label, "a") as file:
        file.write(f"{slept}\\n")
    return slept

"""
_PLAIN = """

class TritonPythonModel(TritonPythonModel):
    def answer(self, request):
        nap(self, {name!r}, {seconds})
        return super().answer(request)
"""
_LLM = """

class SlowEcho(Echo):
    def __init__(self, stage):
        super().__init__(stage.board)
        self.stage = stage

    def run(self, handle, request, text):
        queue = nap(self.stage, "queue", {queue})
        prefill = nap(self.stage, "prefill", {prefill})
        count, decode = request.sampling.max_tokens, 0.0
        for i in range(count):
            if i:
                decode += nap(self.stage, "token", {token})
            handle.put(TokenEvent((65,), i))
        usage = Usage(len(request.input_ids), count)
        handle.put(FinishEvent("length", usage, Timings(queue, prefill, queue + prefill, decode)))


class TritonPythonModel(TritonPythonModel):
    def load(self):
        super().load()
        self.llm = SlowEcho(self)
"""


def write_slow_stages(folder: Path, queue: float, prefill: float, token: float, **seconds: float) -> Path:
    """The toy stages with delays: of the language model, and by name of any other stage."""
    write_stages(folder)
    for name, nap in seconds.items():
        _append(folder / name / "1" / "model.py", _PLAIN.format(name=name, seconds=nap))
    _append(folder / "llm" / "1" / "model.py", _LLM.format(queue=queue, prefill=prefill, token=token))
    return folder


def read_slept(repository: Path, label: str) -> list[float]:
    """Seconds of every nap under that label."""
    return [float(line) for line in (repository.parent / SLEPT / label).read_text().split()]


def _append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + _NAP + text)
