"""The exported checkpoint: exact in bf16, within FP8's step otherwise, the same model whatever the ranks, resumable."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from builders.calibration import calibrate
from builders.calibration_samples import SYNTHETIC, Source, load
from builders.trtllm_file import JOURNAL, TensorFiles
from builders.trtllm_fp8 import Quantizer, amax, scale_of
from builders.trtllm_layout import layout, parallel
from builders.trtllm_numpy import NumpyEngine
from ming_trt.checkpoint import Checkpoint
from ming_trt.config import LLMConfig, load_config
from ming_trt.errors import BuildError, CheckpointError
from ming_trt.golden.cases import Cases
from ming_trt.models.audio import AudioEncoder
from ming_trt.models.audio import weight_map as audio_weights
from ming_trt.models.vision import INPUT_NAMES, VisionEncoder
from ming_trt.models.vision import weight_map as vision_weights
from ming_trt.models.weights import load_weights
from ming_trt.processing.vision_index import vision_indices
from ming_trt.trtllm.prompt_table import prompt_table
from ming_trt.trtllm.rope_table import rope_table
from tests.builders.trtllm_help import POSITIONS, export, read, sqnr_db, store_as

FOLDER = Path(
    os.environ.get("MING_TRT_TEST_UNDERSTANDING", Path(__file__).parents[1] / "data" / "golden" / "understanding")
)
GOLDEN = FOLDER / "checkpoint"
SPREADS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module")
def cases() -> Cases:
    return Cases(FOLDER)


@pytest.fixture(scope="module")
def ranges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Ranges of the reference checkpoint's activations over synthetic prompts."""
    config, checkpoint = load_config(GOLDEN), Checkpoint(GOLDEN)
    samples = load(Source(SYNTHETIC, ""), config, checkpoint)
    return calibrate(config.llm, checkpoint, samples, tmp_path_factory.mktemp("state"), "key").amax


def _features(cases: Cases, case: str) -> np.ndarray:
    """Rows of a case's media, by the torch towers (their own tests hold them to the reference)."""
    config, checkpoint = load_config(GOLDEN), Checkpoint(GOLDEN)
    with torch.device("meta"):
        tower, ear = VisionEncoder(config.vision, config.llm), AudioEncoder(config.audio, config.llm)
    load_weights(tower, checkpoint, vision_weights(config.vision, config.llm))
    load_weights(ear, checkpoint, audio_weights(config.audio, config.llm))
    rows = []
    for source in next(entry for entry in cases.index["cases"] if entry["id"] == case)["inputs"]:
        if source.endswith(".pixel_values"):
            indices = vision_indices(cases.array(source.replace("pixel_values", "grid_thw")), config.vision)
            inputs = {"patches": cases.array(source), **indices}
            with torch.inference_mode():
                rows.append(tower(*(torch.from_numpy(np.array(inputs[name])) for name in INPUT_NAMES)).numpy())
        elif source.endswith(".mel"):
            with torch.inference_mode():
                rows.append(ear(torch.from_numpy(cases.array(source))).numpy())
    return np.concatenate([np.zeros((0, config.llm.hidden_size), np.float32), *rows])


@pytest.mark.parametrize(("tp", "ep"), SPREADS)
@pytest.mark.parametrize("name", ["text", "image_audio", "video.video_rope"])
def test_engine_model_gives_the_reference(cases: Cases, tmp_path: Path, name: str, tp: int, ep: int) -> None:
    """Logits and hidden states of the read-back checkpoint against the reference, ids coded as the engine gets them.

    Stored unrounded, so that only the order of sums differs: 1e-4 absolute, for logits up to 10 (2.4e-5 seen).
    """
    case = f"llm.{name}"
    config = export(GOLDEN, tmp_path / "out", "fp32", tp, ep)
    ids = cases.array(f"{case.removesuffix('.video_rope')}.input_ids")
    modality = np.where(ids == config.tokens.image_patch, 1, np.where(ids == config.tokens.audio_patch, 2, 0))
    index = np.where(modality > 0, np.cumsum(modality > 0) - 1, -1)
    features = _features(cases, case)
    llm = dataclasses.replace(config.llm, rope_kind="video_rope" if "video_rope" in case else "3D")
    coded = prompt_table(ids, modality, index, features, llm.vocab_size, 1000)
    table = rope_table(llm, cases.array(f"{case}.position_ids").reshape(3, -1), 0, POSITIONS)
    logits, hidden = NumpyEngine(tmp_path / "out").forward(coded.input_ids, coded.rows, table)
    cases.check(f"{case}.prefill_logits", logits, 1e-4)
    cases.check(f"{case}.prefill_hidden", hidden, 1e-4)


