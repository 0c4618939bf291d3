"""The real server, over toy stages: streams, errors, cancellation, leases, dead processes, start and stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from tritonclient.grpc import service_pb2

from ming_trt import bundle
from ming_trt.errors import BundleError, CancelledError, EngineError, InputError, MingError, ServeError
from ming_trt.serving.answer import Answer
from ming_trt.serving.assemble import assemble
from ming_trt.serving.client import Client
from ming_trt.serving.launch import Ports, Server
from ming_trt.serving.local_memory import is_local, share
from ming_trt.serving.supervise import alive, stubs

from .toy_bundle import write_bundle, write_stages

pytestmark = pytest.mark.triton
# A generous bound on what takes milliseconds, for machines under load.
SOON_S = 20.0


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {SOON_S} s"
        time.sleep(0.02)


def works(client: Client) -> bool:
    return client.ask("ping").read_all() == "ping rows=0"


def test_text_streams_token_by_token(client: Client) -> None:
    answer = client.ask("Guten Tag")
    deltas = list(answer)
    assert answer.text == "".join(delta.text for delta in deltas) == "Guten Tag rows=0"
    assert len(deltas) > 5
    assert answer.finish_reason == "stop"
    assert answer.usage == {"prompt_tokens": 9, "completion_tokens": len("Guten Tag rows=0")}
    assert [token for delta in deltas for token in delta.state["token_ids"]] == list(b"Guten Tag rows=0")
    assert answer.first_token_s is not None and answer.first_token_s < answer.seconds


def test_characters_split_between_tokens(client: Client) -> None:
    text = "é 你好 🙂 end"
    assert client.ask(text).read_all() == f"{text} rows=0"


def test_max_tokens(client: Client) -> None:
    answer = client.ask("abcdefgh", sampling={"max_tokens": 3})
    assert (answer.read_all(), answer.finish_reason) == ("abc", "length")


def test_encoders_run_only_for_their_modality(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    answer = client.ask("x", images=[tmp_path / "a.png", b"other"], videos=[b"video"], audios=[b"clip"])
    assert answer.read_all() == "x rows=5"
    assert client.ask("x", audios=[b"clip"]).read_all() == "x rows=2"


def test_large_media_arrive(client: Client) -> None:
    assert client.ask("x", videos=[bytes(40 << 20)]).read_all() == "x rows=1"


def regions(client: Client) -> list[str]:
    """What the server has mapped of clients' shared memory."""
    return list(client._stub.SystemSharedMemoryStatus(service_pb2.SystemSharedMemoryStatusRequest()).regions)


