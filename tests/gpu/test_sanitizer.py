"""compute-sanitizer finds no bad access, race, uninitialised read or misused barrier in any kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import gpu

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

pytestmark = [
    pytest.mark.gpu,
    gpu.needs_gpu,
    pytest.mark.skipif(not Path(SANITIZER).exists(), reason="compute-sanitizer is not on the PATH"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_kernels_are_clean(tool: str) -> None:
    for name in ("mrope", "moe"):
        gpu.library(name)  # compiled before the sanitizer slows things down
    script = Path(__file__).with_name("sanitize.py")
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", "--kernel-name-exclude", "kns=at::"]
    # Each tensor its own allocation: else a neighbour in torch's pool hides an access out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False
    )
    said = done.stdout + done.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer cannot watch the GPU of this machine: " + said.strip().splitlines()[-1])
    assert done.returncode == 0, said[-4000:]
    assert "all kernels ran" in said
