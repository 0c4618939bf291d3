"""Versions for content keys: of this project's code behind a module, and of the tools that a step uses."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import ming_trt

# Folders of `ming_trt` that no builder imports.
_APART = ("bench", "cli", "golden", "serving")
_ROOTS = {"ming_trt": Path(ming_trt.__file__).parent, "builders": Path(__file__).parent}


def code_version(module: str) -> str:
    """Hex SHA-256 of the source of `module` and of every module of this project that it imports, directly or not.

    Imports inside functions count; nothing is imported here.
    """
    total = hashlib.sha256()
    for name in sorted(_closure(module)):
        total.update(name.encode() + b"\0" + _source(name) + b"\0")
    return total.hexdigest()


def project_version() -> str:
    """Hex SHA-256 of all source files that a build may run: it changes when any `code_version` does."""
    total = hashlib.sha256()
    for package, root in sorted(_ROOTS.items()):
        for path in sorted(path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in _APART):
            total.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


def tool_versions(names: Iterable[str]) -> dict[str, str]:
    """Distribution -> installed version, "" where it is absent."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return versions


def _closure(module: str) -> set[str]:
    found: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name not in found and _path(name) is not None:
            found.add(name)
            pending += _imports(name)
    return found


@cache
def _imports(module: str) -> tuple[str, ...]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(_source(module))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from package import name`: name may be a module or something in it
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return tuple(name for name in names if name.split(".")[0] in _ROOTS)


@cache
def _path(module: str) -> Path | None:
    package, *rest = module.split(".")
    if package not in _ROOTS:
        return None
    base = _ROOTS[package].joinpath(*rest)
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _source(module: str) -> bytes:
    path = _path(module)
    return path.read_bytes() if path is not None else b""
