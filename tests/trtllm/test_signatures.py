"""The list of symbols: complete for what the network uses, and checked against whatever is installed."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from ming_trt import presets
from ming_trt.errors import UnavailableError
from ming_trt.trtllm import engine, model, service, signatures
from ming_trt.trtllm import open as opening
from ming_trt.trtllm.recorder import recorder
from ming_trt.trtllm.signatures import EXECUTOR, METHODS, NETWORK, Symbol


def _used(module: ModuleType) -> set[str]:
    """Names read from `api` in a module's source."""
    tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "api"
    }


def test_only_listed_symbols_are_used_and_all_are() -> None:
    assert _used(model) | _used(engine) == set(NETWORK)
    assert _used(service) | _used(opening) == set(EXECUTOR)


def test_nothing_imports_the_library_itself() -> None:
    """All of it comes through the list."""
    for path in Path(str(model.__file__)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "tensorrt_llm"], path


def test_recorder_has_the_networks_symbols() -> None:
    assert set(vars(recorder())) == _used(model)


def test_recorder_takes_the_listed_parameters() -> None:
    """The stand-in has the parameters that the list relies on, so a call it accepts is one the list covers."""
    api = recorder()
    for name, symbol in NETWORK.items():
        value = getattr(api, name, None)
        if value is not None and symbol.parameters and name not in ("sub", "mul", "floordiv", "gt", "eq"):
            assert set(symbol.parameters) <= set(inspect.signature(value).parameters), name
    for owner, method in METHODS:
        assert owner in NETWORK, (owner, method)


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("", "is not installed"),
        ("1.1.0", "TensorRT-LLM 1.1.0 is installed and the engine needs 1.2.1"),
        ("1.3.0", "1.3.0"),
    ],
)
def test_wrong_version_is_one_sentence(monkeypatch: pytest.MonkeyPatch, version: str, sentence: str) -> None:
    monkeypatch.setattr(signatures, "installed", lambda: version)
    for call in (signatures.require, signatures.check, signatures.load):
        with pytest.raises(UnavailableError, match=sentence) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_differences_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a package whose functions take other parameters, every difference is a sentence."""

    class Stack:
        def __init__(self, config: object) -> None:
            """(config)"""

        def renormalize(self, logits: object) -> None: ...

    def where(condition: object, input: object) -> None: ...

    def everything(**values: object) -> None: ...

    module = SimpleNamespace(where=where, SharedMoE=Stack, cast=everything, Request=Stack)
    monkeypatch.setattr(signatures, "installed", lambda: "1.2.1")
    monkeypatch.setattr(importlib, "import_module", lambda _: module)
    problems = signatures.check()
    assert "tensorrt_llm.functional.where takes no 'left'" in problems
    assert "tensorrt_llm.layers.moe.SharedMoE has no forward_experts" in problems
    assert "tensorrt_llm.bindings.executor.Request takes no 'mrope_config'" in problems
    assert not [problem for problem in problems if "functional.cast" in problem]
    missing = {problem for problem in problems if "cannot be imported" in problem}
    assert len(missing) == len(NETWORK) + len(EXECUTOR) - 4


def test_the_installed_release() -> None:
    """Where 1.2.1 is installed its symbols must be as listed."""
    if signatures.installed() != signatures.VERSION:
        pytest.skip(f"TensorRT-LLM {signatures.VERSION} is not installed")
    assert signatures.check() == []


def test_symbols_name_modules_of_the_library_and_where_they_were_read() -> None:
    symbols: list[Symbol] = [*NETWORK.values(), *EXECUTOR.values()]
    assert all(symbol.module.split(".")[0] == "tensorrt_llm" for symbol in symbols)
    places = {signatures.read_at(symbol) for symbol in symbols}
    assert places == set(signatures.READ.values())


def test_engine_settings_and_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the builder is told follows from preset and checkpoint; without the library it is one sentence."""
    preset = presets.load("h100-fp8")
    config = {"max_position_embeddings": 4096, "dtype": "bfloat16", "quantization": {"quant_algo": "FP8"}}
    settings = engine.build_settings(config, preset.profile)
    assert settings["use_mrope"] and settings["max_seq_len"] == 4096
    assert settings["max_prompt_embedding_table_size"] == 2 * preset.profile.slots * 4096
    rest = {"plugin_config", "input_timing_cache", "output_timing_cache"}
    assert set(settings) | rest == set(NETWORK["BuildConfig"].parameters)
    plugins = engine.plugin_settings(config)
    assert plugins["gemm_plugin"] is None and set(plugins) == set(NETWORK["PluginConfig"].parameters)
    monkeypatch.setattr(signatures, "installed", lambda: "")
    with pytest.raises(UnavailableError, match="not installed"):
        engine.build_rank(engine.Job(str(tmp_path), str(tmp_path), 0, settings, plugins, "", ""))
