"""What FP8 costs each linear layer, and each matrix of routed experts, on the inputs it gets in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from builders.component import Feeds
from builders.fp8 import LARGEST, Range, fake_quantised, weight_scales
from builders.fp8_steps import TIME, ranges_of, scale_at
from builders.layers import LayerReport
from builders.precision import FP8PerChannel, Scheme, kept
from builders.reference import run_definition
from builders.tensors import Array
from builders.verify import compare
from ming_trt.presets import Thresholds

if TYPE_CHECKING:
    import torch

    from ming_trt.models.llm import MoE

# Of one linear layer against the same layer in float32. Two operands of three mantissa bits give about 28 dB.
LINEAR_FLOOR_DB = 25.0
_LINEAR = Thresholds(1.0, 0.99, LINEAR_FLOOR_DB)


def read_amax(calibration: Mapping[str, Any]) -> dict[str, Range]:
    """The magnitudes that a manifest keeps."""
    return {
        str(name): tuple(map(float, value)) if isinstance(value, list | tuple) else float(value)
        for name, value in calibration.get("input_amax", {}).items()
    }


def linears_of(module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The linear layers of a definition by name."""
    import torch

    return {name: inner for name, inner in module.named_modules() if isinstance(inner, torch.nn.Linear)}


def at_times(amax: Mapping[str, Range], made: Scheme, feeds: Feeds) -> dict[str, float]:
    """The magnitudes that scales are made of in a step with these inputs."""
    steps = made.steps if isinstance(made, FP8PerChannel) else ()
    chosen = ranges_of(feeds[TIME], steps) if steps else []
    return {name: scale_at(v, chosen) if isinstance(v, tuple) else v for name, v in amax.items()}


def linear_errors(module: torch.nn.Module, feeds: Feeds, amax: Mapping[str, float]) -> tuple[LayerReport, ...]:
    """Each layer that FP8 takes, on the input it gets in float32: its product in FP8 against the exact one.

    Of routed experts each matrix is such a layer; the report is of the worst of a stack, and its note says which.
    """
    import torch

    from ming_trt.models.llm import MoE

    reports: dict[str, LayerReport] = {}

    def product(name: str, x: Array, weight: Array) -> LayerReport:
        scales = weight_scales(weight, 0, True)[:, None]
        rounded = fake_quantised(x, amax[name] / LARGEST) @ fake_quantised(weight, scales).T
        found = compare(name, rounded, x @ weight.T, _LINEAR)
        return LayerReport(name, "FP8", found.max_abs, found.relative, found.sqnr_db, found.verdict, found.note)

    def linear(name: str, layer: torch.nn.Linear) -> Any:
        def measure(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
            x = inputs[0].detach().numpy().reshape(-1, layer.in_features)
            reports[name] = product(name, x, layer.weight.detach().numpy())

        return layer.register_forward_hook(measure)

    def experts(name: str, moe: MoE) -> Any:
        def measure(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
            x = inputs[0].detach().flatten(0, 1)
            chosen, _weights = moe.route(moe.router_logits(inputs[0], inputs[1]).flatten(0, 1))
            for expert in torch.unique(chosen).tolist():
                rows = x[(chosen == expert).any(-1)]
                gate, up = torch.nn.functional.linear(rows, moe.gate_up[expert]).chunk(2, dim=-1)
                inner = torch.nn.functional.silu(gate) * up
                for part, values in (("gate_up", rows), ("down", inner)):
                    weight = getattr(moe, part)[expert].detach().numpy()
                    found = product(f"{name}.{part}", values.detach().numpy(), weight)
                    worst = reports.get(found.name)
                    if worst is None or found.sqnr_db < worst.sqnr_db:
                        note = "; ".join(filter(None, (f"worst expert: {expert}", found.note)))
                        reports[found.name] = replace(found, note=note)

        return moe.register_forward_hook(measure)

    handles = [
        linear(name, layer) for name, layer in linears_of(module).items() if name in amax and not kept(f"{name}.weight")
    ]
    handles += [
        experts(name, inner)
        for name, inner in module.named_modules()
        if isinstance(inner, MoE) and f"{name}.gate_up" in amax
    ]
    run_definition(module, feeds, handles)
    return tuple(reports.values())
