"""The one place that imports TensorRT, and the one that knows how its editions and versions differ.

Two editions have one API: the data-centre TensorRT (`tensorrt`, 10.14 of TensorRT-LLM's container and 11.x) and
TensorRT-RTX, whose builder also works on a machine without a GPU. Nothing is hidden: `Api.trt` is the module.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ming_trt.errors import BuildError, UnavailableError

FULL, RTX = "tensorrt", "tensorrt-rtx"
TARGETS = (FULL, RTX)
# First release whose parser knows these operators (its changelog); the lowering replaces them for older ones.
OPERATORS_SINCE: dict[str, tuple[int, int]] = {
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
    "Swish": (11, 0),
}
# Below this release a data-centre network is strongly typed only if it is asked for.
_ALWAYS_TYPED = (11, 0)
# What the RTX wheel's parser opens by this bare name, while the wheel ships `<name>.1` only.
_RTX_BARE_NAME = "libtensorrt_rtx.so"


@dataclass(frozen=True, slots=True)
class Api:
    """A loaded edition: its module, `FULL` or `RTX`, and its version as a string ("11.4.0.106")."""

    trt: Any
    edition: str
    version: str

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor number; RTX counts on its own, its parser is that of a release above 11.0."""
        return (11, 4) if self.edition == RTX else release_of(self.version)

    def create_network(self, builder: Any) -> Any:
        """An empty strongly typed network."""
        if self.release < _ALWAYS_TYPED:
            return builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        return builder.create_network(0)

    def choose_devices(self, config: Any, capabilities: tuple[str, ...]) -> None:
        """RTX: compiles ahead of time for "sm80", "sm89", ...; nothing given leaves its default (sm_80, or sm_89 if the
        graph holds FP8, and newer). Raises `BuildError` for one that RTX cannot compile for."""
        if self.edition != RTX:
            if capabilities:
                raise BuildError(
                    f"compute capabilities {', '.join(capabilities)} are for target {RTX}: TensorRT compiles for the "
                    "GPU it runs on, leave them out"
                )
            return
        known = self.trt.ComputeCapability.__members__
        for name in capabilities:
            if name.upper() not in known or name.upper() in ("NONE", "CURRENT"):
                possible = ", ".join(n.lower() for n in known if n.startswith("SM"))
                raise BuildError(f"target {RTX} does not compile for {name}: choose from {possible}")
        if capabilities:
            config.num_compute_capabilities = len(capabilities)
            for index, name in enumerate(capabilities):
                config.set_compute_capability(known[name.upper()], index)

    def load_plugins(self, logger: Any, libraries: tuple[Path, ...]) -> None:
        """Registers the plugins of shared libraries. Raises `BuildError` for one that cannot be loaded."""
        if not libraries:
            return
        if self.edition == RTX:
            _provide_bare_name()
        else:
            self.trt.init_libnvinfer_plugins(logger, "")
        registry = self.trt.get_plugin_registry()
        for library in libraries:
            if registry.load_library(str(library)) is None:
                raise BuildError(f"plugin library '{library}' cannot be loaded by {self.edition} {self.version}")


def release_of(version: str) -> tuple[int, int]:
    """Major and minor number of "10.14.1.48". Raises `BuildError` for what is no version."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        raise BuildError(f"'{version}' is no version of TensorRT: write it as 10.14 or 11.4") from None
    return major, minor


def lacking(release: tuple[int, int]) -> tuple[str, ...]:
    """Operators of our graphs that the parser of a release does not know."""
    return tuple(sorted(name for name, since in OPERATORS_SINCE.items() if release < since))


def load(edition: str) -> Api:
    """Loads an edition. Raises `UnavailableError` with the remedy if it is not installed."""
    if edition == FULL:
        try:
            trt = importlib.import_module("tensorrt")
        except ImportError as error:
            raise UnavailableError(
                f"target {FULL} needs TensorRT, which is not installed ({error}): run the build in NVIDIA's container, "
                f"or compile without a GPU by --target {RTX}"
            ) from None
        return Api(trt, FULL, str(trt.__version__))
    if edition != RTX:
        raise BuildError(f"'{edition}' is no edition of TensorRT: choose from {', '.join(TARGETS)}")
    try:
        importlib.import_module("tensorrt_rtx_libs")  # first: it preloads the libraries
        trt = importlib.import_module("tensorrt_rtx_bindings")
    except ImportError as error:
        raise UnavailableError(
            f"target {RTX} needs TensorRT-RTX, which is not installed ({error}): pip install 'ming-trt[rtx]'"
        ) from None
    return Api(trt, RTX, str(trt.__version__))


def _provide_bare_name() -> None:
    """Loads an empty library whose soname is the name that RTX's parser opens when it meets a plugin node.

    Without it such a node aborts the process. The library depends on the real one, so symbols are found through it.
    """
    libs = Path(str(importlib.import_module("tensorrt_rtx_libs").__file__)).parent
    compiler = os.environ.get("CC", "cc")
    with tempfile.TemporaryDirectory(prefix="ming-trt-rtx-") as folder:
        alias = Path(folder) / "alias.so"
        command = [compiler, "-shared", "-fPIC", "-x", "c", "/dev/null", f"-Wl,-soname,{_RTX_BARE_NAME}"]
        command += ["-Wl,--no-as-needed", f"-L{libs}", f"-l:{_RTX_BARE_NAME}.1", "-o", str(alias)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        except OSError as error:
            raise BuildError(f"plugins in {RTX} need a C compiler ({error}): install gcc, or set CC") from None
        if done.returncode:
            raise BuildError(f"the alias of {_RTX_BARE_NAME} cannot be linked ({done.stderr.strip()[:300]})")
        ctypes.CDLL(str(alias), mode=ctypes.RTLD_GLOBAL)
