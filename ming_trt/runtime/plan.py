"""Whether a TensorRT plan may be loaded here: told from its stamp, before a byte of it is deserialised.

A plan of another version, for another GPU, cut short, or made with another plugin library makes TensorRT fail with an
assertion, or crash; each is one sentence here. Needs neither TensorRT nor a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ming_trt.bundle import sha256
from ming_trt.errors import EngineError, UnavailableError

# Raised when an input, an attribute or the meaning of one of our plugins changes; `plugins/` exports the same number.
PLUGIN_ABI = 2
ABI_SYMBOL = "ming_plugin_abi"
_FIELDS = ("edition", "version", "devices", "plugin_abi", "sha256", "size")
# CUdevice_attribute: COMPUTE_CAPABILITY_MAJOR and _MINOR
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a plan needs to be loaded: TensorRT's `edition` ("tensorrt" or "tensorrt-rtx") and exact `version`, the
    compute capabilities it was built for ("sm90"), the ABI of the plugins in it (0 = it has none), and its file's
    digest and size in bytes."""

    edition: str
    version: str
    devices: tuple[str, ...]
    plugin_abi: int
    sha256: str
    size: int

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], name: str) -> Stamp:
        """The stamp in a component's facts of the manifest. Raises `EngineError` if it is not whole."""
        stamp = facts.get("plan", {}).get("stamp") if isinstance(facts.get("plan"), Mapping) else None
        if not isinstance(stamp, Mapping) or any(field not in stamp for field in _FIELDS):
            raise EngineError(f"the plan of '{name}' has no stamp in the manifest: build the bundle again")
        values = {field: stamp[field] for field in _FIELDS}
        return cls(**{**values, "devices": tuple(values["devices"])})

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Host:
    """What is here: the loaded TensorRT, the GPU's compute capability ("sm90"), the ABI of the plugin library that is
    loaded, 0 if none is."""

    edition: str
    version: str
    device: str
    plugin_abi: int = 0


def check_plan(name: str, stamp: Stamp, file: Path, host: Host, *, digest: bool = False) -> None:
    """Raises `EngineError` if the plan of engine `name` cannot be loaded on `host`: one sentence with the remedy.

    The file's size is always compared, its bytes only with `digest`, since that reads the whole file.
    """
    again = "build the bundle again on this machine"
    if stamp.edition != host.edition:
        raise EngineError(
            f"the plan of '{name}' was made by {stamp.edition} {stamp.version}, and {host.edition} {host.version} is "
            f"here, which cannot load it: {again}"
        )
    if stamp.version != host.version:
        raise EngineError(
            f"the plan of '{name}' was made by TensorRT {stamp.version}, and {host.version} is here: {again}, or "
            f"install {stamp.version}"
        )
    if host.device not in stamp.devices:
        raise EngineError(
            f"the plan of '{name}' was made for {', '.join(stamp.devices)}, and this GPU is {host.device}: {again}"
        )
    if stamp.plugin_abi and not host.plugin_abi:
        raise EngineError(
            f"the plan of '{name}' needs the plugin library with ABI {stamp.plugin_abi}, and none is loaded: build "
            "plugins/ with CMake and name it by MING_TRT_PLUGINS"
        )
    if stamp.plugin_abi and stamp.plugin_abi != host.plugin_abi:
        older = "older" if host.plugin_abi < stamp.plugin_abi else "newer"
        raise EngineError(
            f"the plan of '{name}' needs plugins with ABI {stamp.plugin_abi}, and the library here is {older}, with "
            f"ABI {host.plugin_abi}: build plugins/ of the same version as the plan"
        )
    check_file(name, stamp, file, digest=digest)


def check_file(name: str, stamp: Stamp, file: Path, *, digest: bool = False) -> None:
    """Raises `EngineError` if the plan's file is missing, cut, or (with `digest`) not the one that was stamped."""
    try:
        size = file.stat().st_size
    except OSError:
        raise EngineError(f"the plan of '{name}' has no file '{file}': build the bundle again") from None
    if size != stamp.size:
        raise EngineError(
            f"the plan of '{name}' has {size} bytes instead of {stamp.size}, it was cut or replaced: copy the bundle "
            "again, or build it again"
        )
    if digest and sha256(file) != stamp.sha256:
        raise EngineError(f"the plan of '{name}' does not have the digest of its stamp: copy the bundle again")


def plugin_abi(library: Path) -> int:
    """The ABI number that a plugin library exports. Raises `EngineError` if it cannot be loaded or exports none."""
    if not library.is_file():
        raise EngineError(f"there is no plugin library '{library}': build plugins/ with CMake")
    try:
        function = getattr(ctypes.CDLL(str(library)), ABI_SYMBOL)
    except OSError as error:
        raise EngineError(
            f"the plugin library '{library}' cannot be loaded ({error}): build it on this machine"
        ) from None
    except AttributeError:
        raise EngineError(
            f"'{library}' exports no {ABI_SYMBOL}, it is no plugin library of ming-trt: name ours"
        ) from None
    function.restype = ctypes.c_int
    return int(function())


def gpu_capability(index: int = 0) -> str:
    """Compute capability of a GPU as "sm90", from the driver. Raises `UnavailableError` where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UnavailableError(
            "there is no NVIDIA driver on this machine, which TensorRT needs: use a GPU machine, or --target "
            "onnxruntime (to run) or tensorrt-rtx (to compile only)"
        ) from None
    device, numbers = ctypes.c_int(), []
    status = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index)
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        status = status or driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(value.value)
    if status:
        raise UnavailableError(f"the NVIDIA driver finds no GPU {index} (error {status}): check `nvidia-smi`")
    return f"sm{numbers[0]}{numbers[1]}"
