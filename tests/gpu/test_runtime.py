"""The runtime's CUDA layer on a GPU: memory, copies, page-locked staging, captured graphs, and engines over them.

The plan is three kernels (`cached_plan.cu`), so no TensorRT is needed; docs/gpu-first-run.md goes on with it.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ming_trt.errors import EngineError
from ming_trt.runtime.device import CaptureError, Queue, Range, Shape
from ming_trt.runtime.device_array import DeviceArray, upload
from ming_trt.runtime.device_engine import DeviceEngine
from ming_trt.runtime.engine import TensorSpec
from tests.gpu import gpu
from tests.plugins import binding

pytest.importorskip("cuda.bindings.runtime", reason="the CUDA bindings are not installed: pip install cuda-bindings")

from ming_trt.runtime.cuda import Stream

pytestmark = [pytest.mark.gpu, gpu.needs_gpu]

WIDTH = 64
F4, I8 = np.dtype(np.float32), np.dtype(np.int64)


@pytest.fixture
def stream() -> Iterator[Stream]:
    made = Stream()
    yield made
    made.close()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    out = tmp_path_factory.mktemp("plan") / "cached_plan.so"
    compiler, architecture = binding.nvcc(), gpu.architecture()
    assert compiler is not None
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [compiler, "-std=c++17", "-O2", "-shared", "-Xcompiler", "-fPIC", target, "-o", str(out)]
    subprocess.run([*command, str(Path(__file__).with_name("cached_plan.cu"))], check=True, capture_output=True)
    loaded = ctypes.CDLL(str(out))
    loaded.cached_plan.argtypes = [*[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 5, ctypes.c_void_p]
    return loaded


class CachedPlan:
    """See `ming_trt.runtime.device.Plan`: x squared, and `y` = x + the sum of the cache once `new` is written to it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        cache = ("B", 1, "T", WIDTH)
        self.inputs = {
            "x": TensorSpec("x", F4, ("N",)),
            "past": TensorSpec("past", F4, cache),
            "new": TensorSpec("new", F4, ("B", 1, "S", WIDTH)),
            "write_index": TensorSpec("write_index", I8, ("B",)),
        }
        self.outputs = {
            "y": TensorSpec("y", F4, ("N",)),
            "square": TensorSpec("square", F4, ("N",)),
            "present": TensorSpec("present", F4, cache),
        }
        self.profiles = [
            {
                "x": Range((1,), (100000,)),
                "past": Range((1, 1, 1, WIDTH), (8, 1, 64, WIDTH)),
                "new": Range((1, 1, 1, WIDTH), (8, 1, 64, WIDTH)),
                "write_index": Range((1,), (8,)),
            }
        ]
        self.aliases = {"present": "past"}
        self.weight_bytes = 0
        self.fail = False

    def scratch(self, profile: int) -> int:
        return 1024

    def context(self, profile: int, queue: Queue) -> CachedContext:
        return CachedContext(self, queue)

    def close(self) -> None: ...


class CachedContext:
    def __init__(self, plan: CachedPlan, queue: Queue) -> None:
        self.plan, self.queue = plan, queue
        self.shapes: dict[str, Shape] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = 0

    def set_scratch(self, address: int, size: int) -> None:
        self.scratch = address

    def set_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        self.shapes = dict(shapes)
        return {"y": shapes["x"], "square": shapes["x"], "present": shapes["past"]}

    def set_addresses(self, addresses: Mapping[str, int]) -> None:
        assert addresses["past"] == addresses["present"] and all(a % 256 == 0 for a in addresses.values())
        self.addresses = dict(addresses)

    def enqueue(self) -> None:
        if self.plan.fail:
            self.queue.wait()  # not allowed while a stream is captured
        rows, _, capacity, width = self.shapes["past"]
        names = ("x", "past", "new", "write_index", "y", "square")
        sizes = (self.shapes["x"][0], rows, capacity, self.shapes["new"][2], width)
        places = [self.addresses[name] for name in names]
        status = self.plan.library.cached_plan(*places, self.scratch, *sizes, self.queue.handle)
        if status:
            raise EngineError(f"the kernels could not be queued (CUDA error {status})")


def feeds(cache: Any, x: float, at: int = 0, rows: int = 1, count: int = 5) -> dict[str, Any]:
    return {
        "x": np.full(count, x, np.float32),
        "past": cache,
        "new": np.full((rows, 1, 1, WIDTH), x, np.float32),
        "write_index": np.full(rows, at, np.int64),
    }


@pytest.mark.parametrize("seed", range(8))
def test_arrays_do_what_numpys_do(stream: Stream, seed: int) -> None:
    choose = random.Random(seed)
    shape = tuple(choose.randint(1, 9) for _ in range(4))
    expected = np.random.default_rng(seed).integers(0, 100, shape).astype(choose.choice([np.float32, np.uint16]))
    array, other = upload(stream, expected), upload(stream, expected[::-1])
    source = expected[::-1].copy()
    for _ in range(10):
        keys = []
        for size in shape:
            start = choose.randint(0, size)
            whole = slice(start, choose.randint(start, size))
            keys.append(choose.randrange(size) if choose.random() < 0.3 else whole)
        key = tuple(keys[: choose.randint(1, 4)])
        if choose.random() < 0.5:
            array[key] = 0
            expected[key] = 0
        else:
            array[key] = other[key]
            expected[key] = source[key]
        np.testing.assert_array_equal(array.numpy(), expected)
        np.testing.assert_array_equal(array[key].numpy(), expected[key])


