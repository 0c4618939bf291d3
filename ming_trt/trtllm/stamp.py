"""What an engine was built with, and whether it may be loaded here: told before TensorRT-LLM reads a byte of it.

An engine moves neither between releases, nor between versions of TensorRT, nor between GPU architectures.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ming_trt.errors import BundleError, UnavailableError
from ming_trt.runtime.plan import gpu_capability
from ming_trt.trtllm import signatures

_TENSORRT = ("tensorrt", "tensorrt_cu13", "tensorrt-cu13")


@dataclass(frozen=True, slots=True)
class EngineStamp:
    """Versions of TensorRT-LLM and TensorRT, the GPU's compute capability ("sm90"), and how many ranks there are."""

    tensorrt_llm: str
    tensorrt: str
    device: str
    ranks: int

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> EngineStamp:
        """The stamp in a component's facts of the manifest. Raises `BundleError` if it is not whole."""
        try:
            stamp = facts["engine"]["stamp"]
            return cls(str(stamp["tensorrt_llm"]), str(stamp["tensorrt"]), str(stamp["device"]), int(stamp["ranks"]))
        except (KeyError, TypeError, ValueError):
            raise BundleError("the TensorRT-LLM engine has no stamp in the manifest: build the bundle again") from None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def here(ranks: int) -> EngineStamp:
    """The stamp of an engine built on this machine. Raises `UnavailableError`, in one sentence, if none can be."""
    signatures.require()
    version = _version()
    if not version:
        raise UnavailableError(
            f"TensorRT-LLM {signatures.VERSION} is installed without TensorRT: use its container "
            "(docs/compatibility.md)"
        )
    return EngineStamp(signatures.VERSION, version, gpu_capability(), ranks)


def check(stamp: EngineStamp) -> None:
    """Raises `UnavailableError` or `BundleError` if an engine with that stamp cannot run on this machine."""
    found = here(stamp.ranks)
    for what, built, present in (
        ("TensorRT-LLM", stamp.tensorrt_llm, found.tensorrt_llm),
        ("TensorRT", stamp.tensorrt, found.tensorrt),
    ):
        if built != present:
            raise BundleError(
                f"the language model's engine was built with {what} {built} and {present} is here: build the bundle "
                "again on this machine"
            )
    if stamp.device != found.device:
        raise BundleError(
            f"the language model's engine was built for {stamp.device} and this GPU is {found.device}: build the "
            "bundle again on this machine"
        )
    for index in range(1, stamp.ranks):
        try:
            gpu_capability(index)
        except UnavailableError:
            raise BundleError(
                f"the language model's engine needs {stamp.ranks} GPUs and GPU {index} is not there: build with "
                f"--tp {index}"
            ) from None


def _version() -> str:
    for name in _TENSORRT:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
