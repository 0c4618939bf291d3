"""The gate's comparison, the audit of a bundle, and the place of a planted fault."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from builders.audit import audit, report_document
from builders.audit_html import page, write_report
from builders.build import Options, build
from builders.verify import compare, compare_all
from ming_trt import presets
from ming_trt.bundle import FAILED, NOT_RUN, PASSED, Bundle
from ming_trt.errors import BuildError, BundleError, EngineError
from ming_trt.presets import DEFAULT_THRESHOLDS

FP32 = DEFAULT_THRESHOLDS["fp32"]


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_equal_arrays_pass() -> None:
    report = compare("y", array(1, -2, 3), array(1, -2, 3), FP32)
    assert (report.verdict, report.compared, report.max_abs, report.sqnr_db) == (PASSED, 3, 0.0, 300.0)


def test_zero_reference() -> None:
    assert compare("y", array(0, 0), array(0, 0), FP32).verdict == PASSED
    assert compare("y", array(0, 1e-3), array(0, 0), FP32).verdict == FAILED


@pytest.mark.parametrize(
    ("got", "expected", "note"),
    [
        (array(), array(), "nothing to compare"),
        (array(1, 2), array(1, 2, 3), "shape [2], expected [3]"),
        (array(1, np.nan), array(1, 2), "1 of 2 values are not finite"),
        (array(1, np.inf), array(1, 2), "1 of 2 values are not finite"),
        (array(1, 2), array(1, np.nan), "the reference is not finite"),
        (array(1, 2.1), array(1, 2), "relative error 0.05 above 0.0002"),
        (array(-1, -2), array(1, 2), "cosine -1 below 0.999999"),
    ],
)
def test_what_fails(got: np.ndarray, expected: np.ndarray, note: str) -> None:
    report = compare("y", got, expected, FP32)
    assert report.verdict == FAILED and note in report.note
    json.dumps(report.max_abs, allow_nan=False)


def test_numbers() -> None:
    # error 0.1 on a signal of power 5: 10 log10(5 / 0.01)
    report = compare("y", array(1, 2.1), array(1, 2), FP32)
    assert report.max_abs == pytest.approx(0.1, rel=1e-5)
    assert report.relative == pytest.approx(0.05, rel=1e-5)
    assert report.sqnr_db == pytest.approx(26.99, abs=0.01)
    assert report.cosine == pytest.approx((1 + 4.2) / np.sqrt(5 * 5.41), rel=1e-6)


@given(st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_scale_does_not_matter(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(50)
    b = a + 1e-3 * rng.standard_normal(50)
    first, second = compare("y", b, a, FP32), compare("y", b * scale, a * scale, FP32)
    assert first.relative == pytest.approx(second.relative, rel=1e-9)
    assert first.sqnr_db == pytest.approx(second.sqnr_db, abs=1e-6)


def test_nothing_compared_is_a_failure() -> None:
    assert compare_all({"y": array(1)}, {}, FP32).verdict == FAILED
    report = compare_all({}, {"y": array(1)}, FP32)
    assert report.verdict == FAILED and report.outputs[0].note == "the engine has no such output"


@pytest.fixture
def bundle(checkpoint: Path) -> Bundle:
    build(Options(checkpoint, checkpoint.parent / "bundle", presets.load("cpu-fp32")))
    return Bundle.open(checkpoint.parent / "bundle")


def test_audit_passes(bundle: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    audits = audit(bundle, checkpoint, layers=True, determinism=True)
    assert [found.name for found in audits] == ["alpha", "beta"]
    for found in audits:
        assert found.gate.verdict == PASSED and found.first_divergence == "" and found.note == ""
        assert [layer.name for layer in found.layers] == ["/first", "/second"]
        assert [layer.node for layer in found.layers] == ["/first/Add", "/second/Add"]
        assert len(found.repetitions) == 4 and found.repetitions[0].equal
    document = report_document(audits)
    write_report(document, tmp_path / "report")
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == json.loads(json.dumps(document))
    assert "All modules match." in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("part", ["first", "second"])
def test_planted_fault_is_named(checkpoint: Path, part: str) -> None:
    import toy_components

    toy_components.BETA.fault = f"transpose {part}"
    build(Options(checkpoint, checkpoint.parent / "bundle", presets.load("cpu-fp32")))
    alpha, beta = audit(Bundle.open(checkpoint.parent / "bundle"), checkpoint, layers=True)
    assert alpha.gate.verdict == PASSED and alpha.first_divergence == ""
    assert beta.gate.verdict == FAILED and beta.first_divergence == f"/{part}"
    shown = page(report_document([alpha, beta]))
    assert f"First divergence: /{part}" in shown
    # one plot for each engine; red dots are the modules that differ
    wrong = sum(layer.verdict != PASSED for layer in beta.layers)
    assert shown.count("<svg ") == 2 and shown.count("fill='#b00020'") == wrong > 0
    assert shown.count("<circle ") == len(alpha.layers) + len(beta.layers)


def test_bundle_of_other_weights(bundle: Bundle, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["beta.second.bias"] = tensors["beta.second.bias"] + np.float32(1)
    save_file(tensors, checkpoint / "model.safetensors")
    alpha, beta = audit(bundle, checkpoint, layers=True)
    assert alpha.gate.verdict == PASSED and alpha.note == ""
    assert beta.first_divergence == "/second"
    assert beta.note == "the engine was built from other weights than those in model.safetensors"


def test_audit_refusals(bundle: Bundle, checkpoint: Path) -> None:
    with pytest.raises(BuildError, match="there is no component 'gamma'"):
        audit(bundle, checkpoint, ("gamma",))
    save_file({"other": np.zeros(2, np.float32)}, checkpoint / "model.safetensors")
    with pytest.raises(BundleError, match="alpha cannot be compared, since the checkpoint has no alpha"):
        audit(bundle, checkpoint)


def test_definition_that_does_not_fit_is_not_a_pass(bundle: Bundle, checkpoint: Path) -> None:
    found = audit(bundle, checkpoint, ("alpha",), memory_limit=10)[0]
    assert found.gate.verdict == NOT_RUN and "the torch definition needs" in found.gate.reason


def test_layers_need_canonical_names(bundle: Bundle, checkpoint: Path) -> None:
    import onnx

    model = onnx.load(bundle.model_path("alpha"))
    for node in model.graph.node:
        node.name = f"node_{node.name.replace('/', '_')}"
    onnx.save(model, bundle.model_path("alpha"))
    with pytest.raises(EngineError, match=r"no node of .* has the name of a module of alpha"):
        audit(bundle, checkpoint, ("alpha",), layers=True)
