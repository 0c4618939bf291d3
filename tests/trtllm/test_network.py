"""The network definition on the recorder: it asks for just what is exported, and planted faults are caught."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from builders.trtllm_layout import layout
from ming_trt.checkpoint import Checkpoint
from ming_trt.trtllm.contract import check_checkpoint, network
from ming_trt.trtllm.model import EMBEDS_OUTPUT, HIDDEN_OUTPUT, define, register
from ming_trt.trtllm.recorder import ShapeError, recorder
from tests.builders.trtllm_help import POSITIONS, export
from tests.conftest import UNDERSTANDING

FOLDER = Path(os.environ.get("MING_TRT_TEST_UNDERSTANDING", UNDERSTANDING))
GOLDEN = FOLDER / "checkpoint"
SPREADS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def ones(source: Path) -> dict[str, float]:
    """A range of 1 for every module."""
    from builders.trtllm_layout import KV_SCALE, LAYER, parallel
    from ming_trt.config import load_config

    llm = load_config(source).llm
    names = [module.name for module in layout(llm, parallel(llm, 1, 1)).modules]
    return dict.fromkeys([*names, *(LAYER.format(i) + KV_SCALE for i in range(llm.num_layers))], 1.0)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An FP8 checkpoint of two ranks."""
    export(GOLDEN, tmp_path, "fp8", 2, 2, ones(GOLDEN))
    return tmp_path


@pytest.mark.parametrize(("tp", "ep"), SPREADS)
@pytest.mark.parametrize(("precision", "fp8_cache"), [("fp32", False), ("bf16", False), ("fp8", False), ("fp8", True)])
def test_network_asks_for_what_is_exported(tmp_path: Path, precision: str, fp8_cache: bool, tp: int, ep: int) -> None:
    """Every weight with shape and type on every rank, nothing left over; two outputs; FP8 KV adds its scale."""
    config = export(GOLDEN, tmp_path, precision, tp, ep, ones(GOLDEN), fp8_cache=fp8_cache)
    assert check_checkpoint(tmp_path) == []
    made = network(json.loads((tmp_path / "config.json").read_text()), 0)
    per_layer = 11 + (2 * 6 if precision == "fp8" else 0) + fp8_cache
    assert len(made.weights) == 3 + config.llm.num_layers * per_layer
    dtype = "float32" if precision == "fp32" else "bfloat16"
    assert made.outputs[HIDDEN_OUTPUT] == made.outputs[EMBEDS_OUTPUT] == (("tokens", config.llm.hidden_size), dtype)
    assert made.outputs["logits"][1] == "float32"


def _change(folder: Path, rank: int, change: Any) -> list[str]:
    path = folder / f"rank{rank}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return check_checkpoint(folder)


FC = "transformer.layers.0.mlp.fc"


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("missing", lambda t: t.pop(f"{FC}.activation_scaling_factor")),
        ("missing", lambda t: t.update({"transformer.layers.0.mlp.gate.weight": t.pop(FC[:-2] + "router.weight")})),
        ("F32", lambda t: t.update({f"{FC}.weight": t[f"{FC}.weight"].float()})),
        ("none", lambda t: t.update(extra=t["transformer.ln_f.weight"].clone())),
        (
            "(8, 1)",
            lambda t: t.update({f"{FC}.weights_scaling_factor": t[f"{FC}.weights_scaling_factor"].repeat(2, 1)}),
        ),
        ("BF16", lambda t: t.update({f"{FC[:-2]}audio_router.weight": t[f"{FC[:-2]}audio_router.weight"].bfloat16()})),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_planted_faults_of_a_checkpoint(exported: Path, what: str, change: Any, rank: int) -> None:
    assert check_checkpoint(exported) == []
    problems = _change(exported, rank, change)
    assert problems and all(problem.startswith(f"rank {rank}: ") for problem in problems)
    assert what in " ".join(problems)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rotary_scaling": {"type": "linear"}}, "mrope"),
        ({"hidden_act": "silu"}, "SwiGLU"),
        ({"num_attention_heads": 3}, "do not divide"),
        ({"moe_intermediate_size": 48, "mapping": [2, 2, 1, 4, 1]}, "does not multiply"),
    ],
)
def test_configurations_that_cannot_be(exported: Path, change: dict[str, Any], sentence: str) -> None:
    config = json.loads((exported / "config.json").read_text()) | change
    if isinstance(config["mapping"], list):
        config["mapping"] = dict(
            zip(("world_size", "tp_size", "pp_size", "moe_tp_size", "moe_ep_size"), config["mapping"], strict=True)
        )
    with pytest.raises(ShapeError, match=sentence):
        network(config, 0)


def test_routers_stay_out_of_fp8_by_name(exported: Path) -> None:
    """The wildcard of config.json covers all three; without it the recorder quantises them, and the check says so."""
    path = exported / "config.json"
    config = json.loads(path.read_text())
    config["quantization"]["exclude_modules"].remove("*router")
    path.write_text(json.dumps(config))
    problems = check_checkpoint(exported)
    for router in ("router", "image_router", "audio_router"):
        assert any(f"mlp.{router}.weights_scaling_factor" in problem for problem in problems)


class Faulty:
    """The recorder with one operator exchanged."""

    def __init__(self, **changes: Any) -> None:
        self.api = SimpleNamespace(**{**vars(recorder()), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"cast": lambda input, dtype: input},
        {"unsqueeze": lambda input, axis: input},
        {"gt": lambda left, right: left},
        {"pad_vocab_size": lambda vocab_size, tp_size: vocab_size + 1},
    ],
)
def test_mistakes_in_the_definition_are_caught(exported: Path, changes: dict[str, Any]) -> None:
    """A router fed bf16, masks of another rank or type, a head of an odd size."""
    definition = define(Faulty(**changes).api)
    config = definition.config(**json.loads((exported / "config.json").read_text()))
    with pytest.raises(ShapeError):
        model = definition.model(config)
        model(**model.prepare_inputs())


def test_without_a_rotary_table_the_network_fails(exported: Path) -> None:
    definition = define(recorder())
    model = definition.model(definition.config(**json.loads((exported / "config.json").read_text())))
    inputs = model.prepare_inputs(mrope_rotary_cos_sin_size=POSITIONS)
    with pytest.raises(ShapeError, match="rotary table"):
        model(**inputs)
    inputs = model.prepare_inputs()
    expected = POSITIONS * model.config.head_size
    assert inputs["mrope_params"].mrope_rotary_cos_sin.shape == ("requests", expected)


def test_text_only_engine_has_no_prompt_table(exported: Path) -> None:
    definition = define(recorder())
    model = definition.model(definition.config(**json.loads((exported / "config.json").read_text())))
    inputs = model.prepare_inputs(prompt_table=False)
    logits, _, hidden = model(**inputs)
    assert hidden.shape[0] == "tokens" and logits.shape[0] == "requests"


def test_register() -> None:
    api = recorder()
    definition = register(api)
    assert {"MingForCausalLM": definition.model} == api.MODEL_MAP
    assert definition.model.config_class is definition.config


def test_headers_are_those_of_the_reader(exported: Path) -> None:
    """`tensor_headers` and the library agree on a rank file."""
    from ming_trt.checkpoint import tensor_headers

    assert {info.name for info in tensor_headers(exported / "rank0.safetensors")} == set(
        load_file(exported / "rank0.safetensors")
    )
    assert len(Checkpoint(GOLDEN)) > 0
