"""The GPU of this machine, if it has one, and the kernels compiled for it. Needs torch, nvcc and g++ only."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.plugins import binding

if not torch.cuda.is_available():
    REASON = "no GPU is visible to torch: device code is not run here"
elif binding.nvcc() is None:
    REASON = "nvcc is not on the PATH: the kernels cannot be compiled for this GPU"
else:
    REASON = ""

needs_gpu = pytest.mark.skipif(bool(REASON), reason=REASON)

# Architectures with instructions of their own; others take the plain target.
_FEATURED = {(9, 0): "90a", (10, 0): "100a", (12, 0): "120a"}


def capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def architecture() -> str:
    major, minor = capability()
    return _FEATURED.get((major, minor), f"{major}{minor}")


def library(name: str) -> ctypes.CDLL:
    """The kernels of plugins/`name`, compiled for this GPU on the first call."""
    return binding.device_library(name, architecture())


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def finish() -> None:
    """Waits, and raises what a kernel did wrong."""
    torch.cuda.synchronize()
