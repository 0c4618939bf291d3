"""The LLM engine in ONNX Runtime against the reference: prompts, cached steps in place, ragged batches, padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from builders.component import ExportOptions
from builders.registry import component
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import LLMConfig, MingConfig
from ming_trt.golden.cases import Cases
from ming_trt.processing.vision_index import vision_indices
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

OpenEngine = Callable[..., OnnxRuntimeEngine]
Array = npt.NDArray[Any]
LLM_CASES = ["text", "image", "image.video_rope", "video", "video.video_rope", "audio", "image_audio", "two_images"]


class Slots:
    """A cache of `slots` x `capacity` that the engine updates in place."""

    def __init__(self, engine: OnnxRuntimeEngine, c: LLMConfig, slots: int, capacity: int) -> None:
        self.engine, self.c, self.capacity = engine, c, capacity
        shape = (slots, c.num_kv_heads, capacity, c.head_dim)
        self.past = {name: np.zeros(shape, np.float32) for name in engine.inputs if name.startswith("past_")}
        self.lengths = np.zeros(slots, np.int64)

    def step(self, rows: list[dict[str, Array]], features: Array, in_place: bool = True) -> dict[str, Array]:
        """Feeds each slot its tokens (`ids`, `positions`, optional `feature_index`, `modality`), padded to the longest.

        Padded tokens see nothing: their mask rows are all false. All logits are asked for.
        """
        batch, steps = len(rows), max(len(row["ids"]) for row in rows)
        feeds = {
            "input_ids": np.zeros((batch, steps), np.int64),
            "features": features,
            "feature_index": np.full((batch, steps), -1, np.int64),
            "modality": np.zeros((batch, steps), np.int64),
            "position_ids": np.zeros((3, batch, steps), np.int64),
            "write_index": self.lengths[:batch].copy(),
            "attention_mask": np.zeros((batch, 1, steps, self.capacity), bool),
            "logit_index": np.tile(np.arange(steps), (batch, 1)),
        }
        for b, row in enumerate(rows):
            count = len(row["ids"])
            feeds["input_ids"][b, :count] = row["ids"]
            feeds["position_ids"][:, b, :count] = row["positions"]
            feeds["feature_index"][b, :count] = row.get("feature_index", -1)
            feeds["modality"][b, :count] = row.get("modality", 0)
            last = self.lengths[b] + np.arange(count)
            feeds["attention_mask"][b, 0, :count] = np.arange(self.capacity) <= last[:, None]
        past = {name: array[:batch] for name, array in self.past.items()}
        into = {name.replace("past", "present"): array for name, array in past.items()} if in_place else {}
        outputs = self.engine.run({**feeds, **past}, into=into)
        for name, array in past.items():
            array[...] = outputs[name.replace("past", "present")]
        self.lengths[:batch] += [len(row["ids"]) for row in rows]
        return outputs


def prompt(cases: Cases, config: MingConfig, open_engine: OpenEngine, case: str) -> tuple[dict[str, Array], Array]:
    """Tokens of a whole prompt and its feature rows, made by the engines (vision rows, then audio rows)."""
    base = case.removesuffix(".video_rope")
    ids, tokens = cases.array(f"{base}.input_ids"), config.tokens
    is_image, is_audio = ids == tokens.image_patch, ids == tokens.audio_patch
    parts = [np.zeros((0, config.llm.hidden_size), np.float32)]
    for source in next(entry for entry in cases.index["cases"] if entry["id"] == case)["inputs"]:
        if source.endswith(".pixel_values"):
            indices = vision_indices(cases.array(source.replace("pixel_values", "grid_thw")), config.vision)
            parts.append(open_engine("vision_encoder").run({"patches": cases.array(source), **indices})["rows"])
        elif source.endswith(".mel"):
            parts.append(open_engine("audio_encoder").run({"mel": cases.array(source)})["rows"])
    features = np.concatenate(parts)
    special = is_image | is_audio
    assert special.sum() == len(features)
    row = {
        "ids": ids,
        "positions": cases.array(f"{case}.position_ids"),
        # in these prompts the vision patches come before the audio patches, as their rows do
        "feature_index": np.where(special, np.cumsum(special) - 1, -1),
        "modality": np.where(is_image, 1, np.where(is_audio, 2, 0)),
    }
    return row, features if len(features) else np.zeros((1, config.llm.hidden_size), np.float32)


def part(row: dict[str, Array], start: int, stop: int) -> dict[str, Array]:
    return {name: value[..., start:stop] for name, value in row.items()}


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("chunk", [None, 17])
@pytest.mark.parametrize("name", LLM_CASES)
def test_prompt_and_greedy_steps(
    cases: Cases, config: MingConfig, open_engine: OpenEngine, name: str, chunk: int | None, target: str
) -> None:
    """Logits and hidden states of the prompt, whole and in chunks, then 8 greedy steps; both targets' graphs."""
    case = f"llm.{name}"
    row, features = prompt(cases, config, open_engine, case)
    count = len(row["ids"])
    rope = "video_rope" if case.endswith("video_rope") else "3D"
    slots = Slots(open_engine("llm", rope, target), config.llm, 1, count + 20)
    size = chunk or count
    outputs = [slots.step([part(row, at, at + size)], features) for at in range(0, count, size)]
    logits, hidden, embeds = (
        np.concatenate([output[key][0] for output in outputs]) for key in ("logits", "hidden", "embeds")
    )
    cases.check(f"{case}.prefill_logits", logits)
    cases.check(f"{case}.prefill_hidden", hidden)
    if f"{case}.inputs_embeds" in cases:
        cases.check(f"{case}.inputs_embeds", embeds)
    generated, steps = [int(logits[-1].argmax())], []
    for position in cases.array(f"{case}.decode_positions"):
        token = {"ids": np.array(generated[-1:]), "positions": np.full((3, 1), position)}
        steps.append(slots.step([token], features))
        generated.append(int(steps[-1]["logits"][0, 0].argmax()))
    cases.check(f"{case}.generated_ids", np.array(generated))
    cases.check(f"{case}.decode_logits", np.stack([step["logits"][0, 0] for step in steps]))
    cases.check(f"{case}.decode_hidden", np.stack([step["hidden"][0, 0] for step in steps]))


