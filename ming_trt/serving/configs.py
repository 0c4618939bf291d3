"""Triton's model configurations, as protobuf messages printed in text form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from ming_trt.serving.graph import ENSEMBLE, HIDDEN, Stage, Tensor

_TYPES = {
    "bytes": pb.TYPE_STRING,
    "bool": pb.TYPE_BOOL,
    "uint8": pb.TYPE_UINT8,
    "int16": pb.TYPE_INT16,
    "int32": pb.TYPE_INT32,
    "int64": pb.TYPE_INT64,
    "float32": pb.TYPE_FP32,
}


def stage_config(stage: Stage, hidden: int, parameters: Mapping[str, str]) -> Any:
    """The `ModelConfig` of one python model. `hidden`: the LLM's width; `parameters` reach the stage at its start."""
    config = pb.ModelConfig(name=stage.name, backend="python", max_batch_size=0)
    _add_tensors(config, stage.inputs, stage.outputs, hidden)
    # Always said: on a machine with GPUs the server would otherwise make one instance per GPU.
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=stage.instances)
    if stage.decoupled:
        config.model_transaction_policy.decoupled = True
    for key, value in sorted(parameters.items()):
        config.parameters[key].string_value = value
    return config


def ensemble_config(stages: Iterable[Stage], hidden: int) -> Any:
    """The `ModelConfig` of the top-level ensemble over those stages that are steps of the graph: the inputs of the
    first are its inputs, the outputs of the last its outputs."""
    config = pb.ModelConfig(name=ENSEMBLE, platform="ensemble", max_batch_size=0)
    steps = [stage for stage in stages if stage.in_graph]
    _add_tensors(config, steps[0].inputs, steps[-1].outputs, hidden)
    for stage in steps:
        step = config.ensemble_scheduling.step.add(model_name=stage.name, model_version=-1)
        for tensor in stage.inputs:
            step.input_map[tensor.name] = tensor.name
        for tensor in stage.outputs:
            step.output_map[tensor.name] = tensor.name
    return config


def to_text(config: Any) -> str:
    """The content of `config.pbtxt`."""
    text: str = text_format.MessageToString(config)
    return text


def from_text(text: str) -> Any:
    """Parses `config.pbtxt`; raises `google.protobuf.text_format.ParseError` with line and column."""
    return text_format.Parse(text, pb.ModelConfig())


def _add_tensors(config: Any, inputs: Iterable[Tensor], outputs: Iterable[Tensor], hidden: int) -> None:
    for tensor in inputs:
        config.input.add(
            name=tensor.name, data_type=_TYPES[tensor.dtype], dims=_dims(tensor, hidden), optional=tensor.optional
        )
    for tensor in outputs:
        config.output.add(name=tensor.name, data_type=_TYPES[tensor.dtype], dims=_dims(tensor, hidden))


def _dims(tensor: Tensor, hidden: int) -> list[int]:
    return [hidden if size == HIDDEN else size for size in tensor.shape]
