"""The boundary to the back ends: an engine takes named arrays and gives named arrays.

One implementation per back end, all held to `tests/engines/test_conformance.py`. `open_engine` is the only place that
chooses among them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ming_trt.errors import EngineError, UnavailableError

if TYPE_CHECKING:
    from ming_trt.bundle import Bundle

Array = npt.NDArray[Any]
Arrays = dict[str, Array]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output. A size is a number, a symbol (equal symbols mean equal sizes), or None (any size)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.dtype.name} [{sizes}]"


class Engine(Protocol):
    """A loaded engine. `run` may be called from one thread at a time."""

    @property
    def name(self) -> str:
        """The stage that errors name."""
        ...

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    def run(
        self,
        feeds: Mapping[str, Array],
        outputs: Collection[str] | None = None,
        into: Mapping[str, Array] | None = None,
    ) -> Arrays:
        """Runs once; `feeds` holds every input. Returns `outputs` (all, if None), and those named in `into`.

        `into` names arrays that receive an output in place: C-contiguous, of the output's dtype and shape. Such an
        array may be one of `feeds` as well; whether the graph reads it before it writes is the graph's contract (the
        KV cache of `llm` is made so). Raises `EngineError` for feeds that do not fit, for a failed run, and for
        values that are not finite where the engine was opened to look for them.
        """
        ...

    def close(self) -> None:
        """Frees the engine. Running it afterwards raises `EngineError`; closing twice is harmless."""
        ...


@runtime_checkable
class OwnMemory(Protocol):
    """What an engine offers besides if it computes in a memory that is not numpy's: arrays that stay there.

    They are fed to this engine, and named in its `into`, in the place of numpy's arrays, and cost no transfer. Nothing
    else takes them, and only what `DeviceArray` offers can be done with them. Making and changing them is the engine's
    work: not while another thread runs it.
    """

    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array: ...

    def place(self, array: Array, over: Array | None = None) -> Array: ...


def zeros(engine: Engine, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Zeros where `engine` computes: for states that it writes in place."""
    return engine.zeros(shape, dtype) if isinstance(engine, OwnMemory) else np.zeros(shape, dtype)


def place(engine: Engine, array: Array, over: Array | None = None) -> Array:
    """`array` where `engine` computes: for inputs that many runs take unchanged. The array itself, if that is here.

    `over` is what an earlier call gave and nobody needs any more: its memory is used again if the shapes are equal, so
    that captured runs stay valid.
    """
    return engine.place(array, over) if isinstance(engine, OwnMemory) else array


def check_call(
    engine: Engine,
    feeds: Mapping[str, Array],
    outputs: Collection[str] | None,
    into: Mapping[str, Array],
    own: tuple[type, ...] = (),
) -> None:
    """What every back end checks before it runs: names, dtypes, ranks and sizes. Raises `EngineError`.

    `own` are the types of arrays that it takes besides numpy's.
    """
    missing, unknown = engine.inputs.keys() - feeds.keys(), feeds.keys() - engine.inputs.keys()
    if missing or unknown:
        names = f"lacks {_names(missing)}" if missing else f"got {_names(unknown)}, which it does not have"
        raise EngineError(f"engine '{engine.name}' {names}: its inputs are {_names(engine.inputs)}")
    unknown = {*(outputs or ()), *into} - engine.outputs.keys()
    if unknown:
        raise EngineError(f"engine '{engine.name}' has no output {_names(unknown)}: it has {_names(engine.outputs)}")
    symbols: dict[str, tuple[int, str]] = {}
    for name, spec in engine.inputs.items():
        _check_array(engine.name, spec, feeds[name], symbols, own)
    for name, array in into.items():
        _check_array(engine.name, engine.outputs[name], array, symbols, own)
        if isinstance(array, np.ndarray) and not (array.flags.c_contiguous and array.flags.writeable):
            raise EngineError(f"engine '{engine.name}' cannot write '{name}' in place: its array must be C-contiguous")


def check_finite(stage: str, arrays: Mapping[str, Array], names: Iterable[str]) -> None:
    """Raises `EngineError` naming the stage if one of `names` in `arrays` holds a NaN or an infinity."""
    for name in names:
        if name not in arrays:
            continue
        bad = arrays[name].size - int(np.count_nonzero(np.isfinite(arrays[name])))
        if bad:
            raise EngineError(
                f"engine '{stage}' gave {bad} of {arrays[name].size} values of '{name}' that are not finite: "
                "run `ming-trt verify` on the bundle, and look at this request's input"
            )


def open_engine(
    source: Bundle | Path | str,
    component: str,
    *,
    threads: int = 0,
    finite: Collection[str] = (),
    shrink_memory: bool = False,
) -> Engine:
    """Opens the engine `component` of a bundle, or a model file, with the back end that it was built for.

    `threads` 0 means one per core this process may use; outputs named in `finite` are checked after every run;
    `shrink_memory` gives working memory back after a run (for engines that run seldom on inputs of many sizes).
    On a GPU, `threads` means nothing, and engines whose runs are captured as graphs keep their memory.
    Raises `EngineError` if it cannot be loaded, `BundleError` if the bundle lacks it, `UnavailableError` if this
    installation cannot run it.
    """
    if isinstance(source, Path | str):
        path, target = Path(source), "onnxruntime"
        if path.suffix != ".onnx":
            raise EngineError(f"'{path}' is not a model that can be opened by its path: give a .onnx file or a bundle")
    else:
        path, target = source.model_path(component), source.component(component).target
    if target == "onnxruntime":
        from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, component, threads=threads, finite=finite, shrink_memory=shrink_memory)
    why = ""
    if target in ("tensorrt", "tensorrt-rtx"):
        from ming_trt.runtime import tensorrt

        why = tensorrt.unavailable(target)
        if not why and not isinstance(source, Path | str):
            return tensorrt.open_tensorrt(source, component, finite=finite, shrink_memory=shrink_memory)
    remedy = "serve it on the machine it was built for, or build the bundle with --target onnxruntime"
    raise UnavailableError(
        f"engine '{component}' was built for '{target}', which this process cannot run: {why or remedy}"
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def _check_array(
    stage: str, spec: TensorSpec, array: Array, symbols: dict[str, tuple[int, str]], own: tuple[type, ...]
) -> None:
    if not isinstance(array, (np.ndarray, *own)):
        raise EngineError(f"engine '{stage}' got a {type(array).__name__} for '{spec.name}': give an array, {spec}")
    # Called for every cache array of every step: equal dtypes are mostly one object, which is quicker to see.
    if (array.dtype is not spec.dtype and array.dtype != spec.dtype) or array.ndim != len(spec.shape):
        raise EngineError(f"engine '{stage}' got {array.dtype} {list(array.shape)} for '{spec.name}': it takes {spec}")
    for got, wanted in zip(array.shape, spec.shape, strict=True):
        if got == wanted:
            continue
        if isinstance(wanted, str):
            known, other = symbols.setdefault(wanted, (got, spec.name))
            if got != known:
                raise EngineError(
                    f"engine '{stage}' got {list(array.shape)} for '{spec.name}', {spec}: "
                    f"'{other}' says that {wanted} is {known}"
                )
        elif wanted is not None and got != wanted:
            raise EngineError(f"engine '{stage}' got {list(array.shape)} for '{spec.name}': it takes {spec}")
