"""Comparing with references: exactness, samples, shapes, and that nothing passes by accident."""

import json
from pathlib import Path

import numpy as np
import pytest

from ming_trt.errors import ConfigError
from ming_trt.golden.cases import Cases


@pytest.fixture
def cases(tmp_path: Path) -> Cases:
    full = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.savez(
        tmp_path / "cases.npz",
        whole=full,
        ids=np.array([1, 2]),
        **{"part@index": np.array([0, 11], np.int32), "part@value": full.reshape(-1)[[0, 11]]},
    )
    entry = {"shape": [3, 4], "suggested_atol": 1e-3}
    arrays = {"whole": entry, "part": entry, "ids": {"shape": [2], "exact": True}}
    (tmp_path / "cases.json").write_text(json.dumps({"arrays": arrays}))
    return Cases(tmp_path)


def test_within_tolerance(cases: Cases) -> None:
    result = cases.compare("whole", cases.array("whole") + 5e-4)
    assert result.passed and result.compared == 12 and 4e-4 < result.max_abs < 6e-4


def test_a_sample_is_compared_at_its_places(cases: Cases) -> None:
    values = np.zeros((3, 4), np.float32)
    values[2, 3] = 11
    assert cases.compare("part", values).passed
    values[2, 3] = 10
    assert not cases.compare("part", values).passed
    with pytest.raises(ConfigError, match="sample"):
        cases.array("part")


@pytest.mark.parametrize("bad", [np.zeros((4, 3)), np.full((3, 4), np.nan), np.zeros(())])
def test_wrong_shape_and_nan_fail(cases: Cases, bad: np.ndarray) -> None:
    assert not cases.compare("whole", bad).passed
    assert not cases.compare("part", bad).passed


def test_exact_means_exact(cases: Cases) -> None:
    cases.check("ids", [1, 2])
    with pytest.raises(AssertionError, match="ids"):
        cases.check("ids", [1, 3])


def test_a_folder_without_cases(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cases\.json"):
        Cases(tmp_path)


def test_a_damaged_folder(cases: Cases) -> None:
    (cases.folder / "cases.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ConfigError, match=r"cases\.npz' cannot be read"):
        Cases(cases.folder).array("whole")
    (cases.folder / "cases.json").write_text("[]")
    with pytest.raises(ConfigError, match="no object 'arrays'"):
        Cases(cases.folder)
