"""Plans of TensorRT as engines: refused or loaded, once per process, and shared by the engines that run them.

Both editions have one API here; `CALLS` lists what is used of it, and `runtime/signatures.py` compares that with the
installed bindings. Nothing in this file has run on a GPU yet (docs/gpu-first-run.md).
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ming_trt.errors import EngineError, UnavailableError
from ming_trt.runtime.cuda import Stream, cuda
from ming_trt.runtime.device import Context, Queue, Range, Shape
from ming_trt.runtime.device_engine import DeviceEngine
from ming_trt.runtime.engine import Engine, TensorSpec
from ming_trt.runtime.plan import Host, Stamp, check_plan, gpu_capability, plugin_abi

if TYPE_CHECKING:
    from ming_trt.bundle import Bundle, ComponentEntry

log = logging.getLogger(__name__)

TARGETS = ("tensorrt", "tensorrt-rtx")
# Engines that run again and again on the same shapes: a decode step, a denoising step, a part of an utterance.
CAPTURED = ("llm", "talker", "dit", "flow_encoder", "flow_estimator", "f0_predictor", "vocoder")
PLUGINS_VARIABLE, PLUGINS_FOLDER = "MING_TRT_PLUGINS", "plugins"
# numpy has no bfloat16: its bits go as they are. Only caches have that type, and nothing here looks into them.
DTYPES: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
# Class -> member -> parameters after `self` that our calls pass, in order; None: it is read, not called.
CALLS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "": {
        "init_libnvinfer_plugins": ("logger", "namespace"),
        "get_plugin_registry": (),
        "__version__": None,
    },
    "ILogger": {"__init__": (), "log": ("severity", "msg"), "ERROR": None, "INTERNAL_ERROR": None, "WARNING": None},
    "Runtime": {"__init__": ("logger",), "deserialize_cuda_engine": ("serialized_engine",)},
    "IPluginRegistry": {"load_library": ("plugin_path",)},
    "ICudaEngine": {
        "num_io_tensors": None,
        "num_optimization_profiles": None,
        "get_tensor_name": ("index",),
        "get_tensor_mode": ("name",),
        "get_tensor_dtype": ("name",),
        "get_tensor_shape": ("name",),
        "get_tensor_location": ("name",),
        "get_tensor_format": ("name", "profile_index"),
        "is_shape_inference_io": ("name",),
        "get_tensor_profile_shape": ("name", "profile_index"),
        "get_device_memory_size_for_profile_v2": ("profile_index",),
        "get_aliased_input_tensor": ("name",),
        "get_engine_stat": ("stat",),
        "create_execution_context": ("strategy",),
    },
    "IExecutionContext": {
        "set_optimization_profile_async": ("profile_index", "stream_handle"),
        "set_device_memory": ("memory", "size"),
        "set_input_shape": ("name", "shape"),
        "infer_shapes": (),
        "get_tensor_shape": ("name",),
        "set_tensor_address": ("name", "memory"),
        "execute_async_v3": ("stream_handle",),
    },
    "TensorIOMode": {"INPUT": None},
    "TensorLocation": {"DEVICE": None},
    "TensorFormat": {"LINEAR": None},
    "EngineStat": {"TOTAL_WEIGHTS_SIZE": None},
    "ExecutionContextAllocationStrategy": {"USER_MANAGED": None},
    "DataType": dict.fromkeys(DTYPES),
}
# Not in 10.14, whose plans write no cache in place; and RTX has no standard plugins to initialise.
OPTIONAL = {"ICudaEngine.get_aliased_input_tensor", "init_libnvinfer_plugins"}


class Library:
    """TensorRT as this process has it: its module, one logger, one runtime, the GPU's compute capability ("sm90"), and
    the plugin libraries loaded so far."""

    def __init__(self, trt: Any, edition: str, device: str) -> None:
        self.trt, self.edition, self.version, self.device = trt, edition, str(trt.__version__), device
        self.said: deque[str] = deque(maxlen=20)
        self.plugins: dict[Path, int] = {}
        said = self.said

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    said.append(msg)
                    log.error("%s", msg)
                elif severity == trt.ILogger.WARNING:
                    log.warning("%s", msg)

        self.logger = Logger()
        self.runtime = trt.Runtime(self.logger)

    def why(self) -> str:
        """The first of the errors since the last call (later ones mostly follow from it), for a sentence."""
        text = self.said[0] if self.said else "it gave no reason"
        self.said.clear()
        return " ".join(text.split())[:400].rstrip(" .")

    def load_plugins(self, libraries: Sequence[Path]) -> int:
        """Registers plugin libraries; their ABI, 0 without any. Raises `EngineError` for one that cannot be loaded."""
        if libraries and not self.plugins and hasattr(self.trt, "init_libnvinfer_plugins"):
            self.trt.init_libnvinfer_plugins(self.logger, "")
        for library in libraries:
            path = library.resolve()
            if path in self.plugins:
                continue
            abi = plugin_abi(path)
            if self.trt.get_plugin_registry().load_library(str(path)) is None:
                raise EngineError(f"{self.edition} {self.version} does not take the plugins of '{path}' ({self.why()})")
            self.plugins[path] = abi
        return max((self.plugins[library.resolve()] for library in libraries), default=0)


class _Loaded:
    """A plan in this process, and how many engines use it."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.users = engine, 1


