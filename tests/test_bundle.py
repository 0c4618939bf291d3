"""Bundle and manifest: what is read back, what is refused, what `check` finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ming_trt import presets
from ming_trt.bundle import (
    FAILED,
    MISSING,
    NOT_RUN,
    PASSED,
    Bundle,
    ComponentEntry,
    FileEntry,
    Manifest,
    StepEntry,
    differences,
    sha256,
    write_atomically,
)
from ming_trt.errors import BundleError


def component(name: str, verdict: str = PASSED, **changes: Any) -> ComponentEntry:
    entry = ComponentEntry(
        name,
        "onnxruntime",
        "fp32",
        f"{name}/model.onnx",
        {"x": {"dtype": "float", "shape": ["N", 4]}},
        {"y": {"dtype": "float", "shape": ["N", 2]}},
        {"hidden_size": 4},
        {"verdict": verdict, "outputs": [{"name": "y", "relative": 1e-7, "sqnr_db": 120.0}]},
        "matches",
    )
    return replace(entry, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bundle = tmp_path / "bundle"
    files = {"alpha/model.onnx": b"graph", "alpha/model.onnx.data": bytes(range(256)), "assets/config.json": b"{}"}
    entries = {}
    for name, data in files.items():
        path = bundle / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        entries[name] = FileEntry(sha256(path), len(data))
    steps = {
        "assets": StepEntry("OK", "k0", "", {n: e for n, e in entries.items() if n.startswith("assets")}),
        "alpha": StepEntry("OK", "k1", "", {n: e for n, e in entries.items() if n.startswith("alpha")}),
        "beta": StepEntry("SKIPPED", "", "the checkpoint has no beta"),
    }
    preset = presets.load("cpu-fp32")
    shards = {"model.safetensors": {"sha256": "00", "size": 1, "tensors": 1}}
    components = {"alpha": component("alpha")}
    manifest = Manifest({"name": "toy"}, "onnxruntime", preset, shards, {"numpy": "1"}, steps, components)
    write_atomically(bundle / "manifest.json", manifest.to_json())
    return bundle


def edit(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_round_trip(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.manifest.to_json() == (folder / "manifest.json").read_text()
    assert bundle.component("alpha") == component("alpha")
    assert bundle.model_path("alpha") == folder / "alpha" / "model.onnx"
    assert bundle.preset == presets.load("cpu-fp32")
    assert bundle.check() == []


def test_moved_bundle_opens(folder: Path) -> None:
    moved = folder.rename(folder.with_name("elsewhere"))
    assert Bundle.open(moved).check() == []


@pytest.mark.parametrize("name", ["alpha/model.onnx", "alpha/model.onnx.data", "assets/config.json"])
def test_one_flipped_bit_is_found(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    assert Bundle.open(folder).check() == [f"'{name}' does not have the digest that the manifest states"]


def test_every_flipped_bit_of_the_manifest_is_found(folder: Path) -> None:
    """What is read from it decides what is loaded: also a change that leaves valid JSON is damage."""
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(BundleError):
            Bundle.open(folder).require_intact()
    path.write_bytes(whole)
    Bundle.open(folder).require_intact()


@pytest.mark.parametrize(
    "change", [lambda text: text.rstrip(), lambda text: text + "\n", lambda text: text.replace("toy", "toj")]
)
def test_edited_manifest_is_no_longer_sealed(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "manifest.json"
    path.write_text(change(path.read_text()))
    assert Bundle.open(folder).check() == ["'manifest.json' does not have the digest that it states"]


def test_stranger_is_found(folder: Path) -> None:
    (folder / "alpha" / "extra").write_text("x")
    (folder / ".journal").write_text("the builder's own")
    (folder / "beta").mkdir()
    (folder / "beta" / "old").write_text("left aside by the build, which says so")
    assert Bundle.open(folder).check() == ["'alpha/extra' is not in the manifest"]


def test_missing_and_cut_files(folder: Path) -> None:
    (folder / "alpha" / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(BundleError, match=r"'alpha/model.onnx.data' has 5 bytes instead of 256; build it again"):
        Bundle.open(folder)
    (folder / "alpha" / "model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"'alpha/model.onnx.data' is missing"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: shutil.rmtree(f), "no bundle at"),
        (lambda f: (f / "manifest.json").unlink(), "its build did not finish"),
        (lambda f: (f / "manifest.json").write_text("{"), "is damaged"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "has schema None"),
        (lambda f: edit(f, schema=99), "has schema 99, and this ming-trt reads up to 1: update"),
        (lambda f: edit(f, schema=0), "has schema 0"),
        (lambda f: edit(f, steps=7), "is damaged"),
        (lambda f: edit(f, components={"a": {"what": 1}}), "is damaged"),
        (lambda f: edit(f, preset={"name": "x", "target": "abacus"}), "is damaged"),
    ],
)
def test_refusals_are_one_sentence(folder: Path, harm: Any, message: str) -> None:
    harm(folder)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(folder)
    assert "\n" not in str(caught.value)


def test_absent_component_says_why(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert not bundle.has("beta")
    with pytest.raises(BundleError, match="skipped: the checkpoint has no beta"):
        bundle.component("beta")
    with pytest.raises(BundleError, match="it has alpha"):
        bundle.component("gamma")


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], MISSING),
        ([PASSED, PASSED], PASSED),
        ([PASSED, NOT_RUN], NOT_RUN),
        ([MISSING, NOT_RUN], MISSING),
        ([PASSED, NOT_RUN, FAILED, MISSING], FAILED),
    ],
)
def test_gate_is_the_worst_verdict(folder: Path, verdicts: list[str], expected: str) -> None:
    manifest = Bundle.open(folder).manifest
    entries = {f"c{i}": component(f"c{i}", verdict) for i, verdict in enumerate(verdicts)}
    assert replace(manifest, components=entries).gate == expected


def test_differences(folder: Path) -> None:
    first = Bundle.open(folder).manifest
    assert differences(first, first) == []
    second = replace(first, components={"alpha": component("alpha", precision="int8")}, versions={})
    assert differences(first, second) == [
        ("precision › alpha", "fp32", "int8"),
        ("versions › numpy", "1", ""),
        ("components › alpha › precision", "fp32", "int8"),
        ("versions", "", "{}"),
    ]


def test_atomic_write_leaves_no_remains(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(target, "\ud800")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
