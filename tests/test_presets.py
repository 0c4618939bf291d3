"""Presets: shipped ones load, wrong ones are refused by name, sizes are understood."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ming_trt import presets
from ming_trt.errors import ConfigError
from ming_trt.resources import engines_dir


@pytest.mark.parametrize("name", presets.names())
def test_shipped_presets_load_and_round_trip(name: str) -> None:
    preset = presets.load(name)
    assert preset.name == name
    assert presets.from_dict(preset.as_dict(), name) == preset


def test_the_memory_of_streamed_speech_is_a_size() -> None:
    assert presets.from_dict({"flow_budget": "6GiB"}, "mine").flow_budget == 6 << 30
    assert presets.from_dict({}, "older").flow_budget == 4 << 30
    for wrong in (0, "none", True):
        with pytest.raises(ConfigError, match="flow_budget"):
            presets.from_dict({"flow_budget": wrong}, "mine")


@pytest.mark.parametrize("name", presets.names())
def test_every_precision_of_a_shipped_preset_has_thresholds_in_it(name: str) -> None:
    preset = presets.load(name)
    engines = {key: value for key, value in preset.precision.items() if key != "kv_cache"}
    assert all(precision in preset.gate or component in preset.gate for component, precision in engines.items())


def test_engines_beside_the_language_model_have_precisions_of_their_own() -> None:
    preset = presets.load("h200-fp8").with_options(precision="vocoder=fp32")
    assert preset.precision_of("vocoder") == "fp32" and preset.precision_of("llm-checkpoint") == "fp8"
    for wrong in ("fp16", "llm-checkpoint=fp32"):
        with pytest.raises(ConfigError, match="which target tensorrt-llm does not build: use bf16, fp8"):
            preset.with_options(precision=wrong)


def test_a_wheel_carries_every_preset_and_no_bundle() -> None:
    """Bundles are built below `engines`, so its files are named one by one."""
    project = tomllib.loads((engines_dir().parent / "pyproject.toml").read_text("utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    engines = {source for source in included if source.startswith("engines")}
    assert engines == {f"engines/{name}.toml" for name in presets.names()} | {"engines/official"}
    assert all(included[source] == f"ming_trt/_data/{source}" for source in engines)


def test_defaults_exist() -> None:
    assert presets.load(presets.default_name(None)).target == "onnxruntime"
    assert presets.load(presets.default_name("onnxruntime")).precision == {"default": "fp32"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("targett = 'onnxruntime'", "unknown key of preset 'p' 'targett': did you mean 'target'"),
        ("target = 'onnxruntme'", "unknown target 'onnxruntme': did you mean 'onnxruntime'"),
        ("[precision]\nllm = 'fp31'", "unknown precision of llm 'fp31'"),
        ("[precision]\nllm = 'fp8'", "precision of llm is fp8, which target onnxruntime does not build"),
        ("[profile]\nslot = 4", "did you mean 'slots'"),
        ("[profile]\nslots = 0", "profile.slots is 0: it must be a whole number of at least 1"),
        ("[profile]\nslots = true", "profile.slots is True"),
        ("[profile]\nprefill_chunk = 99999", "above profile.max_seq_len"),
        ("threads = -1", "threads is -1"),
        ("kv_budget = 'much'", "kv_budget of preset 'p' is 'much'"),
        ("profile = 3", "write it as a table"),
        ("[gate.fp32]\nmin_cosine = 0.5", "lacks max_relative, min_sqnr_db"),
        ("[gate.fp32]\nmin_cosine = 5\nmax_relative = 1\nmin_sqnr_db = 1", "within -1 and 1"),
        ("gate = {fp32 = 1}", "three thresholds"),
        ("target = ", "is not TOML"),
    ],
)
def test_refusals(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        presets.load(str(path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'cpu-fp3': did you mean 'cpu-fp32'"):
        presets.load("cpu-fp3")


def test_thresholds_by_component_then_precision(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    table = "max_relative = {}\nmin_cosine = 0.9\nmin_sqnr_db = 10\n"
    path.write_text("[gate.fp32]\n" + table.format(0.1) + "[gate.llm]\n" + table.format(0.2))
    preset = presets.load(str(path))
    assert preset.thresholds("llm").max_relative == 0.2
    assert preset.thresholds("dit").max_relative == 0.1
    assert presets.load("cpu-fp32").thresholds("llm") == presets.DEFAULT_THRESHOLDS["fp32"]


def test_options_override() -> None:
    preset = presets.load("cpu-fp32")
    assert preset.with_options(precision="llm=fp32").precision == {"default": "fp32", "llm": "fp32"}
    assert preset.with_options(target="tensorrt", precision="bf16,llm=fp8").precision == {
        "default": "bf16",
        "llm": "fp8",
    }
    with pytest.raises(ConfigError, match="does not build"):
        preset.with_options(target="tensorrt-llm")


@given(st.integers(1, 10**6), st.sampled_from([("", 1), ("KiB", 2**10), ("GiB", 2**30), ("GB", 10**9), ("m", 2**20)]))
def test_sizes(number: int, unit: tuple[str, int]) -> None:
    assert presets.parse_size(f"{number}{unit[0]}") == number * unit[1]
    assert presets.parse_size(f" {number} {unit[0]} ") == number * unit[1]


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "1XB", "nan", "1e400", True, None])
def test_bad_sizes(text: Any) -> None:
    with pytest.raises(ConfigError):
        presets.parse_size(text)
