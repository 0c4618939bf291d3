"""`repo`, `serve` and `ask` as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ming_trt.serving.launch import Ports

from ..serving.conftest import free_ports

pytestmark = [pytest.mark.triton, pytest.mark.slow]
EXAMPLES = Path(__file__).parents[2] / "examples"
# One line on stderr that says what is wrong, and exit code 1.
TIMEOUT_S = 120


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ming_trt", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S
    )


def refuses(*arguments: str, because: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and because in last


def start(repository: Path, ports: Ports) -> subprocess.Popen[str]:
    ports_given = ["--http-port", str(ports.http), "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics)]
    return subprocess.Popen(
        [sys.executable, "-m", "ming_trt", "serve", str(repository), "--json", *ports_given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def repository(understanding_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "repo"
    done = run("repo", str(understanding_bundle), "-o", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"][-1] == "ming"
    return folder


@pytest.fixture(scope="module")
def address(repository: Path) -> Iterator[dict[str, object]]:
    """A server in the foreground of a process of its own; ended by SIGTERM, which must be clean."""
    process = start(repository, free_ports())
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    yield json.loads(line)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors


def test_ask_streams_text(address: dict[str, str]) -> None:
    done = run("ask", "Hello", "--max-tokens", "6", "--url", address["grpc"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_ask_as_json_with_media(address: dict[str, str]) -> None:
    media = ["--image", str(EXAMPLES / "scene.jpg"), "--audio", str(EXAMPLES / "speech.wav")]
    done = run("ask", "Well?", *media, "--max-tokens", "5", "--json", "--url", address["grpc"])
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    answer = events[-1]
    assert answer["event"] == "answer" and answer["usage"]["completion_tokens"] == 5
    assert answer["text"] == "".join(event["text"] for event in events[:-1])
    assert 0 < answer["first_token_s"] <= answer["seconds"]


@pytest.mark.parametrize(
    ("arguments", "because"),
    [
        ((), "is empty"),
        (("x", "--image", "/nonexistent.png"), "/nonexistent.png' cannot be read"),
        (("x", "--image", __file__), "image of"),
        (("x", "--audio", __file__), "audio"),
        (("x", "--speak", "out.wav"), "no 'speech' stage"),
        (("x", "--draw", "out.png"), "no 'image' stage"),
        (("x", "--read"), "--read needs --speak"),
        (("x", "--max-tokens", "0"), "max_tokens"),
    ],
)
def test_ask_refuses(address: dict[str, str], arguments: tuple[str, ...], because: str) -> None:
    refuses("ask", *arguments, "--url", address["grpc"], because=because)
    assert run("ask", "Hello", "--max-tokens", "2", "--url", address["grpc"]).returncode == 0


def test_port_in_use(address: dict[str, str], repository: Path) -> None:
    port = address["grpc"].rpartition(":")[2]
    refuses("serve", str(repository), "--grpc-port", port, because=f"port {port}")


def test_nobody_there() -> None:
    refuses("ask", "x", "--url", f"127.0.0.1:{free_ports().grpc}", because="ming-trt serve")


def test_serve_without_repository(tmp_path: Path) -> None:
    refuses("serve", str(tmp_path), because="no model repository")


def test_server_that_ends_by_itself_is_an_error(repository: Path) -> None:
    process = start(repository, free_ports())
    assert process.stdout is not None
    server = json.loads(process.stdout.readline())
    os.kill(server["pid"], signal.SIGKILL)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "the server ended by itself" in errors.strip().splitlines()[-1]
