"""Whether an exported checkpoint is what the network asks for: each weight, with shape and type, and nothing left over.

The network definition runs on the recorder for each rank of the checkpoint's own config.json; no weight is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ming_trt.checkpoint import tensor_headers
from ming_trt.errors import CheckpointError
from ming_trt.trtllm.model import EMBEDS_OUTPUT, HIDDEN_OUTPUT, define
from ming_trt.trtllm.recorder import Shape, recorder

_STORED = {"bfloat16": "BF16", "float32": "F32", "fp8": "F8_E4M3"}
Weight = tuple[tuple[int, ...], str]


@dataclass(frozen=True, slots=True)
class Network:
    """One rank's network: weight name -> shape and safetensors type; output name -> shape and type."""

    weights: dict[str, Weight]
    outputs: dict[str, tuple[Shape, str]]


def network(config: dict[str, Any], rank: int) -> Network:
    """Runs the definition for `config` (a checkpoint's config.json) as that rank. Raises `ShapeError`."""
    definition = define(recorder())
    made = definition.config(**config)
    made.set_rank(rank)
    model = definition.model(made)
    inputs = model.prepare_inputs()
    model(**inputs)
    weights = {name: (parameter.shape, _STORED[parameter.dtype]) for name, parameter in model.named_parameters()}
    return Network(weights, inputs["input_ids"].marked)


def check_checkpoint(folder: Path) -> list[str]:
    """What does not fit between the checkpoint in `folder` and the network, one sentence each; empty if all does."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{folder}/config.json' cannot be read ({error}): export the checkpoint again") from None
    problems = []
    for rank in range(config["mapping"]["world_size"]):
        wanted = network(config, rank)
        if set(wanted.outputs) != {"logits", HIDDEN_OUTPUT, EMBEDS_OUTPUT}:
            problems.append(f"rank {rank}: the network's outputs are {sorted(wanted.outputs)}")
        file = folder / f"rank{rank}.safetensors"
        stored = {info.name: (info.shape, info.dtype) for info in tensor_headers(file)}
        for name in sorted(wanted.weights.keys() | stored.keys()):
            asked, given = wanted.weights.get(name), stored.get(name)
            if asked != given:
                problems.append(
                    f"rank {rank}: '{name}' is {given or 'missing'}, the network asks for {asked or 'none'}"
                )
    return problems
