"""Hands large inputs to a server on the same machine by system shared memory instead of through the network stack.

A file in /dev/shm is what the server opens as shared memory. It is unlinked as soon as the server has mapped it, so
that nothing stays behind if this process is killed. A server that cannot open it (in a container, of another user) gets
the bytes by gRPC.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from ming_trt.serving.wire import pack_bytes

# Below this many bytes the two calls that register and unregister cost more than they save (docs/log.md).
WORTHWHILE = 2 << 20
_SHARED = Path("/dev/shm")
_HOSTS = ("localhost", "127.0.0.1", "::1", "[::1]")
_TIMEOUT_S = 10.0
# A cancelled request ends at the next step of the stage that runs it.
_PATIENCE_S = 60.0


def is_local(url: str) -> bool:
    """Whether the address names this machine."""
    return url.rpartition(":")[0] in _HOSTS and _SHARED.is_dir()


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes that the server has mapped, by the name it knows them. `stub`: the connection."""

    stub: Any
    name: str
    size: int


def release(regions: Sequence[Region]) -> None:
    """Makes the server forget the regions. It refuses while a request that has them still runs; then tries again."""
    for region in regions:
        request = service_pb2.SystemSharedMemoryUnregisterRequest(name=region.name)
        deadline, pause = time.monotonic() + _PATIENCE_S, 0.002
        while time.monotonic() < deadline:
            try:
                region.stub.SystemSharedMemoryUnregister(request, timeout=_TIMEOUT_S)
                break
            except grpc.RpcError as error:
                if "in use" not in str(error.details()):
                    break  # the server is gone, and the mapping with it
            except ValueError:
                break  # the connection was closed here
            time.sleep(pause)
            pause = min(2 * pause, 0.5)


def share(stub: Any, items: Sequence[bytes]) -> Region | None:
    """A region with those items as a BYTES tensor, or None if it is too small to pay or the server cannot map it."""
    if sum(map(len, items)) < WORTHWHILE:
        return None
    name, content = f"ming-trt-input-{os.getpid()}-{secrets.token_hex(8)}", pack_bytes(items)
    file = _SHARED / name
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        request = service_pb2.SystemSharedMemoryRegisterRequest(
            name=name, key=f"/{name}", offset=0, byte_size=len(content)
        )
        stub.SystemSharedMemoryRegister(request, timeout=_TIMEOUT_S)
    except (OSError, grpc.RpcError):
        return None
    finally:
        file.unlink(missing_ok=True)
    return Region(stub, name, len(content))
