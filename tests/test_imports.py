"""Importing the package, its light parts and the command line loads nothing heavy."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where the name of the module is not that of the distribution, or comes with another one.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "google": "protobuf",
    "grpc": "tritonclient",
    "ml_dtypes": "onnx-ir",
    "onnx_ir": "onnx-ir",
    "yaml": "pyyaml",
}
# The server's own.
OUTSIDE = {"triton_python_backend_utils"}

HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_llm", "tritonclient", "av")


def heavy_modules_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(eval(done.stdout))


@pytest.mark.parametrize("module", ["ming_trt", "ming_trt.errors", "ming_trt.config", "ming_trt.bundle"])
def test_light_modules(module: str) -> None:
    assert heavy_modules_after(f"import {module}") == set()


def test_every_command_is_registered_without_heavy_imports() -> None:
    assert heavy_modules_after("from ming_trt import cli\ncli._register()") == set()


@pytest.mark.parametrize("package", ["ming_trt.runtime", "ming_trt.serving", "ming_trt.processing"])
def test_serving_side_never_imports_torch(package: str) -> None:
    statement = (
        f"import pkgutil, importlib, {package} as p\n"
        "for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.'):\n"
        "    importlib.import_module(m.name) if 'stages.' not in m.name or 'runtime' in m.name else None"
    )
    assert "torch" not in heavy_modules_after(statement)


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[><=]", entry)[0] for entry in requirements}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = set()
    for file in (*ROOT.glob("ming_trt/**/*.py"), *ROOT.glob("builders/*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    others = found - set(sys.stdlib_module_names) - {"ming_trt", "builders"} - OUTSIDE
    imported = {DISTRIBUTIONS.get(name, name) for name in others}
    needed, extras = names(project["dependencies"]), project["optional-dependencies"]
    assert imported <= needed | names(extras["cpu"]) | names(extras["media"])
    assert needed <= imported
    # the container has torch and numpy; all else is installed by hand there
    guide = (ROOT / "docs" / "gpu-first-run.md").read_text("utf-8")
    line = next(line for line in guide.splitlines() if "--no-deps -e ." in line)
    assert (needed | names(extras["media"]) | names(extras["build"])) - {"numpy", "torch"} <= names(
        line.replace("'", "").split()
    )
