"""What is installed on this machine, and which targets it can build and serve.

Nothing heavy is imported: versions come from package metadata, the GPU from `nvidia-smi`, libraries from the loader.
"""

from __future__ import annotations

import ctypes
import importlib.metadata as metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

# TensorRT-LLM's engine path ends with this release (docs/DESIGN.md, section 6).
TRTLLM_VERSION = "1.2.1"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `version` is empty where it is absent; `remedy` is empty where nothing has to be done."""

    name: str
    ok: bool
    version: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """Whether a target can be built, and served, on this machine, and if not, why."""

    name: str
    build: bool
    serve: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `ming-trt doctor` prints. `ok`: at least one target can be built and served."""

    machine: str
    checks: tuple[Check, ...]
    targets: tuple[Target, ...]

    @property
    def ok(self) -> bool:
        return any(t.build and t.serve for t in self.targets)

    def as_dict(self) -> dict[str, object]:
        return {"ok": self.ok, **asdict(self)}


def _version(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _package(title: str, names: tuple[str, ...], remedy: str) -> Check:
    version = _version(*names)
    return Check(title, bool(version), version, "" if version else remedy)


def _python() -> Check:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Check(
        "python", ok, platform.python_version(), "" if ok else "use Python 3.11 or 3.12: the server's stub needs it"
    )


def _libpython() -> Check:
    name = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
    beside = Path(str(sysconfig.get_config_var("LIBDIR") or "/usr/lib")) / name
    try:
        ctypes.CDLL(str(beside) if beside.exists() else name)
    except OSError:
        return Check("libpython", False, "", f"apt-get install libpython{sys.version_info[0]}.{sys.version_info[1]}")
    return Check("libpython", True, name)


def _numpy() -> Check:
    version = _version("numpy")
    ok = version.startswith("1.")
    return Check(
        "numpy",
        ok,
        version,
        "" if ok else "pip install 'numpy<2': the bundled Triton's stub corrupts data with NumPy 2",
    )


def _triton() -> Check:
    if importlib.util.find_spec("pytriton") is not None:
        return Check("tritonserver", True, f"2.51.0 (bundled in nvidia-pytriton {_version('nvidia-pytriton')})")
    binary = shutil.which("tritonserver") or "/opt/tritonserver/bin/tritonserver"
    if Path(binary).exists():
        return Check("tritonserver", True, binary)
    return Check("tritonserver", False, "", "pip install 'ming-trt[cpu]', or use NVIDIA's Triton container")


def _gpu() -> Check:
    remedy = "needed for the TensorRT targets only"
    if shutil.which("nvidia-smi") is None:
        return Check("gpu", False, "", remedy)
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stdout.strip().splitlines()
    return Check("gpu", bool(lines) and done.returncode == 0, "; ".join(lines), "" if lines else remedy)


def _trtllm_api() -> Check:
    """The symbols that the engine relies on; looked at only where the right release is installed."""
    from ming_trt.trtllm import signatures

    name = "tensorrt-llm api"
    if signatures.installed() != TRTLLM_VERSION:
        return Check(name, False, "", f"looked at where TensorRT-LLM {TRTLLM_VERSION} is installed")
    problems = signatures.check()
    count = len(signatures.NETWORK) + len(signatures.EXECUTOR)
    remedy = f"{len(problems)} differences, first: {problems[0]}" if problems else ""
    return Check(name, not problems, f"{count} symbols", remedy)


def _targets(checks: dict[str, Check]) -> tuple[Target, ...]:
    def missing(*names: str) -> list[str]:
        return [name for name in names if not checks[name].ok]

    def target(name: str, build: tuple[str, ...], serve: tuple[str, ...], note: str = "") -> Target:
        lacking = missing(*dict.fromkeys((*build, *serve)))
        reasons = [f"missing: {', '.join(lacking)}"] if lacking else []
        return Target(name, not missing(*build), not missing(*serve), "; ".join(filter(None, [*reasons, note])))

    server = ("python", "libpython", "numpy", "tritonserver")
    rtx = Target(
        "tensorrt-rtx",
        not missing("torch", "onnx", "tensorrt-rtx"),
        False,
        "; ".join(
            filter(
                None, [", ".join(f"missing: {n}" for n in missing("tensorrt-rtx")), "plans are compiled, not run, here"]
            )
        ),
    )
    trtllm = checks["tensorrt-llm"]
    wrong = (
        ""
        if not trtllm.ok or trtllm.version == TRTLLM_VERSION
        else f"tensorrt-llm {trtllm.version}, needs {TRTLLM_VERSION}"
    )
    return (
        target("onnxruntime", ("python", "torch", "onnx", "onnxruntime"), (*server, "onnxruntime")),
        target("tensorrt", ("torch", "onnx", "tensorrt", "gpu"), (*server, "tensorrt", "gpu")),
        rtx,
        target("tensorrt-llm", ("torch", "tensorrt-llm", "gpu"), ("tensorrt-llm", "tritonserver", "gpu"), wrong),
    )


def examine() -> Report:
    """Looks at this machine; takes well under a second."""
    cpu = "pip install 'ming-trt[cpu]'"
    checks = (
        _python(),
        _libpython(),
        _numpy(),
        _package("torch", ("torch",), cpu),
        _package("onnx", ("onnx",), cpu),
        _package("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), cpu),
        _package("tritonclient", ("tritonclient",), "pip install 'tritonclient[grpc]'"),
        _triton(),
        _gpu(),
        _package(
            "tensorrt",
            ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
            "comes with NVIDIA's containers; GPU machines only",
        ),
        _package("tensorrt-rtx", ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx"), "pip install 'ming-trt[rtx]'"),
        _package(
            "tensorrt-llm", ("tensorrt_llm",), f"use the Triton container that holds TensorRT-LLM {TRTLLM_VERSION}"
        ),
        _trtllm_api(),
        _package("nvidia-modelopt", ("nvidia-modelopt",), "optional: FP8 calibration by ModelOpt"),
    )
    return Report(f"{platform.system()} {platform.machine()}", checks, _targets({c.name: c for c in checks}))
