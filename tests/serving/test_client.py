"""What the client says where no server speaks."""

from __future__ import annotations

import grpc
import pytest

from ming_trt.errors import ServeError
from ming_trt.serving.client import Client


class Failure:
    """The part of a gRPC error that is read."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code, self.details = lambda: code, lambda: details


@pytest.mark.parametrize(
    ("code", "details"),
    [(grpc.StatusCode.UNAVAILABLE, "Socket closed"), (grpc.StatusCode.UNKNOWN, "Stream removed (Socket closed)")],
)
def test_a_connection_that_breaks_off(code: grpc.StatusCode, details: str) -> None:
    with Client("localhost:1") as client:
        assert "broke off" in str(client._explain(Failure(code, details)))


@pytest.mark.parametrize("url", ["localhost:1", "not a url"])
def test_an_address_without_a_server(url: str) -> None:
    with Client(url) as client, pytest.raises(ServeError, match=f"no server answers at {url}: start one"):
        client.ask("x").read_all()