_LOCK = threading.Lock()
_LIBRARIES: dict[str, Library] = {}
_LOADED: dict[tuple[str, str], _Loaded] = {}


def library(edition: str) -> Library:
    """TensorRT of this edition with a GPU to run on. Raises `UnavailableError` naming what is missing."""
    from builders import tensorrt_api

    device = gpu_capability()
    cuda()
    with _LOCK:
        if edition not in _LIBRARIES:
            _LIBRARIES[edition] = Library(tensorrt_api.load(edition).trt, edition, device)
        return _LIBRARIES[edition]


def plugin_libraries(*folders: Path) -> tuple[Path, ...]:
    """The plugin libraries to run with: those in `plugins` below the first of `folders` that has any (an engine's, its
    bundle's), else those that `MING_TRT_PLUGINS` names."""
    for folder in folders:
        if inside := tuple(sorted((folder / PLUGINS_FOLDER).glob("*.so"))):
            return inside
    return tuple(Path(part) for part in os.environ.get(PLUGINS_VARIABLE, "").split(":") if part)


def open_tensorrt(
    bundle: Bundle, component: str, *, finite: Collection[str] = (), shrink_memory: bool = False
) -> Engine:
    """The engine `component` of a bundle of plans, on GPU 0 of those that are visible.

    Raises `UnavailableError` without a GPU or TensorRT, `EngineError` for a plan that cannot be loaded.
    """
    entry = bundle.component(component)
    found, file = library(entry.target), bundle.model_path(component)
    libraries = plugin_libraries(file.parent, bundle.path)
    return open_plan(found, file, entry, libraries, finite=finite, shrink_memory=shrink_memory)


def open_plan(
    found: Library,
    file: Path,
    entry: ComponentEntry,
    libraries: Sequence[Path] = (),
    *,
    finite: Collection[str] = (),
    shrink_memory: bool = False,
) -> DeviceEngine:
    """The plan in `file`, described by `entry` (stamp, names and sizes of its tensors). Raises `EngineError`."""
    plan = load_plan(found, file, entry, libraries)
    try:
        stream = Stream()
    except BaseException:
        plan.close()
        raise
    capture = entry.name in CAPTURED
    return DeviceEngine(entry.name, plan, stream, finite=finite, shrink_memory=shrink_memory, capture=capture)


def load_plan(found: Library, file: Path, entry: ComponentEntry, libraries: Sequence[Path] = ()) -> TensorRTPlan:
    """Deserialises a plan, unless this process has it already. Its stamp is compared before TensorRT sees a byte."""
    stamp = Stamp.from_facts(entry.facts, entry.name)
    abi = found.load_plugins(libraries) if stamp.plugin_abi else 0
    check_plan(entry.name, stamp, file, Host(found.edition, found.version, found.device, abi))
    key = (str(file.resolve()), stamp.sha256)
    with _LOCK:
        loaded = _LOADED.get(key)
        if loaded is not None:
            loaded.users += 1
        else:
            loaded = _LOADED[key] = _Loaded(_deserialise(found, file, entry.name))
    try:
        return TensorRTPlan(found, loaded.engine, entry, key)
    except BaseException:
        _let_go(key)
        raise


def _deserialise(found: Library, file: Path, name: str) -> Any:
    """The file is mapped, not read: TensorRT copies the weights to the GPU from it."""
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found.said.clear()
        engine = found.runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(
            f"the plan of '{name}' cannot be loaded ({found.why()}): look at the GPU's free memory, or build it again "
            "on this machine"
        )
    return engine


def _let_go(key: tuple[str, str]) -> None:
    with _LOCK:
        loaded = _LOADED[key]
        loaded.users -= 1
        if not loaded.users:
            del _LOADED[key]


