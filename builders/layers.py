"""Where an engine leaves its definition: every module's output in the graph against the same module in torch.

Nodes are called after the module that made them (`builders/names.py`), so the output of a module in the graph is that
of the last node under its name with its shape. Only graphs that ONNX Runtime runs can be looked into.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.component import Component, Feeds
from builders.reference import reference, run_definition
from builders.verify import Array, available_memory, compare, sample
from ming_trt.errors import EngineError
from ming_trt.presets import Thresholds

if TYPE_CHECKING:
    import onnx

    from ming_trt.checkpoint import Checkpoint
    from ming_trt.config import MingConfig

_CANDIDATES = 4


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One module: its canonical `name`, the node whose output was taken for its own, and the difference."""

    name: str
    node: str
    max_abs: float
    relative: float
    sqnr_db: float
    verdict: str
    note: str = ""


def compare_layers(
    component: Component,
    config: MingConfig,
    checkpoint: Checkpoint,
    model: Path,
    thresholds: Thresholds,
    threads: int = 0,
    memory_limit: int = 0,
) -> tuple[LayerReport, ...]:
    """Compares all modules that both sides have, in the order in which torch finishes them (inner before outer).

    The first report that is not passed names the first divergence. Raises `EngineError` if the graph cannot be
    looked into, or if no module of it has the name of one in the definition.
    """
    import onnx

    if model.suffix != ".onnx":
        raise EngineError(f"layers of '{model}' cannot be looked into, it is no ONNX graph: verify without --layers")
    feeds = sample(component, config)
    expected = _module_outputs(component, config, checkpoint, feeds, memory_limit or available_memory())
    graph = onnx.load(str(model), load_external_data=False)
    candidates = _candidates(graph, expected)
    if not candidates:
        raise EngineError(f"no node of '{model}' has the name of a module of {component.name}: build it again")
    got = _inner_values(graph, model, {value for nodes in candidates.values() for _, value in nodes}, feeds, threads)
    reports = []
    for module, wanted in expected.items():
        for node, value in candidates.get(module, ()):
            array = got[value]
            if np.squeeze(array).shape == np.squeeze(wanted).shape:
                found = compare(module, array.reshape(wanted.shape), wanted, thresholds)
                numbers = (found.max_abs, found.relative, found.sqnr_db, found.verdict, found.note)
                reports.append(LayerReport(module, node, *numbers))
                break
    if not reports:
        raise EngineError(f"no node of '{model}' gives what a module of {component.name} gives: build it again")
    return tuple(reports)


def _module_outputs(
    component: Component, config: MingConfig, checkpoint: Checkpoint, feeds: Feeds, memory: int
) -> dict[str, Array]:
    """Canonical module name -> its (last) floating-point output, in the order in which modules finish."""
    import torch

    module = reference(component, config, checkpoint, memory)
    if module is None:
        raise EngineError(f"the torch definition of {component.name} does not fit: raise --max-host-memory")
    outputs: dict[str, Array] = {}

    def hook(name: str) -> Any:
        def record(_module: torch.nn.Module, _inputs: Any, result: Any) -> None:
            first = result[0] if isinstance(result, tuple | list) and result else result
            if isinstance(first, torch.Tensor) and first.is_floating_point():
                outputs.pop(name, None)
                outputs[name] = first.detach().float().numpy().copy()

        return record

    handles = [inner.register_forward_hook(hook(_canonical(name))) for name, inner in module.named_modules() if name]
    run_definition(module, feeds, handles)
    return outputs


def _canonical(module: str) -> str:
    """`layers.0.attention` as `/layers.0/attention`."""
    path = ""
    for part in module.split("."):
        path += f".{part}" if part.isdigit() else f"/{part}"
    return path


def _candidates(model: onnx.ModelProto, modules: dict[str, Array]) -> dict[str, list[tuple[str, str]]]:
    """Module -> (node, value) of the last nodes made by it or by a module inside it, latest first.

    The very last one may compute a size, or rearrange the output for what follows; hence a few.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for node in model.graph.node:
        scope = node.name.rpartition("/")[0]
        while scope:
            if scope in modules:
                found[scope] = [(node.name, node.output[0]), *found.get(scope, [])][:_CANDIDATES]
            scope = _parent(scope)
    return found


def _parent(scope: str) -> str:
    """`/layers.0/attention` → `/layers.0` → `/layers` → ``."""
    cut = max(scope.rfind("/"), scope.rfind("."))
    return scope[:cut]


def _inner_values(model: onnx.ModelProto, path: Path, values: set[str], feeds: Feeds, threads: int) -> dict[str, Array]:
    """Runs the graph with `values` as additional outputs; weights stay in the file they are in."""
    import onnx
    import onnxruntime

    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(values - known))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = sorted(values)
        return dict(zip(names, session.run(names, feeds), strict=True))
    except Exception as error:  # ONNX Runtime raises its own classes, straight from Exception
        text = " ".join(str(error).split())
        raise EngineError(f"layers of '{path}' cannot be looked into ({text}): verify without --layers") from error
