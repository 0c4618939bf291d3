"""The machine: what it is, how fast it reads memory and multiplies matrices, which bounds every figure."""

from __future__ import annotations

import ctypes
import importlib.metadata as metadata
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

_PACKAGES = ("ming-trt", "numpy", "onnxruntime", "torch", "tritonclient", "nvidia-pytriton", "tensorrt")
# Larger than the last-level caches of server processors, small enough for a laptop.
_READ_BYTES = 512 << 20
_SQUARE = 1024
_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What this machine reaches with `threads` threads: bytes read per second, float32 operations per second, and who
    multiplied so fast (`by`)."""

    threads: int
    read_bytes_per_s: float
    float32_flops_per_s: float
    by: str = "numpy"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def environment() -> dict[str, Any]:
    """Processor, system, versions of the packages that matter, and the load at the time."""
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def measure_ceiling(threads: int = 0, read_bytes: int = _READ_BYTES, seconds: float = _SECONDS) -> Ceiling:
    """Measures both rates for about `seconds` each. `threads` 0: one per core of this process.

    The best round counts: a ceiling is what the machine can do when nothing else runs.
    """
    threads = threads or len(os.sched_getaffinity(0))
    size = read_bytes // threads // 8
    blocks = [np.ones(size, np.int64) for _ in range(threads)]
    squares = [np.full((_SQUARE, _SQUARE), 1 / _SQUARE, np.float32) for _ in range(threads)]
    results = [np.empty((_SQUARE, _SQUARE), np.float32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool, _one_blas_thread():
        reads = _best(pool, threads, lambda i: np.max(blocks[i]), seconds)
        products = _best(pool, threads, lambda i: np.matmul(squares[i], squares[i], out=results[i]), seconds)
    rates = {"numpy": threads * 2 * _SQUARE**3 / products, "torch": _torch_rate(threads, seconds)}
    by = max(rates, key=rates.__getitem__)
    return Ceiling(threads, threads * size * 8 / reads, rates[by], by)


def _torch_rate(threads: int, seconds: float) -> float:
    """The same by PyTorch, whose kernels for new processors are better than those of NumPy's wheel; 0 without it."""
    try:
        import torch
    except ImportError:
        return 0.0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        square = torch.full((_SQUARE, _SQUARE), 1 / _SQUARE)
        with ThreadPoolExecutor(1) as pool:
            return 2 * _SQUARE**3 / _best(pool, 1, lambda i: torch.mm(square, square), seconds)
    finally:
        torch.set_num_threads(before)


def _best(pool: ThreadPoolExecutor, threads: int, work: Callable[[int], object], seconds: float) -> float:
    """The least seconds in which all threads do `work` once."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        list(pool.map(work, range(threads)))
        best = min(best, time.perf_counter() - started)
    return best


class _one_blas_thread:
    """While it lasts, a product of matrices runs in the calling thread (NumPy's OpenBLAS only; harmless elsewhere)."""

    def __enter__(self) -> None:
        self._library = _openblas()
        if self._library is not None:
            self._before = self._library[0]()
            self._library[1](1)

    def __exit__(self, *_: object) -> None:
        if self._library is not None:
            self._library[1](self._before)


def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """`get_num_threads`, `set_num_threads` of the OpenBLAS in NumPy's wheel, if it is there."""
    folder = Path(np.__file__).parent.parent / "numpy.libs"
    for path in sorted(folder.glob("libopenblas*")) + sorted(folder.glob("libscipy_openblas*")):
        library = ctypes.CDLL(str(path))
        for prefix in ("openblas_", "scipy_openblas_"):
            for suffix in ("64_", ""):
                try:
                    return library[f"{prefix}get_num_threads{suffix}"], library[f"{prefix}set_num_threads{suffix}"]
                except AttributeError:
                    continue
    return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
