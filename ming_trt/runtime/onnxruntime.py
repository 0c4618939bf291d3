"""Engines on ONNX Runtime, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ming_trt.errors import EngineError
from ming_trt.runtime.engine import Array, Arrays, TensorSpec, check_call, check_finite

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


class OnnxRuntimeEngine:
    """One session over one ONNX file. See `ming_trt.runtime.engine.Engine` for the contract."""

    def __init__(
        self,
        path: Path | str,
        name: str | None = None,
        *,
        threads: int = 0,
        finite: Collection[str] = (),
        shrink_memory: bool = False,
    ) -> None:
        file = Path(path)
        self.name = name or file.parent.name
        if not file.is_file():
            raise EngineError(f"engine '{self.name}' has no file '{file}': build it with `ming-trt build`")
        options = ort.SessionOptions()
        # Each stage is a process of its own: a second pool, or threads that spin when nothing runs, would starve the
        # others. Within a run they spin for a moment, since the next operator usually comes in one: to wake them each
        # time takes a twentieth of a decoding step.
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.intra_op.spin_duration_us", "30")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        # A plan of the allocations is kept for every shape that was ever seen; ours have no end.
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        self._run_options = None
        if shrink_memory:
            self._run_options = ort.RunOptions()
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        try:
            session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises its own classes, straight from Exception
            raise EngineError(f"engine '{self.name}' cannot be loaded from '{file}' ({_short(error)})") from error
        self._session: Any = session
        self._finite = tuple(finite)
        self.inputs = _specs(self.name, session.get_inputs())
        self.outputs = _specs(self.name, session.get_outputs())
        unknown = set(self._finite) - self.outputs.keys()
        if unknown:
            raise EngineError(
                f"engine '{self.name}' has no output '{min(unknown)}' to check: it has {list(self.outputs)}"
            )

    def run(
        self,
        feeds: Mapping[str, Array],
        outputs: Collection[str] | None = None,
        into: Mapping[str, Array] | None = None,
    ) -> Arrays:
        """See `Engine.run`."""
        if self._session is None:
            raise EngineError(f"engine '{self.name}' was closed: open it again")
        into = into or {}
        check_call(self, feeds, outputs, into)
        binding = self._session.io_binding()
        kept = []  # the binding holds bare pointers
        for name, spec in self.inputs.items():
            # A copy would part an input from the output that shares its memory, but only contiguous arrays pass as one.
            array = np.ascontiguousarray(feeds[name])
            kept.append(array)
            binding.bind_input(name, "cpu", 0, spec.dtype.type, array.shape, _address(array))
        for name, array in into.items():
            binding.bind_output(name, "cpu", 0, self.outputs[name].dtype.type, array.shape, _address(array))
        made = [name for name in (self.outputs if outputs is None else outputs) if name not in into]
        for name in made:
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:
            raise EngineError(f"engine '{self.name}' failed ({_short(error)})") from error
        values = binding.get_outputs()[len(into) :]
        results: Arrays = {**into, **{name: value.numpy() for name, value in zip(made, values, strict=True)}}
        del kept
        check_finite(self.name, results, self._finite)
        return results

    def close(self) -> None:
        """See `Engine.close`."""
        self._session = None


def _specs(stage: str, arguments: Any) -> dict[str, TensorSpec]:
    specs = {}
    for argument in arguments:
        if argument.type not in _DTYPES:
            raise EngineError(
                f"engine '{stage}' has '{argument.name}' of type {argument.type}: the runtime cannot feed it"
            )
        specs[argument.name] = TensorSpec(argument.name, np.dtype(_DTYPES[argument.type]), tuple(argument.shape))
    return specs


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _short(error: Exception) -> str:
    """The first line of ONNX Runtime's message, without its status code."""
    line = str(error).strip().split("\n")[0]
    return line.split(" : ", 2)[-1].strip()[:400]
