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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ming_trt import compatibility
from ming_trt.errors import ConfigError
from ming_trt.evidence import evidence

# TensorRT-LLM's engine path ends with this release (docs/compatibility.md).
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
    """Whether a target can be built, and served, on this machine, and if not, why; and what is known of its engines:
    component -> rung, and by what."""

    name: str
    build: bool
    serve: bool
    reason: str = ""
    evidence: Mapping[str, str] = field(default_factory=dict)
    by: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `ming-trt doctor` prints. `ok`: at least one target can be built and served."""

    machine: str
    checks: tuple[Check, ...]
    targets: tuple[Target, ...]

    @property
    def ok(self) -> bool:
        return any(t.build and t.serve for t in self.targets)

    def target(self, name: str) -> Target:
        """The entry of that target. Raises `ConfigError` naming the targets."""
        found = next((target for target in self.targets if target.name == name), None)
        if found is None:
            raise ConfigError(f"unknown target '{name}': choose from {', '.join(t.name for t in self.targets)}")
        return found

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
    problem = _wrong(title, version)
    return Check(title, bool(version) and not problem, version, problem if version else remedy)


def _wrong(name: str, version: str) -> str:
    """What the table of versions says against `version`, or ""."""
    found = (part.problem(version) for part in compatibility.parts() if part.name == name and version)
    return next(found, "")


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


def _triton() -> Check:
    if importlib.util.find_spec("pytriton") is not None:
        return Check("tritonserver", True, f"2.51.0 (bundled in nvidia-pytriton {_version('nvidia-pytriton')})")
    binary = shutil.which("tritonserver") or "/opt/tritonserver/bin/tritonserver"
    if Path(binary).exists():
        return Check("tritonserver", True, binary)
    return Check("tritonserver", False, "", "pip install 'ming-trt[cpu]', or use NVIDIA's Triton container")


def _gpu() -> tuple[Check, Check]:
    """The GPU and its driver."""
    remedy = "needed for the TensorRT targets only"
    none = Check("gpu", False, "", remedy), Check("driver", False, "", remedy)
    if shutil.which("nvidia-smi") is None:
        return none
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return none
    lines = done.stdout.strip().splitlines()
    if not lines or done.returncode:
        return none
    driver = lines[0].rpartition(",")[2].strip()
    problem = _wrong("driver", driver)
    return Check("gpu", True, "; ".join(lines)), Check("driver", not problem, driver, problem)


def _trtllm_api() -> Check:
    """The symbols that the engine relies on; looked at only where the right release is installed."""
    from ming_trt.trtllm import signatures

    name = "tensorrt-llm api"
    if signatures.installed() != TRTLLM_VERSION:
        return Check(name, False, "", f"looked at where TensorRT-LLM {TRTLLM_VERSION} is installed")
    return _api(name, f"{len(signatures.NETWORK) + len(signatures.EXECUTOR)} symbols", signatures.check())


def _cuda_api() -> Check:
    """The CUDA calls of the runtime on TensorRT; none is made."""
    from ming_trt.runtime import cuda, signatures

    name = "cuda-bindings"
    version = signatures.cuda_version()
    if not version:
        return Check(name, False, "", "pip install cuda-bindings; needed to run TensorRT plans only")
    problems = [problem] if (problem := _wrong(name, version)) else signatures.check_cuda()
    return _api(name, f"{version}, {len(cuda.CALLS)} calls", problems)


def _tensorrt_api(tensorrt: Check) -> Check:
    """The TensorRT calls of the runtime; looked at only where TensorRT is installed."""
    from ming_trt.errors import UnavailableError
    from ming_trt.runtime import signatures
    from ming_trt.runtime.tensorrt import CALLS

    name = "tensorrt api"
    if not tensorrt.version:
        return Check(name, False, "", "looked at where TensorRT is installed")
    from builders import tensorrt_api

    try:
        module = tensorrt_api.load(tensorrt_api.FULL).trt
    except UnavailableError as error:
        return Check(name, False, "", str(error))
    return _api(name, f"{sum(map(len, CALLS.values()))} calls", signatures.check_tensorrt(module))


def _api(name: str, version: str, problems: list[str]) -> Check:
    remedy = f"{len(problems)} differences, first: {problems[0]}" if problems else ""
    return Check(name, not problems, version, remedy)


def _targets(checks: Mapping[str, Check]) -> tuple[Target, ...]:
    server = ("python", "libpython", "numpy", "tritonserver")
    exporter = ("python", "torch", "onnx", "onnxscript", "onnx-ir")
    gpu = ("gpu", "driver")
    known = evidence()

    def target(name: str, build: tuple[str, ...], serve: tuple[str, ...], note: str = "") -> Target:
        lacking = [checks[part] for part in dict.fromkeys((*build, *serve)) if not checks[part].ok]
        missing = [check.name for check in lacking if not check.version]
        reasons = [f"missing: {', '.join(missing)}"] if missing else []
        reasons += [check.remedy for check in lacking if check.version]
        builds, serves = (all(checks[part].ok for part in parts) for parts in (build, serve))
        reason = "; ".join(filter(None, [*reasons, note]))
        return Target(name, builds, serves, reason, known[name].components, known[name].by)

    rtx = target("tensorrt-rtx", (*exporter, "tensorrt-rtx"), (), "plans are compiled, not run, here")
    return (
        target("onnxruntime", (*exporter, "onnxruntime"), (*server, "onnxruntime")),
        target(
            "tensorrt",
            (*exporter, "tensorrt", *gpu),
            (*server, "tensorrt", "tensorrt api", "cuda-bindings", *gpu),
            "running plans is written and type-checked, no GPU has run it yet",
        ),
        replace(rtx, serve=False),
        target(
            "tensorrt-llm",
            ("python", "torch"),
            ("tensorrt", "tensorrt-llm", "tensorrt-llm api", "tritonserver", *gpu),
            "build makes llm-checkpoint; its engine is built where it is served",
        ),
    )


def examine() -> Report:
    """Looks at this machine; takes well under a second."""
    cpu = "pip install 'ming-trt[cpu]'"
    tensorrt = _package(
        "tensorrt",
        ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
        "comes with NVIDIA's containers; GPU machines only",
    )
    checks = (
        _python(),
        _libpython(),
        _package("numpy", ("numpy",), cpu),
        _package("torch", ("torch",), cpu),
        _package("onnx", ("onnx",), cpu),
        _package("onnxscript", ("onnxscript",), cpu),
        _package("onnx-ir", ("onnx-ir",), cpu),
        _package("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), cpu),
        _package("tritonclient", ("tritonclient",), "pip install 'tritonclient[grpc]'"),
        _triton(),
        *_gpu(),
        tensorrt,
        _tensorrt_api(tensorrt),
        _cuda_api(),
        _package("tensorrt-rtx", ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx"), "pip install 'ming-trt[rtx]'"),
        _package(
            "tensorrt-llm", ("tensorrt_llm",), f"use the Triton container that holds TensorRT-LLM {TRTLLM_VERSION}"
        ),
        _trtllm_api(),
        _package("nvidia-modelopt", ("nvidia-modelopt",), "optional: FP8 calibration by ModelOpt"),
    )
    return Report(f"{platform.system()} {platform.machine()}", checks, _targets({c.name: c for c in checks}))