def test_large_media_go_through_shared_memory_and_leave_nothing(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = []
    monkeypatch.setattr(
        "ming_trt.serving.client.share", lambda stub, items: shared.append(share(stub, items)) or shared[-1]
    )
    answer = client.ask("x", videos=[bytes(8 << 20), b"small"], audios=[b"clip"])
    assert answer.read_all() == "x rows=4"
    assert [region is not None for region in shared] == [False, True, False]
    eventually(lambda: regions(client) == [], "the release of the region")
    with pytest.raises(InputError):
        client.ask("too long", videos=[bytes(8 << 20)]).read_all()
    early = client.ask("for ever", videos=[bytes(8 << 20)])
    early.cancel()
    with pytest.raises(CancelledError):
        early.read_all()
    eventually(lambda: regions(client) == [], "the release of the regions")
    assert not list(Path("/dev/shm").glob(f"ming-trt-input-{os.getpid()}-*"))
    assert works(client)


def test_server_elsewhere_gets_the_bytes(client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container: what we write is not what the server sees in its /dev/shm."""
    monkeypatch.setattr("ming_trt.serving.local_memory._SHARED", tmp_path)
    assert client.ask("x", videos=[bytes(8 << 20)]).read_all() == "x rows=1"
    assert not is_local("example.org:8001") and is_local("localhost:8001")


def test_four_streams_at_once(client: Client) -> None:
    answers: dict[int, list[str]] = {}

    def ask(number: int) -> None:
        answers[number] = [delta.text for delta in client.ask(f"stream {number} " * 8)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON_S)
    for number in range(4):
        assert "".join(answers[number]) == f"stream {number} " * 8 + " rows=0"


@pytest.mark.parametrize(
    ("text", "kind", "sentence"),
    [
        ("", InputError, "message 1 of role 'user' is empty"),
        ("too long", InputError, "the prompt has 9 tokens and the limit is 8: shorten it"),
        ("fail midway", EngineError, "the llm gave logits that are not finite"),
        ("bug midway", EngineError, "stage 'llm' failed"),
        ("bug in preprocess", EngineError, "stage 'preprocess' failed (ZeroDivisionError: a bug)"),
    ],
)
def test_errors_are_one_sentence_and_the_server_stays(
    client: Client, text: str, kind: type[MingError], sentence: str
) -> None:
    with pytest.raises(kind) as caught:
        client.ask(text).read_all()
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)
    assert works(client)


def test_text_before_a_failure_arrives(client: Client) -> None:
    answer = client.ask("fail midway")
    with pytest.raises(EngineError):
        answer.read_all()
    assert answer.text == "fai"


def test_cancel_ends_the_request_in_the_llm(client: Client) -> None:
    answer = client.ask("for ever")
    for _ in range(3):
        next(answer)
    answer.cancel()
    with pytest.raises(CancelledError):
        answer.read_all()
    assert works(client)


def test_leaving_the_context_cancels(client: Client) -> None:
    with client.ask("for ever") as answer:
        next(answer)
    with pytest.raises((CancelledError, StopIteration)):
        next(answer)


def test_another_client_can_cancel(toy_server: Server, client: Client) -> None:
    answer = client.ask("for ever", request_id="shared-id")
    next(answer)
    with Client(toy_server.grpc_url) as other:
        other.control("cancel", "shared-id")
    with pytest.raises(CancelledError, match="shared-id"):
        answer.read_all()
    # The id can be used again.
    assert client.ask("again", request_id="shared-id").read_all() == "again rows=0"


def test_lease_runs_out_without_renewal_and_not_with_it(toy_server: Server, client: Client) -> None:
    renewed = client.ask("for ever", lease_s=1.5)
    body = json.dumps(
        {"id": "unrenewed", "messages": [{"role": "user", "content": "for ever"}], "lease": 1.0}, ensure_ascii=False
    )
    from ming_trt.serving.wire import infer_request

    request = infer_request("ming", {"request": [body.encode()]}, ("text", "state"))
    silent = Answer(client, "unrenewed", request, lease_s=0)
    started = time.monotonic()
    with pytest.raises(CancelledError):
        silent.read_all()
    assert 0.9 < time.monotonic() - started < SOON_S
    while time.monotonic() - started < 3:
        next(renewed)
    renewed.cancel()


def test_killed_client_frees_the_llm(toy_server: Server) -> None:
    """It goes without a word, so its lease ends the request."""
    code = (
        "from ming_trt.serving.client import Client\n"
        f"answer = Client('{toy_server.grpc_url}').ask('for ever', lease_s=1.5)\n"
        "next(answer)\nprint('started', flush=True)\nfor _ in answer: pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    folder = toy_server.run_dir / "board.present"
    time.sleep(2.5)
    assert list(folder.iterdir()), "the client that lives renews its lease"
    process.kill()
    process.wait()
    eventually(lambda: not list(folder.iterdir()), "the end of the request in the llm")


def test_dropped_stream_frees_the_llm(toy_server: Server, client: Client) -> None:
    """Leaving the `with` early is enough, long before the lease."""
    with client.ask("for ever", lease_s=3600) as answer:
        next(answer)
    folder = toy_server.run_dir / "board.present"
    eventually(lambda: not list(folder.iterdir()), "the end of the request in the llm")


@pytest.mark.parametrize(
    ("op", "request_id", "seconds"),
    [("explode", "a", 0), ("cancel", "", 0), ("cancel", "x" * 1000, 0), ("renew", "a", -1), ("renew", "a", 1e9)],
)
def test_cancel_model_refuses_nonsense(client: Client, op: str, request_id: str, seconds: float) -> None:
    with pytest.raises(InputError):
        client.control(op, request_id, seconds)


def test_no_server() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with (
            Client(f"127.0.0.1:{probe.getsockname()[1]}") as client,
            pytest.raises(ServeError, match="no server answers at"),
        ):
            client.ask("x").read_all()


def test_unreadable_file(client: Client) -> None:
    with pytest.raises(InputError, match=r"/nonexistent\.png' cannot be read"):
        client.ask("x", images=["/nonexistent.png"])


def test_messages_pass_through(client: Client) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "two"}]},
    ]
    assert client.ask(messages=turns, images=[b"p"]).read_all() == "two rows=1"
    with pytest.raises(InputError, match="1 part"):
        client.ask(messages=turns).read_all()


def test_dead_process_of_an_ordinary_model(toy_server: Server, client: Client) -> None:
    before = stubs(toy_server.pid)
    os.kill(before["postprocess_0_0"], signal.SIGKILL)
    eventually(lambda: stubs(toy_server.pid).get("postprocess_0_0", 0) not in (0, before["postprocess_0_0"]), "reload")
    eventually(lambda: client.ready(), "readiness")
    assert works(client)


def test_process_that_dies_at_work_is_reported_and_replaced(toy_server: Server, client: Client) -> None:
    """Without presence notes and leases the stream would stay open for ever."""
    answer = client.ask("die in llm", lease_s=3.0)
    with pytest.raises(ServeError, match=r"model 'llm' died|process of the server died"):
        answer.read_all()
    eventually(lambda: "llm_0_0" in stubs(toy_server.pid), "the new process")
    eventually(lambda: client.ready(), "readiness")
    assert works(client)


def test_port_in_use(toy_server: Server, toy_repository: Path) -> None:
    with pytest.raises(ServeError, match=f"port {toy_server.ports.http} "):
        Server(toy_repository, toy_server.ports).start()


def processes_of(server: Server) -> list[bytes]:
    """Command lines that name the server's folder: its own and those of its stubs, orphans included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended between the listing and the look
            found.append((folder / "cmdline").read_bytes())
    return [line for line in found if bytes(server.run_dir) in line]


def test_stage_that_cannot_load_is_named(tmp_path: Path, ports: Callable[[], Ports]) -> None:
    source = write_stages(tmp_path / "source")
    file = source / "llm" / "1" / "model.py"
    file.write_text(
        file.read_text() + "\n    def load(self):\n        raise EngineError('no engine for this machine')\n"
    )
    write_bundle(tmp_path / "bundle")
    assemble(tmp_path / "bundle", tmp_path / "repo", source=source)
    server = Server(tmp_path / "repo", ports())
    with pytest.raises(ServeError, match="model 'llm': no engine for this machine"):
        server.start()
    # the other stages' processes had been started
    eventually(lambda: not processes_of(server), "the end of all processes")


@pytest.mark.parametrize("verdict", [bundle.FAILED, bundle.NOT_RUN])
def test_gate_at_start(tmp_path: Path, verdict: str) -> None:
    write_bundle(tmp_path / "bundle", verdict)
    assemble(tmp_path / "bundle", tmp_path / "repo", allow_ungated=True)
    with pytest.raises(BundleError, match="--allow-ungated"):
        Server(tmp_path / "repo").start()


def test_stop_is_clean(toy_repository: Path, ports: Callable[[], Ports]) -> None:
    server = Server(toy_repository, ports(), trace=True).start()
    pid, processes = server.pid, list(stubs(server.pid).values())
    with Client(server.grpc_url) as client:
        assert works(client)
    assert list(Path("/dev/shm").glob(f"{server.run_dir.name}_*"))
    server.stop()
    assert not alive(pid)
    eventually(lambda: not any(alive(process) for process in processes), "the end of the stubs")
    assert not list(Path("/dev/shm").glob(f"{server.run_dir.name}_*"))
    assert server.log_file.stat().st_size > 0
    assert json.loads((server.run_dir / "trace.json").read_text()), "only a clean stop writes the trace"
    server.stop()
