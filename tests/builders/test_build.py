"""Builds of toy checkpoints: what is rebuilt when, what is refused, what survives a kill, what the manifest says."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from builders import build as build_module
from builders import registry, unchanged
from builders.build import Options, Report, build
from ming_trt import presets
from ming_trt.bundle import FAILED, NOT_RUN, PASSED, Bundle
from ming_trt.errors import BuildError, CheckpointError, ConfigError, UnavailableError

STEPS = ["assets", "alpha", "gate:alpha", "beta", "gate:beta"]


def options(checkpoint: Path, **changes: Any) -> Options:
    bundle = checkpoint.parent / "bundle"
    return replace(Options(checkpoint, bundle, presets.load("cpu-fp32")), **changes)


def outcomes(report: Report) -> dict[str, str]:
    return {name: str(result.outcome) for name, result in report.results.items()}


def built(report: Report) -> set[str]:
    return {name for name, outcome in outcomes(report).items() if outcome == "OK"}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    }


def change_tensor(checkpoint: Path, name: str) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name] = tensors[name] + np.float32(0.5)
    save_file(tensors, checkpoint / "model.safetensors")


def test_first_build(checkpoint: Path) -> None:
    report = build(options(checkpoint))
    assert list(report.results) == STEPS and built(report) == set(STEPS)
    assert report.ok and report.verdict == PASSED and report.peak_bytes > 0
    bundle = Bundle.open(report.bundle)
    assert bundle.check() == []
    assert sorted(path.name for path in report.bundle.iterdir() if path.name[0] != ".") == [
        "alpha",
        "assets",
        "beta",
        "manifest.json",
    ]
    entry = bundle.component("alpha")
    assert entry.rung == "matches" and entry.facts == {"hidden_size": 4, "opset": 23}
    assert entry.gate["outputs"][0]["compared"] == 12
    assert list(bundle.manifest.checkpoint) == ["model.safetensors"]


def test_nothing_changed(checkpoint: Path) -> None:
    build(options(checkpoint))
    journal = (checkpoint.parent / "bundle" / ".journal").read_bytes()
    report = build(options(checkpoint))
    assert set(outcomes(report).values()) == {"NOOP"} and report.ok
    assert (checkpoint.parent / "bundle" / ".journal").read_bytes() == journal


def test_a_build_without_changes_needs_nothing_heavy(checkpoint: Path) -> None:
    """Importing torch takes seconds; deciding that nothing changed must not."""
    build(options(checkpoint))
    heavy = ("torch", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "tensorrt_rtx")
    bundle, here = checkpoint.parent / "bundle", Path(__file__).parent
    code = f"""
