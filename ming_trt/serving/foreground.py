"""Runs a server until it is told to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

from ming_trt.errors import ServeError
from ming_trt.serving.launch import Server
from ming_trt.serving.openai_front import OpenAIFront
from ming_trt.serving.preflight import check_ports
from ming_trt.serving.server_log import last_lines

_LOOK_EVERY_S = 0.5


def serve(server: Server, ready: Callable[[Server], None], openai_port: int = 0) -> None:
    """Starts `server`, calls `ready`, and returns after SIGTERM or SIGINT, with the server stopped.

    Call it from the main thread. Raises `ServeError` if the server cannot start or ends by itself.
    """
    if openai_port:
        ports = server.ports
        check_ports(server.host, {"openai": openai_port})
        if openai_port in (ports.http, ports.grpc, ports.metrics):
            raise ServeError(f"--openai-port is {openai_port}, which another service has: give it its own")
    stop = threading.Event()
    previous = {number: signal.signal(number, _setter(stop)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.stop_requested = stop.is_set
        with server, ExitStack() as running:
            if stop.is_set():
                return
            if openai_port:
                running.enter_context(OpenAIFront(server.host, openai_port, server.grpc_url))
            ready(server)
            while not stop.wait(_LOOK_EVERY_S):
                code = server.poll()
                if code is not None:
                    raise ServeError(
                        f"the server ended by itself with exit code {code} "
                        f"({last_lines(server.log_file)}): look into its log {server.log_file}"
                    )
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _setter(event: threading.Event) -> Callable[[int, FrameType | None], None]:
    def handler(number: int, frame: FrameType | None) -> None:
        event.set()

    return handler
