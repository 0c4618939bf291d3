"""Every call of the GPU runtime is in the real bindings, with the parameters it passes: TensorRT 11.4, RTX and CUDA.

The bindings of 11.4 load over libraries that define their entry points as null. CUDA's take every argument and then say
that there is no driver; what the calls do is for a GPU to tell.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ming_trt.errors import EngineError, UnavailableError
from ming_trt.runtime import cuda, signatures, tensorrt
from ming_trt.runtime.tensorrt import CALLS, Library, load_plan
from tests.tensorrt_bindings import null_libraries, rtx_libraries

from . import fake_tensorrt

PROBE = """
import ctypes, importlib, json, sys
for library in sys.argv[2:]:
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
trt = importlib.import_module(sys.argv[1])
from ming_trt.runtime import signatures
from ming_trt.runtime.tensorrt import CALLS
found = signatures.check_tensorrt(trt)
CALLS["IExecutionContext"]["execute_async_v9"] = ()
CALLS["IExecutionContext"]["set_tensor_address"] = ("memory", "name")
print(json.dumps([trt.__version__, found, signatures.check_tensorrt(trt)]))
"""
PLANTED = ["has no IExecutionContext.execute_async_v9", "IExecutionContext.set_tensor_address takes no (memory, name)"]
# What our variables hold in tensorrt.py.
HOLDERS = {
    "trt": "",
    "found.trt": "",
    "self.trt": "",
    "self._found.trt": "",
    "found.runtime": "Runtime",
    "engine": "ICudaEngine",
    "self._engine": "ICudaEngine",
    "self._context": "IExecutionContext",
}
needs_cuda = pytest.mark.skipif(
    not signatures.cuda_version(), reason="the CUDA bindings are not installed: pip install cuda-bindings"
)


def probe(module: str, libraries: list[Path]) -> tuple[str, list[str], list[str]]:
    command = [sys.executable, "-c", PROBE, module, *map(str, libraries)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    version, found, planted = json.loads(done.stdout.splitlines()[-1])
    return version, found, planted


def test_calls_exist_in_the_data_centre_edition(tmp_path: Path) -> None:
    libraries = null_libraries(tmp_path)
    version, found, planted = probe("tensorrt_bindings", libraries)
    assert version.startswith("11.4.") and not found
    assert len(planted) == 2 and all(any(text in each for each in planted) for text in PLANTED)


def test_calls_exist_in_rtx() -> None:
    _, found, planted = probe("tensorrt_rtx_bindings", rtx_libraries())
    assert not found and len(planted) == 2


def path_of(node: ast.expr) -> str:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return ".".join([node.id, *names]) if isinstance(node, ast.Name) else ""


def test_no_call_of_tensorrt_is_outside_the_list() -> None:
    used = set()
    for node in ast.walk(ast.parse(Path(str(tensorrt.__file__)).read_text("utf-8"))):
        path = path_of(node) if isinstance(node, ast.Attribute) else ""
        for holder, owner in HOLDERS.items():
            if path.startswith(f"{holder}.") and holder.count(".") == path.count(".") - 1 and path not in HOLDERS:
                used.add((owner, path.rpartition(".")[2]))
            elif owner == "" and path.startswith(f"{holder}.") and path.count(".") == holder.count(".") + 2:
                used.add(tuple(path.removeprefix(f"{holder}.").split(".")))
    listed = {(owner, member) for owner, members in CALLS.items() for member in members}
    classes = {("", owner) for owner in CALLS if owner}
    assert len(used) > 25 and not used - listed - classes


def test_no_call_of_cuda_is_outside_the_list() -> None:
    """`Cuda.call` looks into the list; what goes around it is this."""
    tree = ast.parse(Path(str(cuda.__file__)).read_text("utf-8"))
    around = {
        path.rpartition(".")[2]
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ".runtime." in f".{(path := path_of(node))}"
    }
    assert around == {*cuda.FIELDS, "cudaGetErrorString", "cudaStreamEndCapture", "cudaGraphExec_t", "cudaGetLastError"}
    named = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and (path_of(node.func).split(".")[-1] == "call")
    }
    assert named | around - {*cuda.FIELDS, "cudaGraphExec_t"} == cuda.CALLS.keys()


@needs_cuda
def test_cudas_signatures_are_those_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not signatures.check_cuda()
    with monkeypatch.context() as patch:
        patch.setitem(cuda.CALLS, "cudaMemcpyAsync", ("src", "dst", "count", "kind", "stream"))
        patch.setitem(cuda.CALLS, "cudaNothing", ())
        patch.setattr(cuda, "CONSTANTS", ("cudaMemcpyKind.cudaMemcpyNowhere",))
        patch.setattr(cuda, "FIELDS", {"cudaMemPoolProps": ("colour",)})
        problems = signatures.check_cuda()
    assert len(problems) == 4 and "cudaMemcpyAsync takes (dst, src, count, kind, stream), not (src, dst" in problems[0]


@needs_cuda
def test_cuda_takes_our_arguments() -> None:
    """The real functions convert every argument before they look for a driver."""
    from cuda.bindings import driver, runtime

    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU: made-up addresses are not for it, tests/gpu runs the real thing")
    real = cuda.Cuda(runtime)
    stream, pool, graph = runtime.cudaStream_t(7), runtime.cudaMemPool_t(7), runtime.cudaGraphExec_t(7)
    kind, mode = real.constant("cudaMemcpyKind.cudaMemcpyHostToDevice"), real.constant(cuda.CONSTANTS[8])
    attribute = real.constant("cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold")
    arguments: dict[str, tuple[Any, ...]] = {
        "cudaSetDevice": (0,),
        "cudaMemGetInfo": (),
        "cudaMemPoolCreate": (runtime.cudaMemPoolProps(),),
        "cudaMemPoolSetAttribute": (pool, attribute, real.number(2**64 - 1)),
        "cudaMemPoolTrimTo": (pool, 0),
        "cudaMemPoolDestroy": (pool,),
        "cudaStreamCreateWithFlags": (real.constant("cudaStreamNonBlocking"),),
        "cudaStreamSynchronize": (stream,),
        "cudaStreamDestroy": (stream,),
        "cudaMallocFromPoolAsync": (256, pool, stream),
        "cudaFreeAsync": (4096, stream),
        "cudaHostAlloc": (256, real.constant("cudaHostAllocDefault")),
        "cudaFreeHost": (4096,),
        "cudaMemcpyAsync": (4096, 8192, 16, kind, stream),
        "cudaMemcpy2DAsync": (4096, 16, 8192, 16, 4, 4, kind, stream),
        "cudaMemsetAsync": (4096, 0, 16, stream),
        "cudaMemset2DAsync": (4096, 16, 0, 4, 4, stream),
        "cudaStreamBeginCapture": (stream, mode),
        "cudaStreamEndCapture": (stream,),
        "cudaGraphInstantiate": (runtime.cudaGraph_t(7), 0),
        "cudaGraphLaunch": (graph, stream),
        "cudaGraphDestroy": (runtime.cudaGraph_t(7),),
        "cudaGraphExecDestroy": (graph,),
    }
    rest = cuda.CALLS.keys() - arguments.keys()
    assert rest == {"cudaGetDeviceCount", "cudaGetErrorString", "cudaGetLastError"}
    for name, values in arguments.items():
        with pytest.raises(EngineError, match=rf"{name} failed: .*\(CUDA error \d+\)"):
            real.call(name, *values)
    assert int(stream) == 7 and int(graph) == 7 and isinstance(real.number(5), driver.cuuint64_t)
    with pytest.raises(UnavailableError, match="no GPU that can be used"):
        cuda.cuda.__wrapped__()


def test_without_the_bindings_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MODULE", "cuda.bindings.absent")
    with pytest.raises(UnavailableError, match="pip install cuda-bindings"):
        cuda.cuda.__wrapped__()


def test_parameters_are_read_from_docstrings() -> None:
    text = (
        "f(*args, **kwargs)\nOverloaded function.\n\n1. f(self: a.B, name: str, shape: tuple[int, ...] = 3) -> bool\n"
    )
    text += "\n2. f(self: a.B, index: int) -> bool\n"
    function = SimpleNamespace(__name__="f", __doc__=text)
    assert signatures.overloads(function) == [("name", "shape"), ("index",)]
    assert signatures.overloads(SimpleNamespace(__name__="f", __doc__=None)) == []


def test_rtx_refuses_bytes_that_are_no_plan(tmp_path: Path) -> None:
    """The real runtime takes the mapped file, and its complaint becomes a sentence."""
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("TensorRT-RTX is not installed: pip install 'ming-trt[rtx]'")
    from builders import tensorrt_api

    trt = tensorrt_api.load("tensorrt-rtx").trt
    found = Library(trt, "tensorrt-rtx", "sm89")
    file = tmp_path / "model.plan"
    file.write_bytes(b"not a plan" * 300)
    entry = fake_tensorrt.entry(file, "dit", edition="tensorrt-rtx", version=found.version, devices=["sm89"])
    with pytest.raises(EngineError, match=r"the plan of 'dit' cannot be loaded \(.*magicTag.*\)"):
        load_plan(found, file, entry)
