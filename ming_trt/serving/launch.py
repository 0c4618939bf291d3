"""Starts the real Triton server on a model repository, waits until it is ready, and stops it cleanly.

    with Server(Path("repo")) as server:
        print(server.grpc_url)

Everything that is known to make the server hang or lie is looked for first (`preflight.py`, `programs.py`). A
supervisor thread (`supervise.py`) reloads models whose process died.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ming_trt.errors import ServeError
from ming_trt.serving.assemble import RepositoryMark, check_gate, open_bundle, read_mark
from ming_trt.serving.graph import ENSEMBLE
from ming_trt.serving.intact import check_files
from ming_trt.serving.preflight import check_ports, check_repository, check_shared_memory
from ming_trt.serving.programs import ServerProgram, find_program
from ming_trt.serving.server_log import first_failure, loaded_models, requests_are_done
from ming_trt.serving.supervise import Supervisor

EXIT_TIMEOUT_S = 10
# How long the models may take to unload when no request is left.
UNLOAD_S = 5
# Folder in which the stages find each other's cancellation flags; read by the stages.
BOARD_VARIABLE = "MING_TRT_BOARD"
_PR_SET_PDEATHSIG = 1

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the server listens."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @classmethod
    def free(cls) -> Ports:
        """Three ports of this machine that nobody listens on now."""
        with ExitStack() as stack:
            probes = [stack.enter_context(socket.socket()) for _ in range(3)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            return cls(*(probe.getsockname()[1] for probe in probes))


class Server:
    """One `tritonserver` process. Use it as a context manager, or call `start` and `stop`.

    `host`: the address to listen on (this machine only, by default). `trace`: write Triton's trace of every request to
    `trace.json` in `run_dir`. `ready_timeout_s`: how long loading may take. `progress` gets one line per event.
    """

    def __init__(
        self,
        repository: Path,
        ports: Ports | None = None,
        host: str = "127.0.0.1",
        allow_ungated: bool = False,
        trace: bool = False,
        ready_timeout_s: float = 600.0,
        progress: Progress | None = None,
    ) -> None:
        self.repository = repository
        self.ports = ports or Ports()
        self.host = host
        self.run_dir = Path()
        self.ready_seconds = 0.0
        # Asked while waiting; when it says yes, `start` returns early with a server that is not ready.
        self.stop_requested: Callable[[], bool] = lambda: False
        self._allow_ungated = allow_ungated
        self._trace = trace
        self._ready_timeout_s = ready_timeout_s
        self._progress: Progress = progress or (lambda line: None)
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: Supervisor | None = None

    @property
    def http_url(self) -> str:
        return f"{self._reachable}:{self.ports.http}"

    @property
    def grpc_url(self) -> str:
        return f"{self._reachable}:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self._reachable}:{self.ports.metrics}/metrics"

    @property
    def log_file(self) -> Path:
        """The server's own log; it is kept after the server has stopped."""
        return self.run_dir / "server.log"

    @property
    def pid(self) -> int:
        """The process id of `tritonserver`."""
        return self._running().pid

    @property
    def _reachable(self) -> str:
        return "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host

    @property
    def _shm_prefix(self) -> str:
        return f"{self.run_dir.name}_"

    def start(self) -> Server:
        """Starts the server and waits until every model is loaded.

        Raises `ServeError` or `BundleError`; then nothing runs.
        """
        mark = read_mark(self.repository)
        bundle = open_bundle(self.repository, mark)
        check_gate(bundle, self._allow_ungated, running=True)
        configs = check_repository(self.repository)
        check_ports(self.host, {"http": self.ports.http, "grpc": self.ports.grpc, "metrics": self.ports.metrics})
        check_shared_memory(sum(sum(g.count for g in config.instance_group) for config in configs.values()))
        if not check_files(bundle, self._progress, self.stop_requested):
            return self
        self.run_dir = Path(tempfile.mkdtemp(prefix="ming-trt-"))
        program = find_program(self.run_dir, prefer_system=mark.target != "onnxruntime")
        self._progress(f"starting {program.title}; log: {self.log_file}")
        try:
            self._process = self._launch(program, mark)
            self._wait_ready(set(mark.models))
        except BaseException:
            self.stop()
            raise
        self._supervisor = Supervisor(self.pid, self.grpc_url, configs, self._progress)
        self._supervisor.start()
        return self

    def poll(self) -> int | None:
        """The server's exit code, or None while it runs."""
        return self._running().poll()

    def stop(self) -> None:
        """Ends the server: asks it, then insists; removes its shared memory. The log stays. May be called twice."""
        if self._supervisor is not None:
            self._supervisor.stop()
            self._supervisor = None
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            self._wait_for_end(process)
        # Its stubs belong to its process group, and some stay behind when it ends before all models are loaded.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for region in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)

    def _wait_for_end(self, process: subprocess.Popen[bytes]) -> None:
        """Waits for the end after SIGTERM, or until it is time to insist.

        After a dead stub, or a client that broke off its stream, unloading hangs in Triton 2.51 until the exit timeout.
        Once no request is in flight nothing is lost by not waiting for it, except a trace, which is written at the end.
        """
        deadline, idle_since = time.monotonic() + EXIT_TIMEOUT_S + 10, None
        while time.monotonic() < deadline and process.poll() is None:
            if idle_since is None and not self._trace and requests_are_done(self.log_file):
                idle_since = time.monotonic()
            if idle_since is not None and time.monotonic() - idle_since > UNLOAD_S:
                return
            time.sleep(0.05)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServeError("the server was not started")
        return self._process

    def _launch(self, program: ServerProgram, mark: RepositoryMark) -> subprocess.Popen[bytes]:
        board = self.run_dir / "board"
        board.mkdir()
        environment = {**os.environ, **program.environment, BOARD_VARIABLE: str(board)}
        with self.log_file.open("wb") as log:
            return subprocess.Popen(
                self._arguments(program, mark),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal reaches us, and we end the server in order.
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _arguments(self, program: ServerProgram, mark: RepositoryMark) -> list[str]:
        arguments = [
            str(program.binary),
            f"--model-repository={self.repository.resolve()}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in self._startup_models(mark)),
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
            "--log-format=ISO8601",
            f"--http-address={self.host}",
            f"--grpc-address={self.host}",
            f"--metrics-address={self.host}",
            f"--http-port={self.ports.http}",
            f"--grpc-port={self.ports.grpc}",
            f"--metrics-port={self.ports.metrics}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
        ]
        if program.backends is not None:
            arguments.append(f"--backend-directory={program.backends}")
        if program.bundled:
            # The wheel's server has no GPU back ends; without this it looks for NVML and complains.
            arguments.append("--allow-gpu-metrics=false")
        arguments += [
            # Known, though nothing is traced, the file lets a client switch tracing on for a while (`ming-trt bench`).
            "--trace-config=mode=triton",
            f"--trace-config=triton,file={self.run_dir / 'trace.json'}",
            "--trace-config=rate=1",
            f"--trace-config=level={'TIMESTAMPS' if self._trace else 'OFF'}",
        ]
        return arguments

    @staticmethod
    def _startup_models(mark: RepositoryMark) -> list[str]:
        """Every model by name: loading the ensemble would load its steps, but not those that stand alone."""
        return [name for name in mark.models if name != ENSEMBLE] + [ENSEMBLE]

    def _wait_ready(self, models: set[str]) -> None:
        started, seen = time.monotonic(), set[str]()
        while not _answers(f"http://{self.http_url}/v2/health/ready"):
            if self.stop_requested():
                return
            self.ready_seconds = time.monotonic() - started
            loaded = loaded_models(self.log_file)
            for name in sorted(loaded - seen):
                self._progress(f"loaded {name} ({self.ready_seconds:.1f} s)")
            seen = loaded
            code = self._running().poll()
            failure = first_failure(self.log_file)
            if code is not None or failure:
                reason = failure or f"it ended with exit code {code}"
                raise ServeError(f"the server did not start: {reason} (log: {self.log_file})")
            if self.ready_seconds > self._ready_timeout_s:
                waiting = ", ".join(sorted(models - loaded)) or "its endpoints"
                raise ServeError(
                    f"the server was not ready after {self._ready_timeout_s:g} s, waiting for {waiting}: "
                    f"look into its log {self.log_file}, or allow more time"
                )
            time.sleep(0.05)
        self.ready_seconds = time.monotonic() - started


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _die_with_parent() -> None:
    """Asks the kernel to end the server if this process is killed, so that ports and models are not held for ever."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