def test_memory_comes_back(stream: Stream) -> None:
    arrays = [DeviceArray.zeros(stream, (1 << 20,), np.float32) for _ in range(4)]
    assert stream.bytes_in_use == 16 << 20 and len({array.address % 256 for array in arrays}) == 1
    del arrays
    assert stream.bytes_in_use == 0
    stream.trim()
    with pytest.raises(EngineError, match=r"the GPU has no 1073741824\.0 MiB left"):
        stream.allocate(1 << 50)
    # and the error is forgotten
    assert not DeviceArray.zeros(stream, (7,), np.float32).numpy().any()


def test_a_graph_copies_what_is_in_the_pinned_memory_when_it_is_launched(stream: Stream) -> None:
    source, target = stream.pinned(4096), stream.pinned(4096)
    block = DeviceArray.zeros(stream, (4096,), np.uint8)
    source[:], target[:] = 1, 9

    def work() -> None:
        stream.upload(block.address, int(source.ctypes.data), 4096)
        stream.download(int(target.ctypes.data), block.address, 4096)

    graph = stream.capture(work)
    stream.wait()
    assert (target == 9).all(), "capturing ran it"
    for value in (3, 200):
        source[:] = value
        stream.launch(graph)
        stream.wait()
        assert (target == value).all()
    stream.release(graph)
    stream.unpin(source)
    stream.unpin(target)


def test_a_capture_that_fails_leaves_the_stream_usable(stream: Stream) -> None:
    block = DeviceArray.zeros(stream, (64,), np.float32)

    def wait() -> None:
        stream.wait()

    def raise_error() -> None:
        stream.copy(block.address, block.address, 0)
        raise EngineError("no")

    for work in (wait, raise_error):
        with pytest.raises(CaptureError):
            stream.capture(work)
        assert not block.numpy().any()
    graph = stream.capture(lambda: stream.clear_rows(block.address, 256, 256, 1))
    stream.launch(graph)
    stream.wait()


@pytest.mark.parametrize("capture", [False, True])
def test_a_cache_is_written_in_place_step_by_step(library: ctypes.CDLL, capture: bool) -> None:
    engine = DeviceEngine("cached", CachedPlan(library), Stream(), capture=capture)
    cache: Any = engine.zeros((4, 1, 32, WIDTH), np.float32)
    twin = np.zeros((4, 1, 32, WIDTH), np.float32)
    for step in range(24):
        rows = 1 + step // 8
        result = engine.run(feeds(cache[:rows], step + 1, step, rows), ["y", "square"], {"present": cache[:rows]})
        twin[:rows, :, step] = step + 1
        np.testing.assert_array_equal(result["y"], np.float32(step + 1 + twin[:rows].sum()))
        np.testing.assert_array_equal(result["square"], np.float32((step + 1) ** 2))
    np.testing.assert_array_equal(cache.numpy(), twin)
    assert (engine.counts.captured, engine.counts.launched) == ((3, 18) if capture else (0, 0))
    assert not engine.counts.refused
    engine.close()


def test_host_and_device_arrays_mix(library: ctypes.CDLL) -> None:
    engine = DeviceEngine("cached", CachedPlan(library), Stream(), capture=True)
    held: Any = engine.place(np.ones((2, 1, 4, WIDTH), np.float32))
    for step in range(6):
        past = held if step % 2 else np.ones((2, 1, 4, WIDTH), np.float32)
        target = np.empty((2, 1, 4, WIDTH), np.float32)
        result = engine.run(feeds(past, step, 1, rows=2), ["y"], {"present": target})
        assert (target[:, :, 1] == step).all() and (target[:, :, 2] == 1).all()
        np.testing.assert_array_equal(result["y"], step + target.sum())
        assert (held.numpy() == 1).all(), "an array that is only read was written"
    # more rows than before move the buffers under the graphs
    for count in (5, 90000, 5):
        result = engine.run(feeds(held, 2, 1, rows=2, count=count), ["y"])
        assert result["y"].shape == (count,) and (result["y"] == 2 + 6 * WIDTH + 4 * WIDTH).all()
    engine.close()


def test_runs_that_cannot_be_captured_run_piece_by_piece(library: ctypes.CDLL) -> None:
    plan = CachedPlan(library)
    plan.fail = True
    engine = DeviceEngine("cached", plan, Stream(), capture=True)
    cache: Any = engine.zeros((1, 1, 8, WIDTH), np.float32)
    for step in range(5):
        result = engine.run(feeds(cache, 1, step), ["y"], {"present": cache})
        assert (result["y"] == 1 + WIDTH * (step + 1)).all()
    assert engine.counts.captured == 0 and sum(engine.counts.refused.values()) == 1
    engine.close()


def test_engines_of_two_threads_do_not_disturb_each_other(library: ctypes.CDLL) -> None:
    """Captures of one thread happen while the other allocates and copies."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            engine = DeviceEngine("cached", CachedPlan(library), Stream(), capture=True)
            for round_ in range(4):
                cache: Any = engine.zeros((1, 1, 16, WIDTH), np.float32)
                for step in range(8):
                    value = seed + round_ + step
                    result = engine.run(feeds(cache, value, 3, count=5 + round_), ["y"], {"present": cache})
                    assert (result["y"] == value + WIDTH * value).all()
            engine.close()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