import sys
from pathlib import Path
from builders import registry, unchanged
sys.path.insert(0, {str(here)!r})
registry.COMPONENTS = {dict(registry.COMPONENTS)!r}
from builders.build import Options, build
from ming_trt import presets
report = build(Options(Path({str(checkpoint)!r}), Path({str(bundle)!r}), presets.load("cpu-fp32")))
assert {{str(result.outcome) for result in report.results.values()}} == {{"NOOP"}}, report
print([name for name in {heavy!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_touched_but_equal(checkpoint: Path) -> None:
    build(options(checkpoint))
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    assert set(outcomes(build(options(checkpoint))).values()) == {"NOOP"}


@pytest.mark.parametrize("name", ["alpha.first.weight", "alpha.second.bias", "beta.first.bias"])
def test_one_tensor_rebuilds_its_engine(checkpoint: Path, name: str) -> None:
    build(options(checkpoint))
    change_tensor(checkpoint, name)
    engine = name.split(".")[0]
    assert built(build(options(checkpoint))) == {engine, f"gate:{engine}"}
    build(options(checkpoint, bundle=checkpoint.parent / "fresh"))
    assert contents(checkpoint.parent / "bundle") == contents(checkpoint.parent / "fresh")


def test_asset_rebuilds_assets_only(checkpoint: Path) -> None:
    build(options(checkpoint))
    (checkpoint / "tokenizer.json").write_text('{"added_tokens": []}')
    report = build(options(checkpoint))
    assert built(report) == {"assets"}
    assert (report.bundle / "assets" / "tokenizer.json").exists()


def test_threshold_rebuilds_gates_only(checkpoint: Path) -> None:
    build(options(checkpoint))
    strict = replace(presets.load("cpu-fp32"), gate={"beta": presets.Thresholds(1e-3, 0.9, 50)})
    assert built(build(options(checkpoint, preset=strict))) == {"gate:beta"}


def change_tool(monkeypatch: pytest.MonkeyPatch, tool: str, version: str = "99") -> None:
    """Makes the builder believe that another version of `tool` is installed."""
    before = build_module.tool_versions
    for module in (build_module, unchanged):
        monkeypatch.setattr(
            module, "tool_versions", lambda names: before(names) | ({tool: version} if tool in names else {})
        )


@pytest.mark.parametrize(("tool", "expected"), [("onnxruntime", {"gate:alpha", "gate:beta"}), ("onnx", set(STEPS[1:]))])
def test_tool_version_rebuilds_its_users(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tool: str, expected: set[str]
) -> None:
    build(options(checkpoint))
    change_tool(monkeypatch, tool)
    assert built(build(options(checkpoint))) == expected


def test_component_that_is_absent(checkpoint: Path) -> None:
    import toy_components

    toy_components.write_checkpoint(checkpoint, checkpoint / "config.json", ("alpha",))
    report = build(options(checkpoint))
    assert outcomes(report)["beta"] == "SKIPPED"
    assert report.results["beta"].reason == "the checkpoint has no beta"
    assert report.ok and not Bundle.open(report.bundle).has("beta")


def test_component_that_vanishes_is_removed(checkpoint: Path) -> None:
    import toy_components

    build(options(checkpoint))
    toy_components.write_checkpoint(checkpoint, checkpoint / "config.json", ("alpha",), seed=0)
    report = build(options(checkpoint))
    assert not (report.bundle / "beta").exists()
    assert Bundle.open(report.bundle).check() == []


def test_checkpoint_without_any_component(checkpoint: Path) -> None:
    save_file({"other": np.zeros(2, np.float32)}, checkpoint / "model.safetensors")
    with pytest.raises(BuildError, match=r"holds no component that can be built \(the checkpoint has no alpha\)"):
        build(options(checkpoint))


def test_only(checkpoint: Path) -> None:
    report = build(options(checkpoint, only=("beta",)))
    assert built(report) == {"assets", "beta", "gate:beta"}
    assert report.results["alpha"].reason == "not selected"
    assert built(build(options(checkpoint))) == {"alpha", "gate:alpha"}


def test_only_leaves_a_stale_engine_out_of_the_manifest(checkpoint: Path) -> None:
    build(options(checkpoint))
    change_tensor(checkpoint, "alpha.first.bias")
    report = build(options(checkpoint, only=("beta",)))
    assert report.results["alpha"].reason == "not selected, and what is there was made from other inputs"
    bundle = Bundle.open(report.bundle)
    assert not bundle.has("alpha") and bundle.has("beta") and bundle.check() == []


@pytest.mark.parametrize("fault", ["transpose first", "nan second"])
def test_gate_fails_and_the_manifest_says_so(checkpoint: Path, fault: str) -> None:
    import toy_components

    toy_components.BETA.fault = fault
    report = build(options(checkpoint))
    assert not report.ok and report.verdict == FAILED
    manifest = Bundle.open(report.bundle).manifest
    assert manifest.components["alpha"].verdict == PASSED and manifest.components["beta"].verdict == FAILED
    assert manifest.components["beta"].rung == "ran"
    # nothing changed, so it fails again without a rebuild
    again = build(options(checkpoint))
    assert not again.ok and built(again) == set()


def test_memory_limit_is_kept(checkpoint: Path) -> None:
    report = build(options(checkpoint, max_host_memory=1 << 40))
    assert report.verdict == PASSED
    with pytest.raises(BuildError, match=r"building alpha took \d+ MiB of memory, above --max-host-memory 0 MiB"):
        build(options(checkpoint, max_host_memory=100, bundle=checkpoint.parent / "other"))


def test_gate_that_cannot_run(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from builders import verify

    monkeypatch.setattr(verify, "available_memory", lambda: 10)
    report = build(options(checkpoint))
    assert report.verdict == NOT_RUN and report.ok
    entry = Bundle.open(report.bundle).component("alpha")
    assert entry.rung == "compiled" and "the torch definition needs" in entry.gate["reason"]


def test_failed_export_then_continue(checkpoint: Path) -> None:
    import toy_components

    toy_components.BETA.fault = "crash"
    with pytest.raises(BuildError, match=r"build step beta failed \(RuntimeError: the exporter fell over\)"):
        build(options(checkpoint))
    assert not (checkpoint.parent / "bundle" / "manifest.json").exists()
    toy_components.BETA.fault = ""
    assert built(build(options(checkpoint))) == {"beta", "gate:beta"}


def _set(**changes: Any) -> Callable[[Options], Options]:
    return lambda chosen: replace(chosen, **changes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_set(only=("alhpa",)), BuildError, "there is no component 'alhpa': did you mean 'alpha'"),
        (_set(only=("zzz",)), BuildError, "choose from alpha, beta"),
        (_set(checkpoint=Path("/nowhere")), BuildError, "there is no checkpoint folder"),
        (_set(calibration=Path("/nowhere")), BuildError, "there is no calibration folder"),
        (_set(calibration=Path("/")), BuildError, "calibration is for fp8"),
        (_set(tensor_parallel=2), BuildError, "need target tensorrt-llm"),
        (
            lambda o: replace(o, preset=o.preset.with_options(target="tensorrt")),
            UnavailableError,
            "target tensorrt needs TensorRT, which is not installed",
        ),
        (
            lambda o: replace(o, preset=o.preset.with_options(precision="alpha=fp32,gamma=fp32")),
            BuildError,
            "there is no component 'gamma'",
        ),
    ],
)
def test_options_are_checked_before_anything_is_written(
    checkpoint: Path, change: Callable[[Options], Options], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        build(change(options(checkpoint)))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (checkpoint.parent / "bundle").exists()


@pytest.mark.parametrize("harm", ["config", "cut", "shape", "absent"])
def test_bad_checkpoints(checkpoint: Path, harm: str) -> None:
    shard = checkpoint / "model.safetensors"
    if harm == "config":
        (checkpoint / "config.json").write_text("{")
    elif harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-4])
    else:
        tensors = load_file(shard)
        if harm == "shape":
            tensors["beta.second.bias"] = np.zeros(7, np.float32)
        else:
            del tensors["beta.second.bias"]
        save_file(tensors, shard)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        build(options(checkpoint))
    assert "\n" not in str(caught.value)
    assert not (checkpoint.parent / "bundle" / "manifest.json").exists()


def _killed(chosen: Options, death: int) -> int:
    """Builds in a child that dies at the hook call numbered `death` (0 = never); returns its number of calls."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        calls = 0

        def hook(_: str) -> None:
            nonlocal calls
            calls += 1
            if calls == death:
                os._exit(137)

        status = 1
        try:
            build(chosen, hook=hook)
            os.write(writing, str(calls).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (137 if death else 0)
    return int(text or 0)


def test_kill_at_every_change_of_a_build(checkpoint: Path) -> None:
    """Dies at every change on disk in turn; the same build again ends byte-identical, manifest included."""
    parent = checkpoint.parent
    points = _killed(options(checkpoint, bundle=parent / "reference"), 0)
    expected = contents(parent / "reference")
    assert points > 25 and "manifest.json" in expected
    for death in range(1, points + 1):
        chosen = options(checkpoint, bundle=parent / f"at{death}")
        _killed(chosen, death)
        _killed(chosen, 0)
        assert contents(chosen.bundle) == expected, f"killed at point {death}"


class Edit:
    """One change to what a build depends on, and the steps that it must make again."""

    TENSORS = ("alpha.first.weight", "alpha.second.bias", "beta.first.bias", "beta.second.weight")

    def __init__(self, kind: str, which: int, amount: int) -> None:
        self.kind, self.which, self.amount = kind, which, amount

    def __repr__(self) -> str:
        return f"{self.kind} {self.which} by {self.amount}"

    def apply(self, state: dict[str, Any]) -> None:
        """Changes `state`: `tensors`, `assets` and `thresholds` by name, `tools` by name."""
        names = {
            "tensor": self.TENSORS,
            "asset": ("tokenizer.json", "generation_config.json"),
            "threshold": ("alpha", "beta"),
            "tool": ("onnxruntime", "onnx", "torch"),
        }[self.kind]
        state[self.kind][names[self.which % len(names)]] = self.amount


def dependants(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The steps that depend on something that differs."""
    steps: set[str] = set()
    for kind in after:
        for name in {*before[kind], *after[kind]}:
            unchanged_value = 0 if kind == "tensor" else None
            if before[kind].get(name, unchanged_value) == after[kind].get(name, unchanged_value):
                continue
            if kind == "tensor":
                engine = name.split(".")[0]
                steps |= {engine, f"gate:{engine}"}
            elif kind == "asset":
                steps.add("assets")
            elif kind == "threshold":
                steps.add(f"gate:{name}")
            else:
                # what an export is made with changes the gates that need it as well
                steps |= {"gate:alpha", "gate:beta"} | ({"alpha", "beta"} if name != "onnxruntime" else set())
    return steps


edits = st.builds(Edit, st.sampled_from(["tensor", "asset", "threshold", "tool"]), st.integers(0, 3), st.integers(0, 2))


@given(st.lists(st.lists(edits, min_size=1, max_size=3), min_size=1, max_size=3))
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_edits_rebuild_exactly_what_depends_on_them(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, changes: list[list[Edit]]
) -> None:
    """Tensors, files, options and tool versions; also changes that are taken back before the next build."""
    folder = tmp_path_factory.mktemp("edits")
    original = load_file(checkpoint / "model.safetensors")
    state: dict[str, Any] = {"tensor": {}, "asset": {}, "threshold": {}, "tool": {}}
    built_of: dict[str, Any] | None = None
    for group in [[], *changes]:
        for edit in group:
            edit.apply(state)
        source = folder / "checkpoint"
        shutil.copytree(checkpoint, source, dirs_exist_ok=True)
        tensors = {name: value + np.float32(state["tensor"].get(name, 0)) for name, value in original.items()}
        save_file(tensors, source / "model.safetensors")
        for name, amount in state["asset"].items():
            (source / name).write_text(f'{{"version": {amount}}}')
        gate = {n: presets.Thresholds(1e-3, 0.9, 50 + amount) for n, amount in state["threshold"].items()}
        preset = replace(presets.load("cpu-fp32"), gate=gate)
        with pytest.MonkeyPatch.context() as patch:
            for tool, version in state["tool"].items():
                change_tool(patch, tool, str(version))
            report = build(Options(source, folder / "bundle", preset))
            expected = set(STEPS) if built_of is None else dependants(built_of, state)
            assert built(report) == expected
            fresh = build(Options(source, folder / "fresh", preset))
        assert contents(folder / "bundle") == contents(fresh.bundle)
        shutil.rmtree(fresh.bundle)
        built_of = copy.deepcopy(state)
