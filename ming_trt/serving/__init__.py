"""Serving: the Triton repository, the server around it, the stages inside it and the client of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ming_trt.serving.client import Client as Client

__all__ = ["Client"]


def __getattr__(name: str) -> object:
    """Loads the client on first use, since gRPC takes a while to import."""
    if name == "Client":
        from ming_trt.serving.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
