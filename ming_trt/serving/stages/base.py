"""What all stages share: reading their configuration, tensors in and out, and errors as Triton's status."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb

from ming_trt.bundle import Bundle
from ming_trt.errors import BundleError, CancelledError, InputError, MingError, UnavailableError

Array = npt.NDArray[Any]
Inputs = Mapping[str, Any]
"""The tensors of a request, of the backend's class, by name."""
BOARD_VARIABLE = "MING_TRT_BOARD"
# `json.dumps` makes an encoder for each call that does not want its defaults; `json.loads` looks for white space.
_to_json, _from_json = json.JSONEncoder(ensure_ascii=False).encode, json.JSONDecoder().raw_decode
log = logging.getLogger(__name__)


class Stage:
    """Base of every `TritonPythonModel`. Subclasses implement `load`, and `execute` or `answer`."""

    name = ""
    bundle: Bundle

    def initialize(self, args: Mapping[str, str]) -> None:
        """Called by the server. A failure is one sentence in its log."""
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        self.name = args["model_name"]
        self.repository = Path(args["model_repository"]).parent
        try:
            _refuse_numpy_2()
            parameters = json.loads(args["model_config"])["parameters"]
            self.bundle = Bundle.open(
                os.path.normpath(self.repository.resolve() / parameters["bundle"]["string_value"])
            )
            self.load()
            # What was loaded stays: no later search for garbage needs to look at it.
            gc.collect()
            gc.freeze()
        except MingError as error:
            raise pb.TritonModelException(str(error)) from error

    def load(self) -> None:
        """Loads what the stage needs. Raises `MingError`."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Called by the server: one response per request; a failed request does not hurt the others."""
        return [self._respond(request) for request in requests]

    def answer(self, request: Inputs) -> dict[str, Array]:
        """The outputs for one request, of which it gets the `inputs`. Raises `MingError`."""
        raise NotImplementedError

    def _respond(self, request: Any) -> Any:
        try:
            return pb.InferenceResponse(tensors(self.answer(inputs(request))))
        except MingError as error:
            return pb.InferenceResponse(error=triton_error(error))
        except Exception as error:
            log.exception("stage %s failed", self.name)
            return pb.InferenceResponse(error=internal_error(self.name, error))


def inputs(request: Any) -> Inputs:
    """The tensors of a request, by name. The backend's own look-up walks through all of them for each."""
    return {tensor.name(): tensor for tensor in request.inputs()}


def read(request: Inputs, name: str) -> Array:
    """The input `name` as an array."""
    array: Array = request[name].as_numpy()
    return array


def read_bytes(request: Inputs, name: str) -> list[bytes]:
    """The items of a BYTES input; none if it is optional and absent."""
    tensor = request.get(name)
    return [] if tensor is None else [bytes(item) for item in tensor.as_numpy().reshape(-1)]


def read_json(request: Inputs, name: str) -> dict[str, Any]:
    """The JSON object in a BYTES [1] input that another stage made."""
    value: dict[str, Any] = _from_json(read_bytes(request, name)[0].decode())[0]
    return value


def tensors(arrays: Mapping[str, Array]) -> list[Any]:
    """Triton tensors; the backend reads an array's memory as it lies, so it must be contiguous."""
    return [pb.Tensor(name, np.ascontiguousarray(array)) for name, array in arrays.items()]


def text_array(text: str | bytes) -> Array:
    """A BYTES [1] tensor."""
    return np.array([text.encode("utf-8", "replace") if isinstance(text, str) else text], dtype=np.object_)


def json_array(value: Mapping[str, Any]) -> Array:
    """A BYTES [1] tensor that holds JSON."""
    return text_array(_to_json(value))


def triton_error(error: MingError) -> Any:
    """Triton's error with the status that fits; a stream has no status, so the message begins with the error's name."""
    codes: tuple[tuple[type[MingError], Any], ...] = (
        (InputError, pb.TritonError.INVALID_ARG),
        (CancelledError, pb.TritonError.CANCELLED),
        (UnavailableError, pb.TritonError.UNAVAILABLE),
    )
    code = next((code for kind, code in codes if isinstance(error, kind)), pb.TritonError.INTERNAL)
    return pb.TritonError(f"{type(error).__name__}: {error}", code)


def internal_error(stage: str, error: Exception) -> Any:
    """Triton's error for what should not have happened; the traceback stands in the server's log."""
    message = f"EngineError: stage '{stage}' failed ({type(error).__name__}: {error}): look into the server's log"
    return pb.TritonError(message, pb.TritonError.INTERNAL)


def board_folder(repository: Path) -> Path:
    """Where the stages of this server find each other's cancellations."""
    named = os.environ.get(BOARD_VARIABLE)
    if named:
        return Path(named)
    digest = hashlib.sha256(str(repository.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"ming-trt-board-{os.geteuid()}-{digest}"


def _refuse_numpy_2() -> None:
    """With NumPy 2 the stub of Triton 2.51 gives wrong numbers instead of an error. Newer stubs say that they can."""
    if int(np.__version__.split(".")[0]) >= 2:
        raise BundleError(f"numpy {np.__version__} makes this server corrupt tensors silently: pip install 'numpy<2'")
