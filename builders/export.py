"""From a torch definition without weights to an ONNX model with weights: export, bind, save.

The module is built on the `meta` device, so an export costs no memory for weights and depends on the configuration
alone. Its parameters become initializers of the same name without a value; `bind_weights` gives them lazily read
checkpoint tensors; `save` writes them one piece at a time.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch

from builders.names import canonical_names
from builders.tensors import Pieces, StreamedTensor, bound, drop_unused, streamed
from ming_trt.errors import BuildError

OPSET = 24
MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
# Page size: external data is memory-mapped, and every tensor larger than a page starts on one.
ALIGNMENT = 4096
# Smaller tensors (axes, sizes, scalars) stay in the model file: shape inference reads them.
INLINE_BYTES = 256

Translations = Mapping[Callable[..., Any], Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class Signature:
    """What would be exported: the module on `meta`, example inputs by name, the names of their dynamic axes."""

    module: torch.nn.Module
    inputs: Mapping[str, torch.Tensor]
    axes: Mapping[str, Mapping[int, str]]

    def shape(self, name: str) -> tuple[int | str, ...]:
        """Shape of an input, a symbol for each dynamic size."""
        symbols = self.axes.get(name, {})
        return tuple(symbols.get(axis, size) for axis, size in enumerate(self.inputs[name].shape))


class _Seen(Exception):
    """Ends an export that only its signature is wanted of."""

    def __init__(self, signature: Signature) -> None:
        super().__init__()
        self.signature = signature


_only_signature: ContextVar[bool] = ContextVar("only_signature", default=False)


def signature_of(graph: Callable[[], ir.Model]) -> Signature:
    """What `graph`, which calls `export_graph`, would export; takes milliseconds instead of seconds."""
    token = _only_signature.set(True)
    try:
        graph()
    except _Seen as seen:
        return seen.signature
    finally:
        _only_signature.reset(token)
    raise BuildError(f"{graph} exported nothing: let it call export_graph")


def export_graph(
    module: torch.nn.Module,
    example_inputs: Mapping[str, torch.Tensor],
    dynamic_shapes: Mapping[str, Mapping[int, str]],
    output_names: Sequence[str],
    translations: Translations | None = None,
) -> ir.Model:
    """Exports `module` (parameters on `meta`) at opset 24; parameters become initializers without a value.

    `example_inputs` are meta tensors in the order of `forward`'s arguments, by the names that the graph's inputs get;
    `dynamic_shapes` names the dynamic axes of each. `translations` maps custom torch operators
    to functions that emit ONNX nodes. Raises `BuildError` if the module holds a real weight, or makes a constant from
    one that is not there.
    """
    if _only_signature.get():
        raise _Seen(Signature(module.eval(), example_inputs, dynamic_shapes))
    parameters = dict((*module.named_parameters(), *module.named_buffers()))
    for name, value in parameters.items():
        if value.device.type != "meta":
            raise BuildError(f"'{name}' is on '{value.device}': build the module under torch.device('meta')")
    module.eval()
    with _quiet():
        program = torch.onnx.export(
            module,
            tuple(example_inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(example_inputs),
            output_names=list(output_names),
            dynamic_shapes=_shapes_by_argument(module, list(example_inputs), dynamic_shapes),
            custom_translation_table=dict(translations or {}),
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise BuildError(f"torch did not export {type(module).__name__}")
    model: ir.Model = program.model
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if name in parameters:
            value.const_value = None
        elif isinstance(raw := getattr(tensor, "raw", None), torch.Tensor) and raw.device.type == "meta":
            raise BuildError(
                f"constant '{name}' {list(raw.shape)} was made from a weight that is not there: "
                "compute it in `forward`, or make it a parameter with a source"
            )
    with _quiet():
        onnxscript.optimizer.optimize_ir(model, inline=False)
    canonical_names(model)
    # what is not used (a weight that this engine does not need) is not written
    drop_unused(model.graph, list(model.graph.initializers.values()))
    if model.opset_imports.get("") != OPSET:
        raise BuildError(f"torch exported opset {model.opset_imports.get('')}, expected {OPSET}: check its version")
    return model


def _shapes_by_argument(
    module: torch.nn.Module, names: Sequence[str], dynamic_shapes: Mapping[str, Mapping[int, str]]
) -> dict[str, Any]:
    """The dynamic axes by argument, those of `*args` as one tuple, as torch wants them."""
    shapes: dict[str, Any] = {}
    left = [dict(dynamic_shapes.get(name, {})) for name in names]
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            shapes[name], left = tuple(left), []
        elif left:
            shapes[name] = left.pop(0)
    return shapes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's chatter (absent torchvision, skipped deduplication of initializers without value) is not news."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def bind_weights(model: ir.Model, weights: Mapping[str, Pieces]) -> None:
    """Gives each initializer without a value the stream of that name; dtype and shape are checked when it is written.

    Raises `BuildError` naming an initializer that no stream serves.
    """
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        if name not in weights:
            raise BuildError(f"no weight for '{name}': the weight map of this engine does not name it")
        if value.shape is None or value.dtype is None:
            raise BuildError(f"initializer '{name}' has no static shape")
        value.const_value = StreamedTensor(name, weights[name], value.dtype, value.shape.numpy())
    _fold_transposes(model)


def _fold_transposes(model: ir.Model) -> None:
    """Stores `Transpose(weight)` of a matrix as the transposed weight, which ONNX Runtime would copy at each load."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
            continue
        source = node.inputs[0]
        if (
            source is None
            or not isinstance(source.const_value, StreamedTensor)
            or source.name not in graph.initializers
        ):
            continue
        if source.shape is None or len(source.shape) != 2 or list(node.attributes.get_ints("perm", [1, 0])) != [1, 0]:
            continue
        original = streamed(source)
        rows, columns = original.shape.numpy()
        transposed = StreamedTensor(f"{source.name}_T", _transposed(original), original.dtype, (columns, rows))
        value = bound(graph, transposed)
        value.meta["transposed_from"] = original
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        graph.remove(node, safe=True)
        drop_unused(graph, [source])


