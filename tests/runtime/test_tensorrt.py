"""Plans as engines: what is refused before and after TensorRT sees them, and what engines of one plan share.

TensorRT is a double that has the listed calls (`fake_tensorrt.py`); they are compared with the real ones in
`test_signatures.py`. What a GPU does with them is for docs/gpu-first-run.md.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.tensorrt_build import keep_plugins
from ming_trt.bundle import ComponentEntry
from ming_trt.errors import EngineError, UnavailableError
from ming_trt.processing.request import Sampling
from ming_trt.runtime import tensorrt
from ming_trt.runtime.device import Range
from ming_trt.runtime.device_engine import DeviceEngine
from ming_trt.runtime.engine import TensorSpec
from ming_trt.runtime.generator import LLM
from ming_trt.runtime.plan import PLUGIN_ABI
from ming_trt.runtime.sequence import GenerationRequest, LLMOptions
from ming_trt.runtime.tensorrt import Library, load_plan, plugin_libraries, unavailable

from . import fake_tensorrt, tiny_llm
from .fake_tensorrt import QUEUES, Module
from .host_device import HostQueue


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return tiny_llm.write(tmp_path / "model.plan")


@pytest.fixture(autouse=True)
def nothing_stays_loaded() -> Iterator[None]:
    yield
    assert not tensorrt._LOADED
    QUEUES.clear()


def opened(file: Path, module: Module, name: str = "llm", **changes: Any) -> DeviceEngine:
    """Through `open_plan` but for the stream."""
    entry = fake_tensorrt.entry(file, name)
    plan = load_plan(Library(module, "tensorrt", "sm90"), file, replace(entry, **changes))
    queue = HostQueue()
    QUEUES[queue.handle] = queue
    return DeviceEngine(name, plan, queue, capture=name in tensorrt.CAPTURED)


def refuse(file: Path, entry: ComponentEntry, module: Module, *libraries: Path) -> str:
    with pytest.raises(EngineError) as caught:
        load_plan(Library(module, "tensorrt", "sm90"), file, entry, libraries)
    return str(caught.value)


def test_it_is_the_language_model_too(toy: Path) -> None:
    """Decode and prefill in a context each, captured decode steps, caches that stay: the answers are the twin's."""
    limits = {"R": (1, 8), "K": (1, 1), "T": (32, 128)}
    ranges = []
    for phase in ({"B": (1, 3), "S": (1, 1)}, {"B": (1, 1), "S": (1, 8)}):
        sizes = limits | phase
        ranges.append(
            {
                name: Range(*(tuple(sizes[s][end] if isinstance(s, str) else s for s in shape) for end in (0, 1)))
                for name, (_, shape) in tiny_llm.INPUTS.items()
            }
        )
    engine = opened(toy, Module(ranges))
    assert engine.inputs["past_key_0"].shape == ("B", tiny_llm.KV, "T", tiny_llm.D)
    prompts = [[5, 7, 11] * 6, [1], list(range(40))]
    some = Sampling(max_tokens=16)
    with LLM(engine, LLMOptions(slots=3, prefill_chunk=8, max_seq_len=128)) as llm:
        handles = [llm.submit(GenerationRequest(np.array(prompt, np.int32), sampling=some)) for prompt in prompts]
        answers = [handle.result()[0] for handle in handles]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == tiny_llm.greedy(prompt, 16)
    assert engine.counts.captured >= 2 and engine.counts.launched > 5
    engine.close()


def test_engines_of_one_plan_share_it(toy: Path) -> None:
    module = Module()
    engines = [opened(toy, module) for _ in range(3)]
    assert len(module.deserialised) == 1
    engines[0].close()
    engines[1].close()
    engines.append(opened(toy, module))
    assert len(module.deserialised) == 1
    for engine in engines:
        engine.close()
    opened(toy, module).close()
    assert len(module.deserialised) == 2


@pytest.mark.parametrize(
    ("stamp", "message"),
    [
        ({"version": "10.14.1.48"}, "made by TensorRT 10.14.1.48, and 11.4.0.106 is here"),
        ({"edition": "tensorrt-rtx"}, "made by tensorrt-rtx"),
        ({"devices": ["sm100"]}, "made for sm100, and this GPU is sm90"),
        ({"size": 7}, "bytes instead of 7"),
        ({"plugin_abi": PLUGIN_ABI}, "needs the plugin library with ABI"),
    ],
)
def test_a_stamp_that_does_not_fit_is_refused_before_tensorrt_sees_the_plan(
    toy: Path, stamp: dict[str, Any], message: str
) -> None:
    module = Module()
    assert message in refuse(toy, fake_tensorrt.entry(toy, **stamp), module)
    assert not module.deserialised


def test_a_plan_that_tensorrt_refuses_is_told_with_its_first_words(tmp_path: Path) -> None:
    file = tmp_path / "model.plan"
    file.write_bytes(b"not a plan")
    message = refuse(file, fake_tensorrt.entry(file), Module())
    assert "the plan of 'toy' cannot be loaded (Serialization assertion failed. more)" in message


