"""The KServe v2 messages of our models: BYTES and JSON tensors in, named tensors out."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tritonclient.grpc import service_pb2

from ming_trt.errors import ServeError

_LENGTH = struct.Struct("<I")


def infer_request(
    model: str,
    inputs: Mapping[str, Sequence[bytes]],
    outputs: Sequence[str],
    shared: Mapping[str, tuple[str, int]] | None = None,
) -> Any:
    """A `ModelInferRequest` whose inputs are BYTES [n]; an empty final response is asked for. No `outputs`: all.

    `shared`: inputs that lie in shared memory, with the region's name and size in bytes.
    """
    request = service_pb2.ModelInferRequest(model_name=model)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, items in inputs.items():
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[len(items)])
        if shared and name in shared:
            region, size = shared[name]
            tensor.parameters["shared_memory_region"].string_param = region
            tensor.parameters["shared_memory_byte_size"].int64_param = size
        else:
            request.raw_input_contents.append(pack_bytes(items))
    for name in outputs:
        request.outputs.add(name=name)
    return request


def pack_bytes(items: Sequence[bytes]) -> bytes:
    """The content of a BYTES tensor."""
    return b"".join(_LENGTH.pack(len(item)) + item for item in items)


def bytes_tensor(response: Any, name: str) -> list[bytes] | None:
    """The items of the BYTES output `name` of a `ModelInferResponse`, or None if it is not there."""
    raw = raw_tensor(response, name)
    return None if raw is None else list(_split(raw))


def raw_tensor(response: Any, name: str) -> bytes | None:
    """The bytes of the output `name` of numbers, in their order, or None if it is not there."""
    for index, output in enumerate(response.outputs):
        if output.name == name:
            return bytes(response.raw_output_contents[index])
    return None


def json_tensor(response: Any, name: str) -> dict[str, Any] | None:
    """The JSON object in the BYTES [1] output `name`, or None if it is not there."""
    items = bytes_tensor(response, name)
    if not items:
        return None
    value = json.loads(items[0])
    if not isinstance(value, dict):
        raise ServeError(f"the server's '{name}' is not a JSON object: is this a server of ming-trt?")
    return value


def _split(raw: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(raw):
        (size,) = _LENGTH.unpack_from(raw, place)
        yield raw[place + 4 : place + 4 + size]
        place += 4 + size
