"""TensorRT's Python API over `host_device`: ONNX files as plans.

It has what `ming_trt.runtime.tensorrt.CALLS` lists and nothing else, so a call outside the list, which the real
bindings are compared with, fails here.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ming_trt.bundle import ComponentEntry
from ming_trt.runtime.device import Range
from ming_trt.runtime.device_engine import DeviceEngine
from ming_trt.runtime.tensorrt import DTYPES, Library, load_plan

from .host_device import HostQueue, OrtContext, OrtPlan

VERSION = "11.4.0.106"
QUEUES: dict[int, HostQueue] = {}
_HANDLES = {np.dtype(value): name for name, value in DTYPES.items() if name != "BF16"}


class Logger:
    ERROR, INTERNAL_ERROR, WARNING = "ERROR", "INTERNAL_ERROR", "WARNING"

    def __init__(self) -> None: ...


def enum(name: str, *members: str) -> Any:
    return Enum(name, list(members))  # type: ignore[misc]


class Module(SimpleNamespace):
    """The module. `ranges` are the profiles of plans to come, `in_place` whether their caches are; `changes` replaces
    answers of the engine: "get_tensor_location" -> function of its arguments. `like` gives its enumerations."""

    def __init__(
        self,
        ranges: Any = None,
        in_place: bool = True,
        changes: Mapping[str, Callable[..., Any]] | None = None,
        like: Module | None = None,
    ) -> None:
        super().__init__(
            __version__=VERSION,
            ILogger=Logger,
            TensorIOMode=enum("TensorIOMode", "INPUT", "OUTPUT"),
            TensorLocation=enum("TensorLocation", "DEVICE", "HOST"),
            TensorFormat=enum("TensorFormat", "LINEAR", "CHW32"),
            EngineStat=enum("EngineStat", "TOTAL_WEIGHTS_SIZE"),
            ExecutionContextAllocationStrategy=enum("ExecutionContextAllocationStrategy", "STATIC", "USER_MANAGED"),
            DataType=enum("DataType", *DTYPES, "FP8"),
            deserialised=[],
            loaded=[],
        )
        if like is not None:  # the same enumerations
            self.__dict__.update(like.__dict__)
        module = self

        class Runtime:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
                data = bytes(serialized_engine)
                module.deserialised.append(len(data))
                if data.startswith(b"not"):
                    self.logger.log(Logger.WARNING, "a warning")
                    self.logger.log(Logger.ERROR, "Serialization assertion failed.\nmore")
                    self.logger.log(Logger.ERROR, "a consequence")
                    return None
                return CudaEngine(module, data, ranges, in_place, changes or {})

        class Registry:
            def load_library(self, plugin_path: str) -> Any:
                module.loaded.append(plugin_path)
                return None if "refused" in plugin_path else object()

        self.Runtime = Runtime
        self.get_plugin_registry = lambda: Registry()
        self.init_libnvinfer_plugins = lambda logger, namespace: True


class CudaEngine:
    """`ICudaEngine`, as far as it is listed."""

    def __init__(
        self, module: Module, data: bytes, ranges: Any, in_place: bool, changes: Mapping[str, Callable[..., Any]]
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="ming-trt-fake-") as folder:
            file = Path(folder) / "model.onnx"
            file.write_bytes(data)
            self._plan = OrtPlan(file, "fake", in_place, ranges, (4000, 9000))
        self._module = module
        self._names = [*self._plan.inputs, *self._plan.outputs]
        for name, change in changes.items():
            assert hasattr(self, name)
            setattr(self, name, change)

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._plan.profiles)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._module.TensorIOMode["INPUT" if name in self._plan.inputs else "OUTPUT"]

    def get_tensor_dtype(self, name: str) -> Any:
        spec = {**self._plan.inputs, **self._plan.outputs}[name]
        return self._module.DataType[_HANDLES[spec.dtype]]

    def get_tensor_shape(self, name: str) -> list[int]:
        spec = {**self._plan.inputs, **self._plan.outputs}[name]
        return [size if isinstance(size, int) else -1 for size in spec.shape]

    def get_tensor_location(self, name: str) -> Any:
        return self._module.TensorLocation.DEVICE

    def get_tensor_format(self, name: str, profile_index: int) -> Any:
        return self._module.TensorFormat.LINEAR

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        limit: Range = self._plan.profiles[profile_index][name]
        return [list(limit.low), list(limit.high), list(limit.high)]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._plan.scratch(profile_index)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._plan.aliases.get(name)

    def get_engine_stat(self, stat: Any) -> int:
        return self._plan.weight_bytes

    def create_execution_context(self, strategy: Any) -> Any:
        assert strategy == self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        return ExecutionContext(self._plan)


class ExecutionContext:
    """`IExecutionContext`, as far as it is listed. A shape must be set for every input before addresses are."""

    def __init__(self, plan: OrtPlan) -> None:
        self._plan = plan
        self._context: OrtContext | None = None
        self._given: dict[str, tuple[int, ...]] = {}
        self._outputs: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._context = self._plan.context(profile_index, QUEUES[stream_handle])
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self._context is not None
        self._context.set_scratch(memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._context is not None
        limit = self._plan.profiles[self._context.profile][name]
        self._given[name] = tuple(shape)
        return all(low <= size <= high for low, size, high in zip(limit.low, shape, limit.high, strict=True))

    def infer_shapes(self) -> list[str]:
        assert self._context is not None
        missing = [name for name in self._plan.inputs if name not in self._given]
        if not missing:
            try:
                self._outputs = self._context.set_shapes(self._given)
            except AssertionError as error:
                raise RuntimeError(str(error)) from None
        return missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._outputs[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory and memory % 256 == 0
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self._context is not None and self._context.queue is QUEUES[stream_handle]
        self._context.set_addresses(self._addresses)
        self._context.enqueue()
        return True


MODULE = Module()


def entry(path: Path, name: str = "toy", **changes: Any) -> ComponentEntry:
    """What a manifest would say of the ONNX file as a plan."""
    from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    data = path.read_bytes() if path.is_file() else b""
    if data and not data.startswith(b"not"):
        engine = OnnxRuntimeEngine(path, name, threads=1)
        for held, specs in ((inputs, engine.inputs), (outputs, engine.outputs)):
            held.update({n: {"dtype": s.dtype.name, "shape": list(s.shape)} for n, s in specs.items()})
    stamp = {
        "edition": "tensorrt",
        "version": VERSION,
        "devices": ["sm90"],
        "plugin_abi": 0,
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
    } | changes
    facts = {"plan": {"stamp": stamp}}
    return ComponentEntry(name, "tensorrt", "fp32", str(path), inputs, outputs, facts)


def open_fake(path: Path, module: Module | None = None, **options: Any) -> DeviceEngine:
    """An engine through the adapter of `ming_trt.runtime.tensorrt`, on a queue of its own."""
    options.pop("threads", None)
    found = Library(module or MODULE, "tensorrt", "sm90")
    plan = load_plan(found, Path(path), entry(Path(path)))
    queue = HostQueue()
    QUEUES[queue.handle] = queue
    return DeviceEngine("toy", plan, queue, **options)