def test_plugins_are_loaded_once_and_their_abi_is_compared(toy: Path, tmp_path: Path) -> None:
    library = tmp_path / "libming_plugins.so"
    source = f"int ming_plugin_abi(void) {{ return {PLUGIN_ABI}; }}"
    subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-", "-o", str(library)], input=source, text=True, check=True)
    module = Module()
    found = Library(module, "tensorrt", "sm90")
    entry = fake_tensorrt.entry(toy, plugin_abi=PLUGIN_ABI)
    for _ in range(2):
        load_plan(found, toy, entry, [library]).close()
    assert module.loaded == [str(library)]
    older = fake_tensorrt.entry(toy, plugin_abi=PLUGIN_ABI + 1)
    assert "the library here is older" in refuse(toy, older, module, library)
    refused = library.rename(tmp_path / "refused.so")
    assert "does not take the plugins of" in refuse(toy, entry, module, refused)
    # a plan without plugins loads none
    load_plan(Library(module, "tensorrt", "sm90"), toy, fake_tensorrt.entry(toy), [tmp_path / "absent.so"]).close()


def test_an_engine_brings_its_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MING_TRT_PLUGINS", "/a.so:/b.so")
    engine = tmp_path / "llm"
    assert plugin_libraries(engine, tmp_path) == plugin_libraries() == (Path("/a.so"), Path("/b.so"))
    library = tmp_path / "libming_plugins.so"
    library.touch()
    (tmp_path / "plugins").mkdir()
    shutil.copy(library, tmp_path / "plugins")
    assert plugin_libraries(engine, tmp_path) == (tmp_path / "plugins" / library.name,)
    engine.mkdir()
    keep_plugins(engine, (library,))
    assert plugin_libraries(engine, tmp_path) == (engine / "plugins" / library.name,)
    monkeypatch.delenv("MING_TRT_PLUGINS")
    assert plugin_libraries() == ()


@pytest.mark.parametrize(
    ("call", "answer", "message"),
    [
        ("get_tensor_location", "HOST", "takes sizes from the values of 'input_ids'"),
        ("is_shape_inference_io", True, "takes sizes from the values of 'input_ids'"),
        ("get_tensor_dtype", "FP8", "'input_ids' of type FP8: the runtime cannot feed it"),
        ("get_tensor_format", "CHW32", "not in plain layout"),
        ("get_tensor_shape", [2, 3, 4], r"'input_ids' as [2, 3, 4] and the manifest as ['B', 'S']"),
    ],
)
def test_plans_that_the_runtime_cannot_serve_are_refused(toy: Path, call: str, answer: Any, message: str) -> None:
    module = Module()
    for members in (module.TensorLocation, module.DataType, module.TensorFormat):
        if isinstance(answer, str) and answer in members.__members__:
            answer = members[answer]
    module = Module(changes={call: lambda *_: answer}, like=module)
    assert message in refuse(toy, fake_tensorrt.entry(toy), module)


def test_a_manifest_of_another_plan_is_refused(toy: Path) -> None:
    entry = fake_tensorrt.entry(toy)
    without = {name: spec for name, spec in entry.inputs.items() if name != "features"}
    assert "differ in the inputs ('features')" in refuse(toy, replace(entry, inputs=without), Module())
    renamed = {**entry.outputs, "extra": {"dtype": "float32", "shape": [1]}}
    assert "differ in the outputs ('extra')" in refuse(toy, replace(entry, outputs=renamed), Module())
    fixed = {**entry.inputs, "features": {"dtype": "float32", "shape": ["R", 33]}}
    assert "'features' as [-1, 32] and the manifest as ['R', 33]" in refuse(toy, replace(entry, inputs=fixed), Module())


def test_bfloat16_passes_as_its_bits(toy: Path) -> None:
    module = Module()
    module = Module(changes={"get_tensor_dtype": lambda _: module.DataType["BF16"]}, like=module)
    plan = load_plan(Library(module, "tensorrt", "sm90"), toy, fake_tensorrt.entry(toy))
    assert plan.inputs["features"] == TensorSpec("features", np.dtype(np.uint16), ("R", tiny_llm.H))
    plan.close()


def test_calls_that_tensorrt_refuses_are_sentences(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "set_optimization_profile_async": (False, "does not take profile 0"),
        "set_input_shape": (False, "does not take [1, 1] for 'input_ids'"),
        "infer_shapes": (["input_ids"], "asks for more about 'input_ids'"),
        "set_tensor_address": (False, "does not take an address for"),
        "execute_async_v3": (False, "could not queue the run"),
    }
    sizes = {"B": 1, "S": 1, "K": 1, "R": 1, "T": 64}
    for call, (answer, message) in cases.items():
        engine = opened(toy, Module())
        feeds = {
            name: np.zeros([sizes[s] if isinstance(s, str) else s for s in spec.shape], spec.dtype)
            for name, spec in engine.inputs.items()
        }
        with monkeypatch.context() as patch:
            patch.setattr(fake_tensorrt.ExecutionContext, call, lambda *_, answer=answer: answer)
            with pytest.raises(EngineError) as caught:
                engine.run(feeds)
        assert message in str(caught.value)
        assert engine.run(feeds)["logits"].shape == (1, 1, tiny_llm.V)
        engine.close()


def test_without_a_gpu_plans_are_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise UnavailableError("there is no NVIDIA driver on this machine")

    monkeypatch.setattr(tensorrt, "gpu_capability", absent)
    assert unavailable("tensorrt") == unavailable("tensorrt-rtx") == "there is no NVIDIA driver on this machine"
