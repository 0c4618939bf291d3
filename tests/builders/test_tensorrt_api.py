"""Every call that our code makes to TensorRT exists, in the data-centre edition 11.4 and in RTX.

The bindings of 11.4 load over libraries that define their few entry points as null: no TensorRT, but its whole API.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from builders import tensorrt_api, tensorrt_child
from builders.tensorrt_api import FULL, RTX, load
from ming_trt.errors import BuildError, UnavailableError
from tests.tensorrt_bindings import null_libraries, rtx_libraries

# What our variables hold, by name, in the two modules that talk to TensorRT.
CLASSES = {
    "trt": "",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "registry": "IPluginRegistry",
}
RTX_ONLY = {"ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"}
PROBE = """
import ctypes, importlib, json, sys
for library in sys.argv[2:]:
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
trt = importlib.import_module(sys.argv[1])
missing = []
for path in json.load(sys.stdin):
    value = trt
    for part in path.split("."):
        value = getattr(value, part, None)
    if value is None:
        missing.append(path)
print(json.dumps([trt.__version__, missing]))
"""


def calls() -> set[str]:
    """Paths such as `Builder.create_network` that the two modules use."""
    found = set()
    for module in (tensorrt_api, tensorrt_child):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text("utf-8"))):
            names: list[str] = []
            value: ast.expr = node if isinstance(node, ast.Attribute) else ast.Constant(None)
            while isinstance(value, ast.Attribute):
                names.insert(0, value.attr)
                value = value.value
            root = value.id if isinstance(value, ast.Name) else ""
            if root in ("self", "loaded") and names[:1] == ["trt"]:
                root, names = "trt", names[1:]
            if names and root in CLASSES and names[0] != "append":
                depth = 2 if root == "trt" else 1
                path = ".".join(filter(None, (CLASSES[root], *names[:depth])))
                found.add(path.removesuffix(".__init__").removesuffix(".__members__"))
    # of objects that have no variable
    return found | {"INetworkDefinition.get_layer", "ILayer.name", "ILayer.type", "LayerType.PLUGIN_V3"}


def probe(module: str, paths: set[str], libraries: list[Path]) -> tuple[str, list[str]]:
    command = [sys.executable, "-c", PROBE, module, *map(str, libraries)]
    done = subprocess.run(command, input=json.dumps(sorted(paths)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    version, missing = json.loads(done.stdout.splitlines()[-1])
    return version, missing


def test_the_calls_are_found() -> None:
    found = calls()
    assert {"Builder.build_serialized_network", "OnnxParser.parse_from_file", "MemoryPoolType.WORKSPACE"} <= found
    assert {"IBuilderConfig.set_timing_cache", "IPluginRegistry.load_library", *RTX_ONLY} <= found
    assert len(found) > 30


def test_calls_exist_in_the_data_centre_edition(tmp_path: Path) -> None:
    libraries = null_libraries(tmp_path)
    version, missing = probe("tensorrt_bindings", calls() - RTX_ONLY, libraries)
    assert version.startswith("11.4.") and not missing
    # and the probe does find what is not there
    assert set(probe("tensorrt_bindings", RTX_ONLY | {"Builder.nothing"}, libraries)[1]) >= {"Builder.nothing"}


def test_calls_exist_in_rtx() -> None:
    version, missing = probe("tensorrt_rtx_bindings", calls(), rtx_libraries())
    assert version == load(RTX).version and not missing


def test_an_edition_that_is_absent_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr("builders.tensorrt_api.importlib.import_module", absent)
    with pytest.raises(UnavailableError, match=r"pip install 'ming-trt\[rtx\]'"):
        load(RTX)
    with pytest.raises(UnavailableError, match="NVIDIA's container"):
        load(FULL)
    with pytest.raises(BuildError, match="no edition"):
        load("other")
