"""The KServe v2 messages of our models: BYTES and JSON tensors in, named tensors out."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
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


def raw_tensors(response: Any) -> dict[str, bytes]:
    """The outputs of a `ModelInferResponse` as they were sent: numbers in their order, items of BYTES packed."""
    names = [output.name for output in response.outputs]
    return dict(zip(names, response.raw_output_contents, strict=True))


def first_item(raw: bytes) -> bytes:
    """The first item of a packed BYTES tensor; empty if it has none."""
    if not raw:
        return b""
    (size,) = _LENGTH.unpack_from(raw)
    return raw[_LENGTH.size : _LENGTH.size + size]


def json_object(raw: bytes, name: str) -> dict[str, Any]:
    """The JSON object in the BYTES [1] output `name`. Raises `ServeError` for anything else."""
    try:
        value = json.loads(first_item(raw).decode())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ServeError(f"the server's '{name}' is not a JSON object: is this a server of ming-trt?")
    return value