def test_ragged_batch_with_padding_that_sees_nothing(cases: Cases, config: MingConfig, open_engine: OpenEngine) -> None:
    """Two requests in one step give what each gives alone, though the padding of the shorter has an all-false mask."""
    engine = open_engine("llm")
    rows = {}
    for name in ("llm.text", "llm.image"):
        row, features = prompt(cases, config, open_engine, name)
        rows[name] = row
    capacity = max(len(row["ids"]) for row in rows.values()) + 8
    alone = []
    for row in rows.values():
        slots = Slots(engine, config.llm, 1, capacity)
        first = slots.step([row], features)
        second = slots.step([{"ids": np.array([5, 6]), "positions": np.full((3, 2), 90)}], features)
        alone.append((first, second, slots))
    together = Slots(engine, config.llm, 2, capacity)
    first = together.step(list(rows.values()), features)
    for array in together.past.values():
        assert np.isfinite(array).all()
    # both decode, one of them with two tokens, so that the other is padded
    token = {"ids": np.array([5, 6]), "positions": np.full((3, 2), 90)}
    second = together.step([token, part(token, 0, 1)], features)
    limit = cases.tolerance("llm.text.prefill_logits")
    for b, row in enumerate(rows.values()):
        count = len(row["ids"])
        for got, expected, length in ((first, alone[b][0], count), (second, alone[b][1], 2 - b)):
            for name in ("logits", "hidden"):
                assert np.isfinite(got[name]).all()
                np.testing.assert_allclose(got[name][b, :length], expected[name][0, :length], atol=limit)


def test_cache_bound_in_place_and_copied_agree(cases: Cases, config: MingConfig, open_engine: OpenEngine) -> None:
    row, features = prompt(cases, config, open_engine, "llm.audio")
    engine, caches = open_engine("llm"), []
    for in_place in (True, False):
        slots = Slots(engine, config.llm, 1, 160)
        for at in range(0, len(row["ids"]), 50):
            slots.step([part(row, at, at + 50)], features, in_place)
        caches.append(slots.past)
    for name, array in caches[0].items():
        np.testing.assert_array_equal(array, caches[1][name])
        assert np.abs(array[:, :, : len(row["ids"])]).max() > 0
        assert not array[:, :, len(row["ids"]) :].any()


