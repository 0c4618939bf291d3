"""nvcc compiles every kernel for every architecture, within a budget of registers and without spills."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from tests.plugins import binding

pytestmark = pytest.mark.skipif(binding.nvcc() is None, reason="nvcc is not on the PATH: no kernel is compiled here")

ARCHITECTURES = ["80", "89", "90a", "100a", "120a"]
# Registers per thread: of 65536, so that the blocks that a kernel counts on live together on one multiprocessor.
BUDGET = {
    "rotate_kernel": 128,  # 2 blocks of 256 threads
    "table_kernel": 64,
    "route_kernel": 64,
    "round_kernel": 64,
    "sort_kernel": 64,  # one block of 1024 threads
    "combine_kernel": 64,
    "decode_gate_up_kernel": 192,  # 2 blocks of 256; one where FP8 products are taken apart
    "decode_down_kernel": 128,  # one block of 512
    "grouped_gemm_kernel": 255,  # one block of 256, by its shared memory
}
STACK = {"rotate_kernel": 48, "table_kernel": 48}  # bytes: the range reduction of sincosf for angles above 1e5 only


@dataclass(frozen=True)
class Usage:
    architecture: str
    kernel: str
    symbol: str
    registers: int
    stack: int
    spills: int


def budget(usage: Usage) -> int:
    # By wgmma: two blocks. The last template argument says so in the mangled name.
    wgmma = usage.kernel == "grouped_gemm_kernel" and "Lb1EEEv" in usage.symbol
    return 128 if wgmma else BUDGET[usage.kernel]


def usages(log: str) -> list[Usage]:
    """One entry per kernel and architecture in what `ptxas -v` prints."""
    pattern = re.compile(
        r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<architecture>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    found = []
    for match in pattern.finditer(log):
        kernel = next((name for name in BUDGET if name in match["symbol"]), match["symbol"])
        spills = int(match["stores"]) + int(match["loads"])
        found.append(
            Usage(match["architecture"], kernel, match["symbol"], int(match["registers"]), int(match["stack"]), spills)
        )
    return found


@pytest.mark.parametrize(
    ("name", "flags"),
    # float16 is the same templates once more; the compilation for a release has both.
    [("mrope", []), ("moe", ["-DMING_ONLY_BFLOAT16"])],
)
def test_kernels_compile_within_their_budget(name: str, flags: list[str]) -> None:
    library, log = binding.compiled(name, binding.device_command(name, ARCHITECTURES, "--threads", "2", *flags))
    found = usages(log)
    source = "".join(path.read_text() for path in (binding.PLUGINS / name).glob("*.cuh"))
    kernels = {kernel for kernel in BUDGET if f"{kernel}(" in source}
    assert kernels
    for architecture in ARCHITECTURES:
        assert {usage.kernel for usage in found if usage.architecture == architecture} == kernels
    for usage in found:
        assert usage.spills == 0, usage
        assert usage.registers <= budget(usage), usage
        assert usage.stack <= STACK.get(usage.kernel, 0), usage
    assert binding.load(library)
