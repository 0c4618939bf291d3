"""An OpenAI-compatible HTTP front over the gRPC stream: a thread per connection, in the process of `ming-trt serve`."""

from __future__ import annotations

import json
import logging
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from ming_trt.errors import CancelledError, InputError, MingError, UnavailableError
from ming_trt.serving.client import Client
from ming_trt.serving.openai_api import ChatRequest, chunks, completion, models, parse_chat

MAX_BODY_BYTES = 512 << 20
log = logging.getLogger(__name__)


class OpenAIFront:
    """Listens on `host`:`port` and asks the server at `grpc_url`. A context manager."""

    def __init__(self, host: str, port: int, grpc_url: str) -> None:
        self._server = _Server((host, port), _Handler)
        self._server.client = Client(grpc_url)
        self._thread = threading.Thread(target=self._server.serve_forever, name="openai", daemon=True)

    def __enter__(self) -> OpenAIFront:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.client.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A stream that still runs must not hold the end of the server.
    block_on_close = False
    client: Client


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._json(HTTPStatus.OK, models())
        elif self.path == "/health":
            ready = self._client.ready()
            self._json(HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, {"ready": ready})
        else:
            self._error(HTTPStatus.NOT_FOUND, "there is only /v1/models, /v1/chat/completions and /health")

    def do_POST(self) -> None:
        if self.path != "/v1/chat/completions":
            self.close_connection = True  # its body was not read
            return self._error(HTTPStatus.NOT_FOUND, "POST goes to /v1/chat/completions")
        try:
            request = parse_chat(self._body())
            with self._client.ask(**request.ask) as answer:
                if request.stream:
                    self._stream(request, answer)
                else:
                    answer.read_all()
                    self._json(HTTPStatus.OK, completion(request, answer.summary()))
        except MingError as error:
            self._error(_status(error), str(error))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client went; leaving the `with` has cancelled its request
        return None

    @property
    def _client(self) -> Client:
        return cast("_Server", self.server).client

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            raise InputError(
                f"Content-Length is '{length}': send a body of at most {MAX_BODY_BYTES} bytes, and its length"
            )
        return self.rfile.read(int(length))

    def _stream(self, request: ChatRequest, answer: Any) -> None:
        """Server-sent events. The first is awaited before the status goes out, so that most errors have a status."""
        begun = False
        try:
            pieces = chunks(request, answer)
            first = [next(pieces), next(pieces)]
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Connection", "close")
            self.end_headers()
            begun, self.close_connection = True, True
            for piece in first:
                self._event(json.dumps(piece, ensure_ascii=False))
            for piece in pieces:
                self._event(json.dumps(piece, ensure_ascii=False))
            self._event("[DONE]")
        except MingError as error:
            if not begun:
                raise
            self._event(json.dumps(_error_body(str(error), _status(error)), ensure_ascii=False))

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: HTTPStatus, body: dict[str, Any]) -> None:
        data = json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _error(self, status: HTTPStatus, message: str) -> None:
        self._json(status, _error_body(message, status))

    def log_message(self, format: str, *args: Any) -> None:
        log.info(format, *args)


def _error_body(message: str, status: HTTPStatus) -> dict[str, Any]:
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _status(error: MingError) -> HTTPStatus:
    kinds = {
        InputError: HTTPStatus.BAD_REQUEST,
        UnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
        CancelledError: HTTPStatus.SERVICE_UNAVAILABLE,
    }
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), HTTPStatus.INTERNAL_SERVER_ERROR)
