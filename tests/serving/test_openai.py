"""The OpenAI-compatible front over the real server with toy stages."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from ming_trt.errors import InputError
from ming_trt.serving.launch import Server
from ming_trt.serving.openai_api import parse_chat
from ming_trt.serving.openai_front import OpenAIFront

from .conftest import free_ports

DATA = base64.b64encode(b"picture").decode()


@pytest.fixture(scope="module")
def port(toy_server: Server) -> Iterator[int]:
    port = free_ports().http
    with OpenAIFront("127.0.0.1", port, toy_server.grpc_url):
        yield port


def call(port: int, method: str, path: str, body: Any = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def chat(port: int, **body: Any) -> tuple[int, str]:
    return call(port, "POST", "/v1/chat/completions", body)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.triton
def test_whole_answer(port: int) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}"}},
        {"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}},
        {"type": "text", "text": "hé"},
    ]
    status, text = chat(port, model="any", messages=[{"role": "developer", "content": "brief"}, *user(parts)])
    answer = json.loads(text)
    assert (status, answer["object"], answer["model"]) == (200, "chat.completion", "any")
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "hé rows=3"}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13}


@pytest.mark.triton
def test_stream(port: int) -> None:
    status, text = chat(port, messages=user("ping"), stream=True, stream_options={"include_usage": True})
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert status == 200 and events[-1] == "[DONE]"
    pieces = [json.loads(event) for event in events[:-1]]
    deltas = [piece["choices"][0]["delta"] for piece in pieces if piece["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "ping rows=0"
    assert len(deltas) > 5
    assert [p["choices"][0]["finish_reason"] for p in pieces if p["choices"]][-1] == "stop"
    assert pieces[-1]["choices"] == [] and pieces[-1]["usage"]["completion_tokens"] == 11


@pytest.mark.triton
def test_errors(port: int) -> None:
    for body in ({"messages": user("too long")}, {"messages": user("too long"), "stream": True}):
        status, text = chat(port, **body)
        assert status == 400
        assert json.loads(text)["error"]["message"].startswith("the prompt has 9 tokens")
    status, text = chat(port, messages=user("fail midway"))
    assert status == 500 and "not finite" in json.loads(text)["error"]["message"]
    status, text = chat(port, messages=user("fail midway"), stream=True)
    assert status == 200 and "not finite" in text and "[DONE]" not in text
    assert call(port, "POST", "/v1/chat/completions", b"{")[0] == 400
    assert call(port, "POST", "/v1/other", {})[0] == 404
    assert call(port, "GET", "/nowhere")[0] == 404
    assert chat(port, messages=user("ping"))[0] == 200


@pytest.mark.triton
def test_client_that_goes_is_cancelled(port: int, toy_server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps({"messages": user("for ever"), "stream": True}).encode()
    connection.request("POST", "/v1/chat/completions", body)
    answer = connection.getresponse()
    answer.readline()
    answer.close()
    connection.close()
    from .test_server import eventually

    eventually(lambda: not list((toy_server.run_dir / "board.present").iterdir()), "the end of the request")


@pytest.mark.triton
def test_models_and_health(port: int) -> None:
    assert json.loads(call(port, "GET", "/v1/models")[1])["data"][0]["id"] == "ming"
    assert call(port, "GET", "/health") == (200, '{"ready": true}')


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": "hello"},
        {"messages": [1]},
        {"messages": user("x"), "tools": [{}]},
        {"messages": user("x"), "n": 2},
        {"messages": user([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}])},
        {"messages": user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}])},
        {"messages": user([{"type": "input_audio", "input_audio": 3}])},
        {"messages": user([{"type": "hologram"}])},
    ],
)
def test_what_cannot_be_done_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        parse_chat(json.dumps(body).encode())


@pytest.mark.parametrize(
    "body", [b"[" * 200_000, b"\xff", b'{"messages": [{"role": "user", "content": [{"type": ["x"]}]}]}']
)
def test_odd_bodies_are_input_errors(body: bytes) -> None:
    """Anything else would end the connection without an answer."""
    with pytest.raises(InputError):
        parse_chat(body)


def test_sampling_is_passed_on() -> None:
    body = {"messages": user("x"), "max_completion_tokens": 5, "stop": "a", "top_k": 3, "n": 1, "thinking": True}
    parsed = parse_chat(json.dumps(body).encode())
    assert parsed.ask["sampling"] == {"max_tokens": 5, "stop": ["a"], "top_k": 3}
    assert parsed.ask["thinking"] is True