def _transposed(original: StreamedTensor) -> Pieces:
    return lambda: [original.numpy().T]


def save(model: ir.Model, folder: Path) -> None:
    """Writes `folder/model.onnx` and `folder/model.onnx.data`; the first appears only when both are whole.

    Peak memory is one piece of one weight. Raises `BuildError` if an initializer has no value.
    """
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            raise BuildError(f"initializer '{name}' has no value: call bind_weights before save")
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        try:
            ir.save(
                model,
                scratch / MODEL_FILE,
                external_data=DATA_FILE,
                size_threshold_bytes=INLINE_BYTES,
                alignment=ALIGNMENT,
                align_threshold=ALIGNMENT,
                max_workers=1,
            )
        except ir.serde.SerdeError as error:
            raise _root_cause(error) from error
        _check(scratch / MODEL_FILE)
        data = scratch / DATA_FILE
        (folder / MODEL_FILE).unlink(missing_ok=True)
        if data.exists():
            _sync(data)
            data.replace(folder / DATA_FILE)
        _sync(scratch / MODEL_FILE)
        (scratch / MODEL_FILE).replace(folder / MODEL_FILE)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _root_cause(error: BaseException) -> BaseException:
    """The serialiser wraps what a weight's stream raised; the sentence for the user is at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        raise BuildError(f"the exported graph is not valid ONNX: {error}") from error


def facts(model: ir.Model) -> dict[str, Any]:
    """What the manifest says of a graph: inputs, outputs, opset, operators (domain:type -> count)."""
    operators = Counter(f"{node.domain or 'ai.onnx'}:{node.op_type}" for node in model.graph.all_nodes())
    return {
        "inputs": {str(value.name): _describe(value) for value in model.graph.inputs},
        "outputs": {str(value.name): _describe(value) for value in model.graph.outputs},
        "opset": model.opset_imports[""],
        "operators": dict(sorted(operators.items())),
    }


def _describe(value: ir.Value) -> dict[str, Any]:
    if value.dtype is None or value.shape is None:
        raise BuildError(f"'{value.name}' has no static type: the export lost its shape")
    shape = [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
    return {"dtype": value.dtype.name.lower(), "shape": shape}
