"""One real Triton server over the toy stages, for all tests of the session that do not harm it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ming_trt.serving.assemble import assemble
from ming_trt.serving.client import Client
from ming_trt.serving.launch import Ports, Server

from .toy_bundle import write_bundle, write_stages

free_ports = Ports.free


@pytest.fixture(scope="session")
def toy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_bundle(folder / "bundle")
    assemble(folder / "bundle", folder / "repo", source=write_stages(folder / "source"))
    return folder / "repo"


@pytest.fixture(scope="session")
def toy_server(toy_repository: Path) -> Iterator[Server]:
    with Server(toy_repository, free_ports(), ready_timeout_s=60, progress=print) as server:
        yield server


@pytest.fixture
def client(toy_server: Server) -> Iterator[Client]:
    with Client(toy_server.grpc_url) as client:
        yield client


@pytest.fixture
def ports() -> Callable[[], Ports]:
    return free_ports


@pytest.fixture(scope="session")
def mini_server(mini_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the whole mini bundle: text, pictures, speech."""
    repository = tmp_path_factory.mktemp("mini-repository") / "repo"
    assemble(mini_bundle, repository)
    with Server(repository, free_ports(), ready_timeout_s=120, progress=print) as server:
        yield server
