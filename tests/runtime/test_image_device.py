"""The denoiser on TensorRT's engine class: what stays the same goes to the device once, and a step is captured.

The device is host memory and the plan ONNX Runtime (`host_device.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ming_trt.processing.draw import DrawOptions
from ming_trt.runtime.flow_match import FlowMatchSchedule
from ming_trt.runtime.image import ImageEngines, ImageJob, ImageRequest
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

from .host_device import open_host_engine
from .test_image_worker import D, H, NumpyEngine


def denoiser(path: Path) -> Path:
    """velocity = latent / 10 + the sum of `pooled` + the mean of `context` + time / 1000 + the number of tokens."""
    float_, names = TensorProto.FLOAT, ["batch", 16, "height", "width"]
    shapes = {
        "latent": (float_, names),
        "time": (float_, ["batch"]),
        "context": (float_, ["batch", 256, D]),
        "pooled": (float_, ["batch", D]),
        "reference": (float_, ["batch", 16, "reference_height", "reference_width"]),
        "token_index": (TensorProto.INT64, ["tokens"]),
    }
    constants = {"tenth": 0.1, "thousandth": 1e-3}
    nodes = [
        helper.make_node("Mul", ["latent", "tenth"], ["small"]),
        helper.make_node("ReduceSum", ["pooled", "last"], ["told"], keepdims=0),
        helper.make_node("ReduceMean", ["context", "rest"], ["meant"], keepdims=0),
        helper.make_node("ReduceMean", ["reference", "all"], ["shown"], keepdims=0),
        helper.make_node("Mul", ["time", "thousandth"], ["late"]),
        helper.make_node("ReduceMax", ["token_index"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["count"], to=float_),
        helper.make_node("Mul", ["count", "thousandth"], ["many"]),
        helper.make_node("Sum", ["told", "meant", "shown", "late", "many"], ["push"]),
        helper.make_node("Unsqueeze", ["push", "all"], ["wide"]),
        helper.make_node("Add", ["small", "wide"], ["velocity"]),
    ]
    graph = helper.make_graph(
        nodes,
        "denoiser",
        [helper.make_tensor_value_info(name, *spec) for name, spec in shapes.items()],
        [helper.make_tensor_value_info("velocity", float_, names)],
        [
            *(onnx.numpy_helper.from_array(np.float32(value), name) for name, value in constants.items()),
            *(
                onnx.numpy_helper.from_array(np.array(axes), name)
                for name, axes in {"last": [1], "rest": [1, 2], "all": [1, 2, 3]}.items()
            ),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), path)
    return path


def engines(dit: Any) -> ImageEngines:
    made = {
        "connector": NumpyEngine("connector", lambda hidden: {"condition": hidden}),
        "condition": NumpyEngine(
            "condition", lambda condition: {"context": condition[..., :D], "pooled": condition.mean(1)[:, :D]}
        ),
        "dit": dit,
        "vae_encoder": NumpyEngine("vae_encoder", lambda image: {"latent": image}),
        "vae_decoder": NumpyEngine("vae_decoder", lambda latent: {"image": latent}),
    }
    return ImageEngines(made, FlowMatchSchedule(3.0), 8, 16)


def drawn(stages: ImageEngines) -> list[np.ndarray]:
    """The latents of three pictures of which the second joins late and the first leaves early."""
    steps = (5, 7, 8)
    jobs = [
        stages.start(ImageRequest(np.full((256, H), 0.1 * i, np.float32), DrawOptions(steps=n, seed=i)))
        for i, n in enumerate(steps)
    ]
    active: list[ImageJob] = jobs[:1]
    for step in range(12):
        if step in (2, 4):
            active.append(jobs[step // 2])
        if active:
            stages.step(active)
        active = [job for job in active if not job.finished]
    assert all(job.finished for job in jobs)
    return [job.latent for job in jobs]


def test_pictures_are_those_of_an_engine_without_memory_of_its_own(tmp_path: Path) -> None:
    path = denoiser(tmp_path / "model.onnx")
    expected = drawn(engines(OnnxRuntimeEngine(path, "dit", threads=1)))
    dit = open_host_engine(path, "dit", capture=True, shrink_memory=True)
    placed: list[int] = []
    place = dit.place

    def counted(array: Any, over: Any) -> Any:
        placed.append(array.nbytes)
        return place(array, over)

    dit.place = counted  # type: ignore[method-assign]
    stages = engines(dit)
    for got, wanted in zip(drawn(stages), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    first = dit.counts.captured
    assert dit.counts.launched > 0 and first >= 2
    # four inputs for each of the five sets of pictures that shared steps, not for each of the twelve steps
    assert len(placed) == 20
    for _ in range(2):  # pictures to come find their places and the graphs
        before, runs, launched = dit.counts.captured, dit.counts.runs, dit.counts.launched
        drawn(stages)
    assert dit.counts.captured == before and dit.counts.launched - launched == dit.counts.runs - runs
    dit.close()
