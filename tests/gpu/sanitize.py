"""Runs every kernel once on small inputs: what compute-sanitizer watches. See test_sanitizer.py."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.gpu import gpu
from tests.gpu.test_moe import PATHS
from tests.plugins import binding, calls, reference


def main() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for half, sections in ((16, (4, 6, 6)), (5, (1, 2, 2))):
            q, k = (torch.randn(2, heads, 7, 2 * half, device="cuda").to(dtype) for heads in (3, 2))
            positions = torch.randint(0, 999, (3, 2, 7), device="cuda")
            rope = calls.Rope(q, k, positions, reference.frequency_axes(reference.VIDEO, sections), 600000.0)
            q_out, k_out = torch.empty_like(q), torch.empty_like(k)
            call, axes = rope.call(q_out, k_out)
            library = gpu.library("mrope")
            calls.check(library.ming_mrope(ctypes.byref(call), axes, half, 600000.0, gpu.stream()))
            gpu.finish()
    positions = torch.zeros(3, 9, dtype=torch.int64, device="cuda")
    table = torch.empty(30, 16, 2, device="cuda")
    axes = binding.axes_argument(reference.frequency_axes(reference.THREE_D, (4, 6, 6)))
    calls.check(
        gpu.library("mrope").ming_mrope_table(
            positions.data_ptr(), 8, 9, None, 0, axes, 16, 600000.0, 30, table.data_ptr(), gpu.stream()
        )
    )
    gpu.finish()
    for path in PATHS.values():
        for tokens in (3, 11) if path == binding.DECODE else (40,):
            moe = calls.random_moe(
                tokens, 264, 72, 70, 4, seed=tokens, device="cuda", modality=True, addend=True, dtype=torch.bfloat16
            )
            moe.run(gpu.library("moe"), path, gpu.stream())
            gpu.finish()
            if gpu.capability() >= (8, 9):
                moe = calls.random_moe(tokens, 272, 80, 70, 4, seed=tokens, device="cuda").in_fp8()
                moe.run(gpu.library("moe"), path, gpu.stream())
                gpu.finish()
    print("all kernels ran")


if __name__ == "__main__":
    main()
