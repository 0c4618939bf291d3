"""Compiles the kernels of `plugins/` (with g++, as an emulation, or with nvcc) and calls them through ctypes.

Standard library only, so that it works on a bare machine. Compiled libraries are kept under `.pytest_cache/kernels`,
named by a digest of the sources and the command, and built again when either changes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
EMULATION = Path(__file__).parent / "cuda_emulation.h"
CACHE = ROOT / ".pytest_cache" / "kernels"

FLOAT32, FLOAT16, BFLOAT16, FLOAT8 = 0, 1, 2, 3
AUTOMATIC, DECODE, PREFILL, PREFILL_PORTABLE = 0, 1, 2, 3
MAX_DECODE_TOKENS = 16
INCLUDES = [f"-I{PLUGINS / name}" for name in ("common", "mrope", "moe")]


class HeadView(ctypes.Structure):
    """A tensor [batch, heads, tokens, head_dim]; strides in elements, the last dimension dense."""

    _fields_ = (("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("token", c_int64))


class RopeCall(ctypes.Structure):
    """`ming::RopeCall` of plugins/mrope/mrope.h."""

    _fields_ = (
        *((name, HeadView) for name in ("q", "k", "v", "q_out", "k_out", "v_out")),
        ("positions", c_void_p),
        ("write_index", c_void_p),
        ("batch", c_int64),
        ("tokens", c_int64),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("position_bytes", c_int32),
        ("write_index_bytes", c_int32),
        ("dtype", c_int32),
    )


class MoeCall(ctypes.Structure):
    """`ming::MoeCall` of plugins/moe/moe.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "logits", "modality", "gate_up", "down", "addend", "y", "workspace")),
        ("workspace_bytes", c_int64),
        ("tokens", c_int64),
        *((name, c_int32) for name in ("hidden", "width", "experts", "top_k", "routers", "normalize")),
        ("modality_bytes", c_int32),
        ("dtype", c_int32),
        ("path", c_int32),
        ("fp8", c_int32),
        ("x_scale", c_float),
        ("inner_scale", c_float),
        ("gate_up_scale", c_void_p),
        ("down_scale", c_void_p),
    )


_AXES = (POINTER(c_int32), c_int32, c_float)
_TABLE = (c_void_p, c_int32, c_int64, c_void_p, c_int32, *_AXES, c_int64, c_void_p)
SIGNATURES = {
    "ming_plugin_abi": (c_int32, ()),
    "ming_status_text": (c_char_p, (c_int32,)),
    "ming_mrope": (c_int32, (POINTER(RopeCall), *_AXES, c_void_p)),
    "ming_mrope_table": (c_int32, (*_TABLE, c_void_p)),
    "ming_mrope_host": (c_int32, (POINTER(RopeCall), *_AXES)),
    "ming_mrope_table_host": (c_int32, _TABLE),
    "ming_frequencies_host": (c_int32, (*_AXES, c_void_p)),
    "ming_round_host": (None, (c_void_p, c_int64, c_int32, c_void_p)),
    "ming_moe": (c_int32, (POINTER(MoeCall), c_void_p)),
    "ming_moe_workspace": (c_int64, (c_int64, c_int32, c_int32, c_int32, c_int32)),
    "ming_moe_host": (c_int32, (POINTER(MoeCall),)),
    "ming_moe_route_host": (c_int32, (POINTER(MoeCall), c_void_p, c_void_p)),
    "ming_emulation_error": (c_char_p, ()),
    "ming_emulation_clear": (None, ()),
    "ming_emulation_capability": (None, (c_int32, c_int32)),
    "ming_emulation_conflicts": (ctypes.c_ulong, ()),
}


def axes_argument(axes: Sequence[int]) -> ctypes.Array[c_int32]:
    return (c_int32 * len(axes))(*axes)


def sources() -> list[Path]:
    """Everything that a kernel library is made of."""
    return [*sorted(path for path in PLUGINS.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")), EMULATION]


def compiled(name: str, command: Sequence[str], suffix: str = ".so") -> tuple[Path, str]:
    """Runs `command` + ["-o", file] unless its result is kept; the file and what the compiler printed.

    Raises `RuntimeError` with the compiler's words if it fails.
    """
    digest = hashlib.sha256("\0".join(command).encode())
    for path in sources():
        digest.update(path.read_bytes())
    target = CACHE / f"{name}-{digest.hexdigest()[:16]}{suffix}"
    log = target.with_suffix(".log")
    if not (target.exists() and log.exists()):
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{os.getpid()}-{target.name}")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
        log.write_text(done.stdout + done.stderr)
        partial.replace(target)
    return target, log.read_text()


def load(path: Path) -> ctypes.CDLL:
    """The library, with the types of those entry points that it has."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in SIGNATURES.items():
        if hasattr(library, name):
            function = getattr(library, name)
            function.restype = result
            function.argtypes = list(arguments)
    return library


_GXX = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra"]


@lru_cache
def host_library() -> ctypes.CDLL:
    """The host references, compiled by g++ without CUDA."""
    files = [str(PLUGINS / "mrope/mrope_host.cpp"), str(PLUGINS / "moe/moe_host.cpp")]
    return load(compiled("host", [*_GXX, *INCLUDES, *files])[0])


@lru_cache
def emulated_library(name: str) -> ctypes.CDLL:
    """The kernels of plugins/`name`/`name`.cu, run on the host by cuda_emulation.h."""
    flags = ["-DMING_EMULATION", f"-I{EMULATION.parent}", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-x", "c++"]
    return load(compiled(f"emulated-{name}", [*_GXX, *INCLUDES, *flags, str(PLUGINS / name / f"{name}.cu")])[0])


def nvcc() -> str | None:
    """Path of the CUDA compiler, or None."""
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return found if Path(found).exists() else None


def device_command(name: str, architectures: Sequence[str], *flags: str) -> list[str]:
    """The command that compiles plugins/`name`/`name`.cu to a library for `architectures` such as "90a"."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc is not on the PATH")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    base = [compiler, "-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-fPIC", "-shared", *targets, *INCLUDES]
    return [*base, *flags, str(PLUGINS / name / f"{name}.cu")]


@lru_cache
def device_library(name: str, architecture: str) -> ctypes.CDLL:
    return load(compiled(f"{name}-{architecture}", device_command(name, [architecture]))[0])
