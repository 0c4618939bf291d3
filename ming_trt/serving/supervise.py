"""Watches the processes of the python models and reloads a model whose process died.

Triton 2.51 never restarts a dead stub: each request to it fails, while model and server keep saying that they are
ready. A dead process is seen in /proc within a second; unloading and loading the model (found by test to work, also
with requests in flight; ensembles over it follow by themselves) cures it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ming_trt.serving.preflight import model_of_instance

PERIOD_S = 0.5
_STUB = "triton_python_backend_stub"


class Supervisor:
    """A thread that compares the live stubs of server `pid` with what the configurations ask for."""

    def __init__(self, pid: int, grpc_url: str, configs: Mapping[str, Any], progress: Callable[[str], None]) -> None:
        self._pid = pid
        self._url = grpc_url
        self._wanted = {
            name: sum(group.count for group in config.instance_group)
            for name, config in configs.items()
            if config.backend == "python"
        }
        self._progress = progress
        # Those that were found last: a look at them takes a tenth of a millisecond, to find them several.
        self._known: dict[str, int] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(PERIOD_S):
            for model in self._dead():
                # A second look, since a server that is going down ends its stubs too.
                if self._stopped.wait(PERIOD_S) or not alive(self._pid):
                    return
                if model in self._dead():
                    self._reload(model)

    def _dead(self) -> list[str]:
        if not self._known or not all(_is_child(process, self._pid) for process in self._known.values()):
            self._known = stubs(self._pid)
        live = Counter(model_of_instance(name) for name in self._known)
        missing = [model for model, count in self._wanted.items() if live[model] < count]
        if missing:
            self._known = {}
        return missing

    def _reload(self, model: str) -> None:
        from tritonclient import grpc
        from tritonclient.utils import InferenceServerException

        self._progress(f"a process of model '{model}' died; loading it again")
        started = time.monotonic()
        client = grpc.InferenceServerClient(self._url)
        try:
            client.unload_model(model)
            client.load_model(model)
            self._progress(f"model '{model}' is back after {time.monotonic() - started:.1f} s")
        except InferenceServerException as error:
            # Tried again at the next look.
            self._progress(f"model '{model}' could not be loaded again: {error.message()}")
        finally:
            client.close()


def stubs(server: int) -> dict[str, int]:
    """Live stub processes of that server: instance name (`llm_0_0`) -> process id."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, parent = _state(folder)
            if parent != server or state == "Z":
                continue
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended between the listing and the look
        if arguments and _STUB.encode() in arguments[0]:
            # …, folder of the back end, size of a control block, instance name, name of the runtime model directory, ""
            found[arguments[-3].decode()] = int(folder.name)
    return found


def _is_child(pid: int, parent: int) -> bool:
    """Whether a process runs and has that parent."""
    try:
        state, found = _state(Path("/proc") / str(pid))
    except OSError:
        return False
    return found == parent and state != "Z"


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return _state(Path("/proc") / str(pid))[0] != "Z"
    except OSError:
        return False


def _state(folder: Path) -> tuple[str, int]:
    """State letter and parent of a process; its name, in parentheses, may hold anything."""
    fields = (folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    return fields[0], int(fields[1])
