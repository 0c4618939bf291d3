"""Picture engines in ONNX Runtime against the reference, at other sizes and batches than they were exported with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from builders.registry import component
from builders.verify import SEED
from ming_trt.bundle import DRAWING_ENGINES
from ming_trt.image_config import schedule_config, vae_config
from ming_trt.presets import DEFAULT_THRESHOLDS
from ming_trt.processing.draw import DrawOptions
from ming_trt.runtime.flow_match import FlowMatchSchedule, Guidance
from ming_trt.runtime.image import ImageEngines, ImageJob, ImageRequest, Prompt

from ..picture import cases, config, engine, kinds, module, no_grad, query_rows

# exporting the denoiser takes a while
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engines() -> ImageEngines:
    schedule, vae = schedule_config(config()), vae_config(config())
    opened = {name: engine(name) for name in DRAWING_ENGINES}
    return ImageEngines(
        opened, FlowMatchSchedule(schedule.shift, schedule.train_steps), vae.factor, vae.latent_channels
    )


@pytest.fixture(scope="module")
def prompts(engines: ImageEngines) -> dict[str, Prompt]:
    return {kind: engines.condition(query_rows(kind))[1] for kind in kinds("cond")}


@pytest.mark.parametrize("kind", kinds("cond"))
def test_condition(engines: ImageEngines, kind: str) -> None:
    condition, _ = engines.condition(query_rows(kind))
    cases().check(f"cond.{kind}.condition", condition)


def test_vae(engines: ImageEngines) -> None:
    latent = engine("vae_encoder").run({"image": cases().array("vae.image")[None]})["latent"]
    cases().check("vae.ref_latent", latent[0])
    decoded = engine("vae_decoder").run({"latent": cases().array("vae.latent")[None]})["image"]
    cases().check("vae.decoded", decoded[0])


def _job(engines: ImageEngines, prompt: Prompt, kind: str, guidance: Guidance) -> ImageJob:
    settings = cases().index["loop"]
    sigmas, times = engines.schedule.levels(settings["steps"])
    reference = None
    if kind == "edit":
        reference = engine("vae_encoder").run({"image": cases().array("vae.image")[None]})["latent"][0]
    hidden = np.zeros((256, config().llm.hidden_size), np.float32)
    request = ImageRequest(hidden, DrawOptions(steps=settings["steps"]))
    noise = cases().array(f"loop.{kind}.noise")
    return ImageJob(request, 0, prompt, reference, noise, sigmas, times, guidance, {"denoise": 0.0})


@pytest.mark.parametrize("name", ["t2i", "edit", *(f"edit_img.mode{mode}" for mode in range(1, 7))])
def test_loop(engines: ImageEngines, prompts: dict[str, Prompt], name: str) -> None:
    kind = name.split("_")[0].split(".")[0]
    if kind not in prompts:
        pytest.skip("the trimmed cases have no condition for it")
    settings = cases().index["loop"]
    image_cfg = settings["image_cfg"] if "mode" in name else 1.0
    mode = int(name[-1]) if "mode" in name else 1
    job = _job(engines, prompts[kind], kind, Guidance(settings["cfg"], image_cfg, mode))
    latents = []
    while not job.finished:
        engines.step([job])
        latents.append(job.latent)
    count = cases().arrays[f"loop.{name}.latents"]["shape"][0]
    cases().check(f"loop.{name}.latents", np.stack(latents[-count:]))
    if f"loop.{name}.image" in cases():
        cases().check(f"loop.{name}.image", engines.decode(job.latent))


def test_batch_of_two_equals_single_requests(engines: ImageEngines, prompts: dict[str, Prompt]) -> None:
    """Two requests with different guidance, a different number of branches and different steps done; 1e-4 on latents of
    size 10, which the order of summation alone explains."""
    guidances = (Guidance(5.0, 2.0, 1), Guidance(3.0, 1.5, 3))
    alone = [_job(engines, prompts["edit"], "edit", guidance) for guidance in guidances]
    for job in alone:
        while not job.finished:
            engines.step([job])
    first, second = (_job(engines, prompts["edit"], "edit", guidance) for guidance in guidances)
    engines.step([first])
    while not second.finished:
        engines.step([second] if first.finished else [first, second])
    for together, single in zip((first, second), alone, strict=True):
        assert np.abs(together.latent - single.latent).max() < 1e-4


def test_gate_passes() -> None:
    """The numerics gate of the build, for every picture engine."""
    limits = DEFAULT_THRESHOLDS["fp32"]
    for name in DRAWING_ENGINES:
        feeds = component(name).sample_feeds(config(), np.random.default_rng(SEED))
        expected = no_grad(module(name), *(torch.from_numpy(value) for value in feeds.values()))
        expected = expected if isinstance(expected, tuple) else (expected,)
        for got, wanted in zip(engine(name).run(feeds).values(), expected, strict=True):
            assert np.abs(got - wanted.numpy()).max() <= limits.max_relative * wanted.abs().max()
