"""One denoising step for a picture of 512 x 512 pixels: the denoiser at full width with four layers, two guidance
branches, our float32 and int8 engines against torch.

Layers: two of four with dual attention (official: 13 of 24), and the two refiners of each branch, as many as official.
Weights are random, so the pictures show nothing; that the int8 one resembles the float32 one is what they are for.

    python benchmarks/image.py [--threads N] [--seconds S] [--steps N] [--no-compile] [--reference]
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import CACHE, Measurement, Work, against, arguments, cores, finish, measure_ceiling
from random_model import RandomCheckpoint, config, engine_file
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from builders.dit import DiT
from builders.main_shard import MainShardComponent
from builders.vae import DECODER
from ming_trt.config import MingConfig
from ming_trt.image_config import dit_config, schedule_config
from ming_trt.models.weights import load_weights
from ming_trt.processing.query import USED
from ming_trt.runtime.flow_match import F32, FlowMatchSchedule, Guidance, euler_step, initial_noise
from ming_trt.runtime.onnxruntime import OnnxRuntimeEngine

TARGET = 1.3
# Cosine of the velocities with torch's float32 one, below which candidates do not compute the same.
CLOSE = 0.99
LATENT = 64


def main() -> None:
    options = arguments(
        str(__doc__),
        steps={"type": int, "default": 4, "help": "denoising steps of the pictures that are compared"},
        compile_both={"action": "store_true", "help": "torch.compile in float32 too, which compiles for minutes"},
        no_compile={"action": "store_true", "help": "leave torch.compile out"},
        reference={"action": "store_true", "help": "also an edit: the reference's tokens beside the picture's"},
    )
    threads, side = cores(options.threads), 8 if options.tiny else LATENT
    torch.set_num_threads(threads)
    model = picture_model(options.tiny)
    ours = {
        precision: OnnxRuntimeEngine(engine_file(DiT(), model, precision), "dit", threads=threads)
        for precision in ("int8", "fp32")
    }
    modules = {dtype: _load(DiT(), model, dtype) for dtype in (torch.bfloat16, torch.float32)}
    feeds = step_inputs(model, side)
    flops = _flops(model, feeds)

    work: dict[str, Work] = {precision: _engine(engine, feeds) for precision, engine in ours.items()}
    eager = {f"torch eager {_name(dtype)}": _torch(module, feeds) for dtype, module in modules.items()}
    compiled: dict[str, Work] = {}
    spent: dict[str, float] = {}
    if not options.no_compile:
        for dtype in modules if options.compile_both else [torch.bfloat16]:
            label = f"torch.compile {_name(dtype)}"
            compiled[label] = _torch(torch.compile(modules[dtype], dynamic=False), feeds)
            began = time.perf_counter()
            compiled[label]()
            spent[f"{label}, first call, s"] = time.perf_counter() - began
    peers = {**eager, **compiled}
    exact = eager["torch eager float32"]()
    velocities = {name: run() for name, run in {**work, **peers}.items()}
    cosines = {name: _cosine(velocity, exact) for name, velocity in velocities.items()}
    if min(cosines.values()) < CLOSE:
        raise SystemExit(f"the velocities have the cosines {cosines} with torch's: they do not compute the same")

    ceiling = measure_ceiling(threads)
    times = _rounds({**work, **peers}, options.seconds)
    print({name: round(1000 * each.median) for name, each in times.items()}, file=sys.stderr)
    quality = _pictures(model, ours, feeds, options.steps)
    rows = [
        against(
            times[precision],
            [times[peer] for peer in peers],
            f"a step, 512 x 512, {precision}",
            TARGET if precision == "int8" and not options.tiny else 0,
            GFLOP=flops / 1e9,
            MFU=flops / times[precision].median / ceiling.float32_flops_per_s,
            cosine=cosines[precision],
            **{"PSNR of the velocity, dB": psnr(velocities[precision], exact)},
            **(quality if precision == "int8" else {}),
        )
        for precision in work
    ]
    for row in rows:
        row.more |= {"cosines": cosines, "compile_s": spent}
    if options.reference:
        edit = step_inputs(model, side, reference=True)
        both: dict[str, Work] = {
            "int8": _engine(ours["int8"], edit),
            "torch eager bfloat16": _torch(modules[torch.bfloat16], edit),
        }
        edits = _rounds(both, 0)
        cost = _flops(model, edit)
        mfu = cost / edits["int8"].median / ceiling.float32_flops_per_s
        what = "a step, 512 x 512 with reference, int8"
        rows.append(against(edits["int8"], [edits["torch eager bfloat16"]], what, GFLOP=cost / 1e9, MFU=mfu))
    note = f"PSNR against the peak-to-peak range of float32's; pictures after {options.steps} steps"
    finish("image", rows, options, ceiling, note)


def picture_model(tiny: bool) -> MingConfig:
    """A configuration whose folder holds the files of the picture path, with the official sizes but for the depth."""
    folder = CACHE / ("picture-tiny" if tiny else "picture")
    heads, widths = (2, [16, 16, 32, 32]) if tiny else (24, [128, 256, 512, 512])
    files: dict[str, dict[str, Any]] = {
        "transformer/config.json": {
            "attention_head_dim": 64, "num_attention_heads": heads, "caption_projection_dim": 64 * heads,
            "dual_attention_layers": [0, 1], "in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096,
            "num_layers": 4, "num_refiner_layers": 2, "patch_size": 2, "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384, "qk_norm": "rms_norm", "sample_size": 128, "vae_ref_channel_cat": False,
        },
        "vae/config.json": {
            "act_fn": "silu", "block_out_channels": widths, "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 16,
            "layers_per_block": 2, "mid_block_add_attention": True, "norm_num_groups": 8 if tiny else 32,
            "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_post_quant_conv": False, "use_quant_conv": False,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
        },
    }  # fmt: skip
    for name, values in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    # no position tables among the tensors: they come from their formula
    save_file({"unused": torch.zeros(1)}, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return dataclasses.replace(config(tiny), folder=Path(folder))


def step_inputs(model: MingConfig, side: int, reference: bool = False) -> dict[str, Any]:
    """The denoiser's inputs for the two branches of one picture: without and with the prompt."""
    c, rng = dit_config(model), np.random.default_rng(0)
    latent = initial_noise(1, (c.channels, side, side))
    tokens = (side // c.patch) ** 2

    def normal(*shape: int) -> F32:
        return rng.standard_normal(shape, dtype=np.float32)

    small = side if reference else c.patch
    return {
        "latent": np.stack([latent, latent]),
        "time": np.full(2, 1000, np.float32),
        "context": normal(2, USED, c.hidden),
        "pooled": normal(2, c.hidden),
        "reference": normal(1, c.channels, small, small).repeat(2, 0),
        "token_index": np.arange(2 * tokens if reference else tokens),
    }


def _rounds(candidates: dict[str, Work], seconds: float) -> dict[str, Measurement]:
    """Like `interleave`, without runs that do not count: a step takes seconds, its weights are read in milliseconds.

    Three rounds at least; every candidate has run before.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names, rounds, end = list(candidates), 0, time.perf_counter() + seconds
    while rounds < 3 or time.perf_counter() < end:
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            candidates[name]()
            times[name].append(time.perf_counter() - started)
        rounds += 1
    return {name: Measurement(name, tuple(values)) for name, values in times.items()}


def psnr(ours: F32, exact: F32) -> float:
    """Peak signal-to-noise ratio in dB; the peak is the range of `exact`."""
    error = float(np.square(np.float64(ours) - exact).mean())
    return 10 * float(np.log10(np.ptp(exact) ** 2 / error)) if error else float("inf")


def _pictures(
    model: MingConfig, ours: dict[str, OnnxRuntimeEngine], feeds: dict[str, Any], steps: int
) -> dict[str, float]:
    """The PSNR of int8's last latent and of its decoded picture (the middle quarter) against float32's."""
    schedule = schedule_config(model)
    sigmas, times = FlowMatchSchedule(schedule.shift, schedule.train_steps).levels(steps)
    guidance, ends = Guidance(), {}
    for precision, engine in ours.items():
        latent = feeds["latent"][0]
        for i, moment in enumerate(times):
            step = {**feeds, "latent": np.stack([latent, latent]), "time": np.full(2, moment, np.float32)}
            velocity = engine.run(step)["velocity"]
            guided = guidance.combine(dict(zip(guidance.branches(False), velocity, strict=True)), False)
            latent = euler_step(latent, guided, sigmas[i], sigmas[i + 1])
        ends[precision] = latent
    quarter = ends["fp32"].shape[-1] // 4
    middle = slice(quarter, 3 * quarter)
    decoder = _load(DECODER, model, torch.float32)
    with torch.inference_mode():
        pictures = {
            name: np.clip(decoder(torch.from_numpy(latent[None, :, middle, middle])).numpy() / 2 + 0.5, 0, 1)
            for name, latent in ends.items()
        }
    error = float(np.square(np.float64(pictures["int8"]) - pictures["fp32"]).mean())
    return {
        "PSNR of the latent, dB": psnr(ends["int8"], ends["fp32"]),
        "PSNR of the picture, dB": -10 * float(np.log10(error)),
        "spread of the picture": float(pictures["fp32"].std()),
    }


def _load(component: MainShardComponent, model: MingConfig, dtype: torch.dtype) -> torch.nn.Module:
    with torch.device("meta"):
        module = component.module(model)
    load_weights(module, RandomCheckpoint(), component.sources(model), dtype)  # type: ignore[arg-type]
    return module


def _flops(model: MingConfig, feeds: dict[str, Any]) -> float:
    """Operations of the products and of attention, as torch counts them."""
    with torch.device("meta"):
        module = DiT().module(model)
        inputs = [torch.from_numpy(array).to("meta") for array in feeds.values()]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return float(counter.get_total_flops())


def _engine(engine: OnnxRuntimeEngine, feeds: dict[str, Any]) -> Work:
    return lambda: engine.run(feeds)["velocity"]


def _torch(module: Callable[..., torch.Tensor], feeds: dict[str, Any]) -> Callable[[], F32]:
    inputs = [torch.from_numpy(array) for array in feeds.values()]

    def run() -> F32:
        with torch.inference_mode():
            velocity: F32 = module(*inputs).numpy()
            return velocity

    return run


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cosine(one: Any, two: Any) -> float:
    return float((one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two))


if __name__ == "__main__":
    main()