def test_bf16_source_is_kept_bit_for_bit(tmp_path: Path) -> None:
    """Every number of a bf16 checkpoint is in the result, routers exactly widened; the model is the float32 one's."""
    source = store_as(GOLDEN, tmp_path / "source", torch.bfloat16)
    export(source, tmp_path / "bf16", "bf16")
    export(source, tmp_path / "fp32", "fp32")
    got, exact = read(tmp_path / "bf16"), read(tmp_path / "fp32")
    assert got.keys() == exact.keys()
    for name, tensor in got.items():
        assert tensor.dtype == (torch.float32 if "router" in name else torch.bfloat16), name
        assert torch.equal(tensor.float(), exact[name]), name
    names = Checkpoint(source)
    up = names.read("model.model.layers.1.mlp.experts.3.up_proj.weight")
    gate = names.read("model.model.layers.1.mlp.experts.3.gate_proj.weight")
    assert torch.equal(got["transformer.layers.1.mlp.fc.weight"][3], torch.cat((up, gate)))


@pytest.mark.parametrize(("tp", "ep"), SPREADS)
def test_fp8_is_within_its_step(tmp_path: Path, ranges: dict[str, float], tp: int, ep: int) -> None:
    """Each matrix, ranks put together, equals the unsplit one, whose products reach 25 dB with quantised inputs."""
    config = export(GOLDEN, tmp_path / "one", "fp8", scales=ranges)
    export(GOLDEN, tmp_path / "many", "fp8", tp, ep, ranges)
    whole, exact = read(tmp_path / "one"), Checkpoint(GOLDEN)
    made = layout(config.llm, parallel(config.llm, tp, ep))
    files = [read(tmp_path / "many", rank) for rank in range(made.parallel.ranks)]
    one = NumpyEngine(tmp_path / "one")
    rng = np.random.default_rng(0)
    checked = 0
    for module in made.modules:
        for matrix in module.matrices:
            stored = whole[module.name + ".weight"]
            stored = stored if matrix.expert is None else stored[matrix.expert]
            for rank, block in matrix.blocks.items():
                part = files[rank][module.name + ".weight"]
                part = part if matrix.slots is None else part[matrix.slots[rank]]
                rows = torch.cat([stored[a:b] for a, b in block.rows]).float()
                rows = rows if matrix.vector else rows[:, slice(*block.columns)]
                assert torch.equal(part.float()[: len(rows)], rows), (module.name, matrix.expert, rank)
            if f"{module.name}.weights_scaling_factor" in whole:
                weight = torch.cat([exact.read(name).float() for name in matrix.sources])
                # inputs as wide as calibration saw them
                x = rng.standard_normal((64, matrix.columns)).astype(np.float32) * ranges[module.name] / 4
                y = one.linear(x, module.name, 0, matrix.expert)
                assert sqnr_db(torch.from_numpy(y), torch.from_numpy(x) @ weight.T) >= 25, module.name
                checked += 1
    assert checked == config.llm.num_layers * (4 + 2 * config.llm.num_experts)


def test_fp8_cache_scale_and_missing_range(tmp_path: Path, ranges: dict[str, float]) -> None:
    export(GOLDEN, tmp_path / "out", "fp8", scales=ranges, fp8_cache=True)
    name = "transformer.layers.0.attention.kv_cache_scaling_factor"
    assert float(read(tmp_path / "out")[name]) == pytest.approx(ranges[name] / 448)
    without = {key: value for key, value in ranges.items() if key != "transformer.layers.1.mlp.proj"}
    with pytest.raises(BuildError, match=r"no range for 'transformer.layers.1.mlp.proj'"):
        export(GOLDEN, tmp_path / "lacking", "fp8", scales=without)