@pytest.mark.parametrize("rope", ["3D", "video_rope"])
def test_sample_feeds_agree_with_the_torch_definition(
    config: MingConfig, checkpoint: Checkpoint, open_engine: OpenEngine, rope: str
) -> None:
    """The gate's inputs: other sizes than the exported ones, all modalities, caches compared too."""
    changed = dataclasses.replace(config, llm=dataclasses.replace(config.llm, rope_kind=rope))
    builder, engine = component("llm"), open_engine("llm", rope)
    feeds = builder.sample_feeds(changed, np.random.default_rng(3))
    got = engine.run(feeds)
    with torch.no_grad():
        expected = builder.reference(changed, checkpoint)(*(torch.from_numpy(value) for value in feeds.values()))
    assert len(got) == len(expected) == len(engine.outputs)
    for name, value in zip(engine.outputs, expected, strict=True):
        # the tolerance that the cases state for logits and hidden states
        np.testing.assert_allclose(got[name], value.numpy(), atol=3e-4, err_msg=name)


def test_graph_uses_what_each_target_has(config: MingConfig, checkpoint: Checkpoint, tmp_path: Path) -> None:
    # TensorRT fuses attention in half precision only: its float32 graph has it in basic operators.
    operators = {
        target: component("llm").export(config, checkpoint, tmp_path / target, ExportOptions(target, precision))[
            "operators"
        ]
        for target, precision in (("onnxruntime", "fp32"), ("tensorrt", "fp16"))
    }
    layers = config.llm.num_layers
    assert operators["onnxruntime"]["com.microsoft:MoE"] == layers
    assert operators["tensorrt"]["ming:SparseMoE"] == operators["tensorrt"]["ming:MRope"] == layers
    assert not any(name.startswith("com.microsoft:") for name in operators["tensorrt"])
    assert operators["tensorrt"]["ai.onnx:Attention"] == layers
    assert ("ai.onnx:Attention" in operators["onnxruntime"]) == (config.llm.num_heads == config.llm.num_kv_heads)
    assert all(counts["ai.onnx:TensorScatter"] == 2 * layers for counts in operators.values())


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_key_heads_need_not_be_shared(config: MingConfig, target: str) -> None:
    """As many key heads as query heads: the exporter refuses the flag for grouped heads there."""
    sizes = dataclasses.replace(config.llm, num_kv_heads=config.llm.num_heads, num_layers=1)
    graph = component("llm").graph(dataclasses.replace(config, llm=sizes), ExportOptions(target)).graph  # type: ignore[attr-defined]
    attention = [node for node in graph if node.op_type == "Attention"]
    assert len(attention) == 1
    assert attention[0].inputs[0].shape[1] == attention[0].inputs[1].shape[1] == sizes.num_heads


def test_half_precision(config: MingConfig, checkpoint: Checkpoint, open_engine: OpenEngine) -> None:
    """One exporter with a type parameter: float16 runs here too (bfloat16 only elsewhere, it is checked as ONNX)."""
    builder, engine = component("llm"), open_engine("llm", "3D", "tensorrt", "fp16")
    feeds = builder.sample_feeds(config, np.random.default_rng(3))
    got = engine.run({name: value.astype(engine.inputs[name].dtype) for name, value in feeds.items()})
    with torch.no_grad():
        expected = builder.reference(config, checkpoint)(*(torch.from_numpy(value) for value in feeds.values()))
    for name, value in zip(engine.outputs, expected, strict=True):
        error = np.abs(got[name] - value.numpy()).max() / np.abs(value.numpy()).max()
        assert error < 5e-3, name  # some ten roundings of 2^-11, amplified by the layers


@pytest.mark.parametrize(("precision", "floor"), [("int8", 12.0), ("int4", 8.0), ("w8a8", 12.0)])
def test_quantised_weights(
    config: MingConfig, checkpoint: Checkpoint, open_engine: OpenEngine, precision: str, floor: float
) -> None:
    """Logits keep a signal over the error of so many dB: random weights, in which single tokens change their expert."""
    builder, engine = component("llm"), open_engine("llm", "3D", "onnxruntime", precision)
    reference = builder.reference(config, checkpoint)
    for seed in range(3):
        feeds = builder.sample_feeds(config, np.random.default_rng(seed))
        with torch.no_grad():
            expected = reference(*(torch.from_numpy(value) for value in feeds.values()))[0].numpy()
        error = engine.run(feeds)["logits"] - expected
        assert 10 * np.log10((expected**2).sum() / (error**2).sum()) > floor


def test_bfloat16_is_valid_onnx(config: MingConfig, checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name in ("llm", "vision_encoder", "audio_encoder"):
        component(name).export(config, checkpoint, tmp_path / name, ExportOptions("tensorrt", "bf16"))
        onnx.checker.check_model(str(tmp_path / name / "model.onnx"), full_check=True)
