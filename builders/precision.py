"""Precision schemes: what each name of the precision map means on a target, and what no scheme touches.

A preset maps components to names ("bf16", "fp16", "fp32", "fp8"); this module says what a name stands for. Nothing is
quantised that the map does not name, and of a named component only linear layers with weights of their own, but for
those of `KEPT`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from builders import tensorrt_api as api
from ming_trt.errors import BuildError


@dataclass(frozen=True, slots=True)
class Floats:
    """No quantisation: weights and activations in `floats` ("fp32", "fp16", "bf16")."""

    floats: str


@dataclass(frozen=True, slots=True)
class FP8PerChannel:
    """E4M3 for linear layers: one weight scale per output, one static scale per input; the rest in `floats`.

    Explicit Q/DQ. TensorRT multiplies in FP8 and scales the sum, so the finer weight scales cost nothing. So do routed
    experts (`builders/fp8_experts.py`). `steps` are bounds of the denoiser's `time` between which inputs have a scale
    of their own (`builders/fp8_steps.py`); none = one scale for all.
    """

    floats: str = "bf16"
    steps: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class FP8PerTensor:
    """E4M3 with one scale per weight matrix (and per expert) and one static scale per input; the rest in `floats`."""

    floats: str = "bf16"


Scheme = Floats | FP8PerChannel | FP8PerTensor

_FLOATS: dict[str, Scheme] = {name: Floats(name) for name in ("fp32", "fp16", "bf16")}
SCHEMES: Mapping[str, Mapping[str, Scheme]] = {
    api.FULL: {**_FLOATS, "fp8": FP8PerChannel()},
    api.RTX: {**_FLOATS, "fp8": FP8PerChannel()},
    # its MoE kernels take one weight scale per expert
    "tensorrt-llm": {"bf16": Floats("bf16"), "fp8": FP8PerTensor()},
}
# Engines whose inputs differ from step to step: bounds of `time`. With the published schedule (shift 3) each range has
# a quarter of the steps.
STEP_BOUNDS: Mapping[str, tuple[float, ...]] = {"dit": (500.0, 750.0, 900.0)}
# Parts of names of weights that stay in the scheme's floats, and why.
KEPT: Mapping[str, str] = {
    r"\.gates\.": "routers choose experts: an error there is not small",
    r"attention\.(query_key_value|dense)(\.|$)": "the language model's attention: most of the error, few weights",
    r"lm_head": "the projection over the vocabulary decides which token is chosen",
    r"(^|\.)proj_out\.": "the last projection of a denoiser: its error is the output's",
    r"(patch_embed|pos_embed|time_text_embed|time_mlp|word_embeddings|embed_tokens)": "embeddings: read once, cheap",
    r"(norm1|norm1_context|norm_out)\.linear": "modulation multiplies every token",
    r"(f0_predictor|m_source)\.": "an error of pitch adds up in the phase",
    r"(vp_head|spk_embed_affine_layer)\.": "one row, cheap",
}
# What a component cannot be built in, by target, and why.
_REFUSED: Mapping[tuple[str, str], str] = {
    ("vocoder", "bf16"): "its transposed convolutions have no bf16 kernel in TensorRT; use fp16 or fp32",
    ("f0_predictor", "fp8"): "it is made of convolutions; use fp32",
    ("vocoder", "fp8"): "it has no linear layers worth it; use fp16 or fp32",
    ("vae_encoder", "fp8"): "it is made of convolutions; use bf16 or fp16",
    ("vae_decoder", "fp8"): "it is made of convolutions; use bf16 or fp16",
}


def scheme(target: str, component: str, precision: str) -> Scheme:
    """What `precision` of the map means for `component`. Raises `BuildError` if the target cannot take it."""
    known = SCHEMES.get(target, {})
    if precision not in known:
        raise BuildError(
            f"precision of {component} is {precision}, for which target {target} has no scheme: "
            f"use {', '.join(known) or 'another target'}"
        )
    reason = _REFUSED.get((component, precision))
    if reason and target in api.TARGETS:
        raise BuildError(f"precision of {component} is {precision}: {reason}")
    found = known[precision]
    return replace(found, steps=STEP_BOUNDS.get(component, ())) if isinstance(found, FP8PerChannel) else found


def kept(weight: str) -> str:
    """Why a weight of that parameter name is not quantised, or "" if it may be."""
    return next((why for pattern, why in KEPT.items() if re.search(pattern, weight)), "")
