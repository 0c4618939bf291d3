"""Reads a folder of reference cases (`cases.json`, `cases.npz`) and compares values with it.

An output may be stored whole (`NAME`) or trimmed to a sample of its elements (`NAME@index`, flat int32 indices, and
`NAME@value`); the shape of the whole array stands in `cases.json` either way and is always compared.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ming_trt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Comparison:
    """One array against its reference, over the elements compared; `tolerance` is absolute (0 = exact)."""

    name: str
    compared: int
    max_abs: float
    max_rel: float
    tolerance: float
    passed: bool
    note: str = ""


class Cases:
    """A folder of cases. Raises `ConfigError` where the folder is not one."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.index: dict[str, Any] = {}
        path = self.folder / "cases.json"
        try:
            self.index = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"no cases.json in '{folder}': give the folder that holds cases.json and cases.npz"
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"'{path}' is not JSON ({error}): copy the folder again") from None
        if not isinstance(self.index, dict) or not isinstance(self.index.get("arrays"), dict):
            raise ConfigError(f"'{path}' has no object 'arrays': give the folder of a set of reference cases")

    @cached_property
    def _npz(self) -> Any:
        path = self.folder / "cases.npz"
        if not path.exists():
            raise ConfigError(f"no cases.npz in '{self.folder}': copy the folder again")
        try:
            return np.load(path)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ConfigError(f"'{path}' cannot be read ({error}): copy the folder again") from None

    @property
    def arrays(self) -> dict[str, dict[str, Any]]:
        """What `cases.json` says of each array: shape, dtype, role, tolerance."""
        arrays: dict[str, dict[str, Any]] = self.index["arrays"]
        return arrays

    def __contains__(self, name: str) -> bool:
        return name in self._npz.files or f"{name}@value" in self._npz.files

    def array(self, name: str) -> npt.NDArray[Any]:
        """The whole stored array. Raises `ConfigError` if it is absent or trimmed to a sample."""
        if name not in self._npz.files:
            state = "is stored as a sample only" if name in self else "is not there"
            raise ConfigError(f"array '{name}' {state} in '{self.folder}': use the untrimmed cases")
        values: npt.NDArray[Any] = self._npz[name]
        return values

    def tolerance(self, name: str) -> float:
        """Absolute tolerance in float32, as the cases state it; 0 where they say exact."""
        entry = self.arrays[name]
        if entry.get("exact"):
            return 0.0
        return float(entry["suggested_atol_float32" if "suggested_atol_float32" in entry else "suggested_atol"])

    def compare(self, name: str, got: npt.ArrayLike, tolerance: float | None = None) -> Comparison:
        """Compares `got` with the stored output; a different shape or a value that is not finite fails."""
        values = np.asarray(got)
        limit = self.tolerance(name) if tolerance is None else tolerance
        shape = tuple(self.arrays[name]["shape"])
        if values.shape != shape:
            return Comparison(name, 0, np.inf, np.inf, limit, False, f"shape {values.shape}, expected {shape}")
        if f"{name}@value" in self._npz.files:
            values = values.reshape(-1)[self._npz[f"{name}@index"]]
            expected = self._npz[f"{name}@value"]
        else:
            expected = self.array(name)
        if values.size == 0:
            return Comparison(name, 0, 0.0, 0.0, limit, True, "empty")
        a, b = values.astype(np.float64), expected.astype(np.float64)
        if not np.isfinite(a).all():
            return Comparison(name, a.size, np.inf, np.inf, limit, False, "not finite")
        difference = np.abs(a - b)
        relative = float((difference / np.maximum(np.abs(b), 1e-6)).max())
        worst = float(difference.max())
        return Comparison(name, int(a.size), worst, relative, limit, worst <= limit)

    def check(self, name: str, got: npt.ArrayLike, tolerance: float | None = None) -> None:
        """For tests: raises `AssertionError` with the numbers unless `compare` passes."""
        result = self.compare(name, got, tolerance)
        if not result.passed:
            over = f"{result.max_abs:.3g} > {result.tolerance:.3g} over {result.compared} elements"
            raise AssertionError(f"{name}: max abs {over} {result.note}")
