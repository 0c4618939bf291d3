"""What lets the real bindings of TensorRT load without a GPU; skips the test that asks where that cannot be had."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

# The few entry points that the bindings of 11.4 link against.
NULLS = {
    "libnvinfer.so.11": [
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ],
    "libnvonnxparser.so.11": [
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getNvOnnxParserVersion",
    ],
    "libnvinfer_plugin.so.11": ["initLibNvInferPlugins"],
}


def null_libraries(folder: Path) -> list[Path]:
    """Libraries, made in `folder`, whose entry points all give null: no TensorRT, but the bindings show their API."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("the bindings of TensorRT are not installed: pip install tensorrt_cu13_bindings==11.4.0.106")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the null libraries")
    libraries = []
    for name, symbols in NULLS.items():
        source = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols)
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run(command, input=source, text=True, check=True)
        libraries.append(folder / name)
    return libraries


def rtx_libraries() -> list[Path]:
    """Those of the installed TensorRT-RTX."""
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("TensorRT-RTX is not installed: pip install 'ming-trt[rtx]'")
    import tensorrt_rtx_libs

    folder = Path(str(tensorrt_rtx_libs.__file__)).parent
    return sorted(folder.glob("libtensorrt_rtx.so.1"))
