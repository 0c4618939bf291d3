"""Finds the Triton server of this machine: the one in the `nvidia-pytriton` wheel, or NVIDIA's own installation.

Nothing of pytriton is imported; the wheel is only a place where binaries lie. What the wheel's server needs (its stub
linked into a backend folder, an interpreter's libpython, the stub's site-packages by `PATH`) is arranged here.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ming_trt.errors import ServeError

SYSTEM_BINARY = Path("/opt/tritonserver/bin/tritonserver")
# Names the server to use: "bundled", "system", or the path of a `tritonserver`.
CHOICE_VARIABLE = "MING_TRT_TRITON"
TUNABLES_VARIABLE = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb"


@dataclass(frozen=True, slots=True)
class ServerProgram:
    """A `tritonserver` to start: its binary, the folder of its backends (None = its default) and its environment."""

    binary: Path
    bundled: bool
    backends: Path | None
    environment: Mapping[str, str]

    @property
    def title(self) -> str:
        return "Triton 2.51 of nvidia-pytriton" if self.bundled else f"Triton at {self.binary}"


def find_program(run_dir: Path, prefer_system: bool = False) -> ServerProgram:
    """The server to use, prepared under `run_dir`.

    The bundled one goes first unless `prefer_system` (engines that need a GPU); `MING_TRT_TRITON` decides otherwise.
    Raises `ServeError` if there is none, or if the bundled one lacks something that would make it hang or corrupt data.
    """
    choice = os.environ.get(CHOICE_VARIABLE, "")
    if choice not in ("", "bundled", "system"):
        return _system(Path(choice))
    bundled, system = _bundled_root(), _system_binary()
    wants_system = choice == "system" or (choice == "" and (bundled is None or (prefer_system and system is not None)))
    if wants_system and system is not None:
        return _system(system)
    if bundled is not None and choice != "system":
        return _bundled(bundled, run_dir)
    raise ServeError(
        "no Triton server is installed here: install `ming-trt[cpu]`, or use NVIDIA's Triton container on a GPU machine"
    )


def huge_pages(tunables: str) -> str:
    """The value of `TUNABLES_VARIABLE` with which the C library asks for huge pages for large blocks, the weights above
    all: a token reads all of them. `tunables`: the value until now; what it says of huge pages stays."""
    return tunables if _HUGE_PAGES in tunables else f"{tunables}:{_HUGE_PAGES}=1".lstrip(":")


def _bundled_root() -> Path | None:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _system_binary() -> Path | None:
    if SYSTEM_BINARY.exists():
        return SYSTEM_BINARY
    found = shutil.which("tritonserver")
    return Path(found) if found else None


def _system(binary: Path) -> ServerProgram:
    if not os.access(binary, os.X_OK):
        raise ServeError(f"'{binary}' is not a program: set {CHOICE_VARIABLE} to the path of a tritonserver")
    return ServerProgram(binary, bundled=False, backends=None, environment=_stub_environment([]))


def _bundled(package: Path, run_dir: Path) -> ServerProgram:
    _refuse_numpy_2()
    root, version = package / "tritonserver", f"{sys.version_info[0]}.{sys.version_info[1]}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise ServeError(f"nvidia-pytriton has no stub for Python {version}: use Python 3.11 or 3.12")
    backend, libraries = run_dir / "backends" / "python", run_dir / "lib"
    for folder in (backend, libraries):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        _link(backend / name, root / "backends" / "python" / name)
    _link(backend / stub.name, stub)
    for library in (package.parent / "nvidia_pytriton.libs").glob("libtritonserver-*.so"):
        _link(libraries / "libtritonserver.so", library)
    environment = _stub_environment([str(libraries)])
    _check_libraries(stub, environment, version)
    return ServerProgram(root / "bin" / "tritonserver", True, run_dir / "backends", environment)


def _link(link: Path, target: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _stub_environment(libraries: list[str]) -> dict[str, str]:
    """The stub takes the first `python3` on PATH as its interpreter, and the loader's libpython. With huge pages."""
    libdir = sysconfig.get_config_var("LIBDIR")
    path = [str(libdir)] if libdir else []
    path += [*libraries, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        "LD_LIBRARY_PATH": ":".join(path),
        TUNABLES_VARIABLE: huge_pages(os.environ.get(TUNABLES_VARIABLE, "")),
    }


def _check_libraries(stub: Path, environment: Mapping[str, str], version: str) -> None:
    """A stub that lacks a library makes the server wait for ever, so look before."""
    done = subprocess.run(
        ["ldd", str(stub)], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    missing = [line.split()[0] for line in done.stdout.splitlines() if "not found" in line]
    if missing:
        raise ServeError(
            f"the server's Python stub needs {', '.join(missing)}, which the loader does not find: "
            f"install libpython{version} (Debian, Ubuntu: apt-get install libpython{version})"
        )


def _refuse_numpy_2() -> None:
    version = metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise ServeError(
            f"numpy {version} makes the bundled Triton 2.51 corrupt tensors silently: pip install 'numpy<2'"
        )