@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 200_000))
@settings(max_examples=20, deadline=None)
def test_quantizer_is_the_obvious_formula(seed: int, dtype: torch.dtype, size: int) -> None:
    values = (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 7 - 3)).to(dtype)
    largest = amax(values, "x")
    assert largest == float(values.float().abs().max())
    scale = scale_of(largest)
    expected = (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(Quantizer()(values, scale).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizer_of_every_16_bit_value(dtype: torch.dtype) -> None:
    """Rounding, saturation, subnormal numbers and both zeros, by scales around the usual ones and at the limits."""
    bits = torch.arange(1 << 16, dtype=torch.int32)[torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))]
    values = bits.to(torch.uint16).view(dtype).repeat(3)[:-5]
    quantize = Quantizer()
    for scale in (1.0, scale_of(0.1), scale_of(77.7), 1e-30, 3e-45, 1e30):
        expected = (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(quantize(values, scale).view(torch.uint8), expected), scale
        target = torch.full(values.shape, 3, dtype=torch.uint8).view(torch.float8_e4m3fn)
        assert quantize(values, scale, target) is target
        assert torch.equal(target.view(torch.uint8), expected), scale


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        amax(torch.tensor([1.0, value, 2.0]), "x")


def test_zero_matrix_has_a_scale() -> None:
    assert scale_of(amax(torch.zeros(3), "x")) == 1.0


@pytest.mark.parametrize(
    ("tp", "ep", "change", "sentence"),
    [
        (3, 1, {}, "4 attention heads do not divide by 3"),
        (2, 4, {}, "--ep 4 does not divide --tp 2"),
        (4, 3, {}, "--ep 3 does not divide --tp 4"),
        (1, 3, {"num_heads": 3, "num_kv_heads": 3, "shared_width": 66}, "8 experts do not divide by 3"),
        (6, 1, {"num_heads": 12, "num_kv_heads": 4, "shared_width": 66, "expert_width": 36}, "4 key/value heads"),
    ],
)
def test_spreads_that_do_not_fit(tp: int, ep: int, change: dict[str, int], sentence: str) -> None:
    config = dataclasses.replace(load_config(GOLDEN).llm, **change)
    with pytest.raises(BuildError) as caught:
        parallel(config, tp, ep)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 3),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_ranks_hold_everything(ranks: int, expert: int, kv: int, layers: int, tied: bool) -> None:
    """Every element of every matrix is on some rank, and what is not repeated on purpose is on one only."""
    config = dataclasses.replace(
        load_config(GOLDEN).llm,
        num_heads=8,
        num_kv_heads=kv,
        num_layers=layers,
        num_experts=8,
        expert_width=16,
        shared_width=32,
        tie_embeddings=tied,
        vocab_size=101,
    )
    if ranks % expert:
        return
    made = layout(config, parallel(config, ranks, expert))
    for module in made.modules:
        for matrix in module.matrices:
            held = np.zeros((matrix.rows, matrix.columns), int)
            for block in matrix.blocks.values():
                for a, b in block.rows:
                    held[a:b, slice(*block.columns)] += 1
            assert held.min() >= 1
            if matrix.kind.value == "linear" and not (module.name.endswith("qkv") and kv < ranks):
                assert held.max() == 1
        for rank in range(ranks):
            shape = module.shape(rank)
            assert shape[0] == (-(-101 // ranks) if module.name == "lm_head" else shape[0])


def test_torn_journal_and_another_key(tmp_path: Path) -> None:
    """A journal cut inside a line goes on after the last whole one; files of another key are begun again."""
    export(GOLDEN, tmp_path / "whole", "bf16")
    expected = (tmp_path / "whole" / "rank0.safetensors").read_bytes()
    out = tmp_path / "out"
    export(GOLDEN, out, "bf16")
    journal = (out / JOURNAL).read_bytes()
    lines = journal.splitlines(keepends=True)
    with (out / "rank0.safetensors").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\x55" * 1000)
    (out / JOURNAL).write_bytes(b"".join(lines[:5]) + lines[5][:7])
    export(GOLDEN, out, "bf16")
    assert (out / "rank0.safetensors").read_bytes() == expected
    (out / JOURNAL).write_bytes(journal.replace(b'"key": "key"', b'"key": "old"'))
    (out / "rank0.safetensors").write_bytes(b"other")
    export(GOLDEN, out, "bf16")
    assert (out / "rank0.safetensors").read_bytes() == expected


def test_sources_of_two_types_are_widened(tmp_path: Path) -> None:
    """A stack of a bf16 and a float32 matrix is that of both in float32."""
    checkpoint, folder = Checkpoint(GOLDEN), tmp_path / "source"
    folder.mkdir()
    shutil.copy(GOLDEN / "config.json", folder)
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    tensors |= {name: value.bfloat16() for name, value in tensors.items() if name.endswith("up_proj.weight")}
    save_file(tensors, folder / "model.safetensors")
    export(folder, tmp_path / "out", "fp32")
    prefix = "model.model.layers.1.mlp.experts.3."
    expected = torch.cat([tensors[f"{prefix}{name}_proj.weight"].float() for name in ("up", "gate")])
    assert torch.equal(read(tmp_path / "out")["transformer.layers.1.mlp.fc.weight"][3], expected)


def test_nothing_is_noted_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers are slowed down, each by another time; a group is finished when all of its elements were written, and
    the files are synced after that and before the line of the journal."""
    lock, written = threading.Lock(), Counter[str]()
    events: list[str] = []
    write, finish, note = TensorFiles.write, TensorFiles.finish, TensorFiles._note

    def slow(self: TensorFiles, file: int, name: str, at: int, values: torch.Tensor) -> None:
        time.sleep(at % 3 / 1000)
        write(self, file, name, at, values)
        with lock:
            written[name] += values.numel()

    def checked(self: TensorFiles, group: str) -> None:
        for name, entry in self.plans[0].items():
            if name.startswith(f"{group}."):
                assert written[name] == math.prod(entry.shape), name
        events.clear()
        finish(self, group)

    def noted(self: TensorFiles, line: Mapping[str, str]) -> None:
        assert "key" in line or events[:1] == ["sync"]
        note(self, line)

    def sync(handle: int, plain: Callable[[int], None] = os.fdatasync) -> None:
        events.append("sync")
        plain(handle)

    monkeypatch.setattr(TensorFiles, "write", slow)
    monkeypatch.setattr(TensorFiles, "finish", checked)
    monkeypatch.setattr(TensorFiles, "_note", noted)
    monkeypatch.setattr(os, "fdatasync", sync)
    export(GOLDEN, tmp_path, "fp32")
    journal = (tmp_path / JOURNAL).read_text().splitlines()
    config = load_config(GOLDEN)
    names = [module.name for module in layout(config.llm, parallel(config.llm, 1, 1)).modules]
    assert [json.loads(line)["group"] for line in journal[1:]] == names


def test_failure_of_a_worker_ends_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes out, what was finished stays; the next run completes the same files."""
    export(GOLDEN, tmp_path / "whole", "bf16")
    plain = Checkpoint.read_into

    def failing(self: Checkpoint, name: str, start: int, end: int, target: memoryview) -> None:
        if name == "model.model.layers.1.mlp.experts.2.down_proj.weight":
            raise CheckpointError("the disk is gone")
        plain(self, name, start, end, target)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "read_into", failing)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            export(GOLDEN, tmp_path / "out", "bf16")
    noted = (tmp_path / "out" / JOURNAL).read_text()
    assert '"transformer.layers.1.mlp.fc"' in noted and '"transformer.layers.1.mlp.proj"' not in noted
    export(GOLDEN, tmp_path / "out", "bf16")
    whole, again = ((tmp_path / name / "rank0.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == again


def test_written_header_is_aligned(tmp_path: Path) -> None:
    export(GOLDEN, tmp_path, "bf16")
    data = (tmp_path / "rank0.safetensors").read_bytes()
    assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0


def test_layout_of_the_official_sizes() -> None:
    """Names and shapes of the specification's table, for the published sizes."""
    official = LLMConfig(
        126464, 2048, 28, 16, 4, 128, 64, 6, 1408, 2816, 1e-5, 6e5, "3D", (16, 24, 24), 32768, True, True, False
    )
    shapes = {module.name: module.shape(0) for module in layout(official, parallel(official, 1, 1)).modules}
    assert shapes["transformer.vocab_embedding"] == (126464, 2048)
    layer = "transformer.layers.27."
    assert shapes[f"{layer}attention.qkv"] == (3072, 2048)
    assert shapes[f"{layer}mlp.fc"] == (64, 2816, 2048)
    assert shapes[f"{layer}mlp.proj"] == (64, 2048, 1408)
    assert shapes[f"{layer}mlp.shared_expert.fc"] == (5632, 2048)
    assert shapes[f"{layer}mlp.audio_router"] == (64, 2048)
    assert shapes["lm_head"] == (126464, 2048)
    assert len(shapes) == 3 + 28 * 11
