"""Plans that cannot be loaded are refused from their stamps, before TensorRT sees a byte."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from ming_trt.bundle import sha256
from ming_trt.errors import EngineError, UnavailableError
from ming_trt.runtime.plan import PLUGIN_ABI, Host, Stamp, check_plan, gpu_capability, plugin_abi

HERE = Host("tensorrt", "11.4.0.106", "sm90", PLUGIN_ABI)


@pytest.fixture
def plan(tmp_path: Path) -> tuple[Path, Stamp]:
    file = tmp_path / "model.plan"
    file.write_bytes(b"not really a plan" * 100)
    return file, Stamp("tensorrt", "11.4.0.106", ("sm90",), PLUGIN_ABI, sha256(file), file.stat().st_size)


def test_a_fitting_plan_passes(plan: tuple[Path, Stamp]) -> None:
    check_plan("llm", plan[1], plan[0], HERE, digest=True)


@pytest.mark.parametrize(
    ("stamp", "host", "words"),
    [
        ({"version": "10.14.1.48"}, {}, ["10.14.1.48", "11.4.0.106", "build the bundle again"]),
        ({"edition": "tensorrt-rtx", "version": "1.7.1.116"}, {}, ["tensorrt-rtx 1.7.1.116", "build the bundle again"]),
        ({"devices": ("sm80", "sm89")}, {}, ["sm80, sm89", "this GPU is sm90", "build the bundle again"]),
        ({}, {"plugin_abi": 0}, [f"ABI {PLUGIN_ABI}", "none is loaded", "MING_TRT_PLUGINS"]),
        ({"plugin_abi": PLUGIN_ABI + 1}, {}, ["older", f"ABI {PLUGIN_ABI}:"]),
        ({}, {"plugin_abi": PLUGIN_ABI + 1}, ["newer"]),
        ({"size": 99999}, {}, ["1700 bytes instead of 99999", "copy the bundle"]),
        ({"sha256": "0" * 64}, {}, ["digest"]),
    ],
)
def test_others_are_refused_with_a_remedy(
    plan: tuple[Path, Stamp], stamp: dict[str, object], host: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(EngineError) as caught:
        check_plan("llm", replace(plan[1], **stamp), plan[0], replace(HERE, **host), digest=True)
    assert all(word in str(caught.value) for word in ["'llm'", *words]), str(caught.value)


def test_a_cut_or_missing_file_is_refused_without_reading_it(plan: tuple[Path, Stamp]) -> None:
    file, stamp = plan
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(EngineError, match="1699 bytes instead of 1700"):
        check_plan("llm", stamp, file, HERE)
    file.unlink()
    with pytest.raises(EngineError, match="has no file"):
        check_plan("llm", stamp, file, HERE)


def test_a_plan_without_plugins_needs_no_library(plan: tuple[Path, Stamp]) -> None:
    check_plan("llm", replace(plan[1], plugin_abi=0), plan[0], replace(HERE, plugin_abi=0))


@pytest.mark.parametrize("facts", [{}, {"plan": 3}, {"plan": {"stamp": {"version": "11.4"}}}])
def test_a_manifest_without_a_whole_stamp_is_refused(facts: dict[str, object]) -> None:
    with pytest.raises(EngineError, match="no stamp"):
        Stamp.from_facts(facts, "llm")


def test_a_stamp_survives_the_manifest(plan: tuple[Path, Stamp]) -> None:
    assert Stamp.from_facts({"plan": {"stamp": {**plan[1].as_dict(), "devices": ["sm90"]}}}, "llm") == plan[1]


def test_plugin_libraries_state_their_abi(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")

    def library(name: str, source: str) -> Path:
        path = tmp_path / name
        subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)], input=source, text=True, check=True)
        return path

    assert plugin_abi(library("good.so", "int ming_plugin_abi(void) { return 7; }")) == 7
    with pytest.raises(EngineError, match="exports no ming_plugin_abi"):
        plugin_abi(library("other.so", "int other(void) { return 1; }"))
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF")
    with pytest.raises(EngineError, match="cannot be loaded"):
        plugin_abi(broken)
    with pytest.raises(EngineError, match="no plugin library"):
        plugin_abi(tmp_path / "missing.so")


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ming_trt.runtime.plan.ctypes.CDLL", absent)
    with pytest.raises(UnavailableError, match="no NVIDIA driver"):
        gpu_capability()