class TensorRTPlan:
    """See `ming_trt.runtime.device.Plan`: an `ICudaEngine`.

    Names and symbols of sizes come from the manifest and are held to the plan's. Raises `EngineError` where they
    differ, and for tensors that the runtime cannot serve: in host memory, of an unknown type, or not in plain layout.
    """

    def __init__(self, found: Library, engine: Any, entry: ComponentEntry, key: tuple[str, str]) -> None:
        self._found, self._engine, self._key, self._name = found, engine, key, entry.name
        trt = found.trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        for kind, described, wanted in (("inputs", entry.inputs, True), ("outputs", entry.outputs, False)):
            held = {name for name in names if is_input[name] is wanted}
            if held != described.keys():
                differing = sorted(held ^ described.keys())[0]
                raise EngineError(
                    f"the plan of '{entry.name}' and the manifest differ in the {kind} ('{differing}'): build it again"
                )
        self.inputs = {name: self._spec(name, described) for name, described in entry.inputs.items()}
        self.outputs = {name: self._spec(name, described) for name, described in entry.outputs.items()}
        count = int(engine.num_optimization_profiles)
        for name in names:
            for profile in range(count):
                if engine.get_tensor_format(name, profile) != trt.TensorFormat.LINEAR:
                    raise EngineError(f"the plan of '{entry.name}' has '{name}' not in plain layout: build it again")
        self.profiles: list[dict[str, Range]] = [
            {name: self._range(name, profile) for name in self.inputs} for profile in range(count)
        ]
        aliased = getattr(engine, "get_aliased_input_tensor", lambda name: None)
        sources = {name: aliased(name) for name in self.outputs}
        self.aliases = {name: str(source) for name, source in sources.items() if source}
        self.weight_bytes = max(0, int(engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)))

    def _spec(self, name: str, described: Mapping[str, Any]) -> TensorSpec:
        engine, trt = self._engine, self._found.trt
        if engine.is_shape_inference_io(name) or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise EngineError(
                f"the plan of '{self._name}' takes sizes from the values of '{name}', for which the runtime has no "
                "way: keep data-dependent shapes out of the graph"
            )
        kind = engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise EngineError(f"the plan of '{self._name}' has '{name}' of type {kind}: the runtime cannot feed it")
        shape = tuple(described["shape"])
        own = tuple(engine.get_tensor_shape(name))
        fits = len(own) == len(shape) and all(
            size == wanted if isinstance(wanted, int) else True for size, wanted in zip(own, shape, strict=True)
        )
        if not fits:
            raise EngineError(
                f"the plan of '{self._name}' has '{name}' as {list(own)} and the manifest as {list(shape)}: build the "
                "bundle again"
            )
        return TensorSpec(name, np.dtype(DTYPES[kind]), shape)

    def _range(self, name: str, profile: int) -> Range:
        shape = tuple(self._engine.get_tensor_shape(name))
        if -1 not in shape:
            return Range(shape, shape)
        low, _, high = self._engine.get_tensor_profile_shape(name, profile)
        return Range(tuple(low), tuple(high))

    def scratch(self, profile: int) -> int:
        """See `Plan.scratch`: enough for the profile's largest shapes."""
        return max(1, int(self._engine.get_device_memory_size_for_profile_v2(profile)))

    def context(self, profile: int, queue: Queue) -> Context:
        """See `Plan.context`."""
        return TensorRTContext(self._found, self._engine, profile, queue, self.inputs, self.outputs)

    def close(self) -> None:
        """See `Plan.close`."""
        if self._engine is not None:
            self._engine = None
            _let_go(self._key)


class TensorRTContext:
    """See `ming_trt.runtime.device.Context`: an `IExecutionContext` that keeps its profile for life.

    Changing profiles would make TensorRT copy and wait, and would invalidate captured graphs.
    """

    def __init__(
        self,
        found: Library,
        engine: Any,
        profile: int,
        queue: Queue,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
    ) -> None:
        self._found, self._queue = found, queue
        self._inputs, self._outputs = inputs, outputs
        # Contexts of one engine never run at the same time, so they share the memory that `set_scratch` gives.
        self._context = engine.create_execution_context(found.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._context is None:
            raise EngineError(f"TensorRT cannot make an execution context ({found.why()})")
        if not self._context.set_optimization_profile_async(profile, queue.handle):
            raise EngineError(f"TensorRT does not take profile {profile} ({found.why()})")

    def set_scratch(self, address: int, size: int) -> None:
        """See `Context.set_scratch`."""
        self._context.set_device_memory(address, size)

    def set_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """See `Context.set_shapes`."""
        self._found.said.clear()
        for name in self._inputs:
            if not self._context.set_input_shape(name, shapes[name]):
                raise EngineError(f"TensorRT does not take {list(shapes[name])} for '{name}' ({self._found.why()})")
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise EngineError(f"TensorRT cannot work out the outputs' shapes ({error}; {self._found.why()})") from error
        if missing:
            raise EngineError(f"TensorRT asks for more about '{missing[0]}' to work out the outputs' shapes")
        return {name: tuple(self._context.get_tensor_shape(name)) for name in self._outputs}

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        """See `Context.set_addresses`."""
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise EngineError(f"TensorRT does not take an address for '{name}' ({self._found.why()})")

    def enqueue(self) -> None:
        """See `Context.enqueue`."""
        self._found.said.clear()
        if not self._context.execute_async_v3(self._queue.handle):
            raise EngineError(f"TensorRT could not queue the run: {self._found.why()}")


def unavailable(edition: str) -> str:
    """Why plans of this edition cannot run in this process, or ""."""
    try:
        library(edition)
    except UnavailableError as error:
        return str(error)
    return ""
