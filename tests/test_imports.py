"""Importing the package, its light parts and the command line loads nothing heavy."""

import subprocess
import sys

import pytest

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
