"""What the kernels must compute, in torch and float64. Meaning: ming_trt/models/ops.py and ming_trt/models/rope.py.

Written out once more because tests/gpu runs where only torch is; tests/plugins/test_contract.py ties the two together.
"""

from __future__ import annotations

import torch

THREE_D, VIDEO = "3D", "video_rope"


def frequency_axes(kind: str, sections: tuple[int, int, int]) -> list[int]:
    time, height, width = sections
    if kind == THREE_D:
        return [0] * time + [1] * height + [2] * width
    assert kind == VIDEO
    return [1 + j % 2 for j in range(height + width)] + [0] * time


def cos_sin(positions: torch.Tensor, inverse: torch.Tensor, axes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 [B, S, half] for positions [3, B, S]. The angle is a float32 product, as the contract says."""
    chosen = positions.float().index_select(0, torch.tensor(axes, device=positions.device)).permute(1, 2, 0)
    angle = (chosen * inverse.float()).double()
    return angle.cos(), angle.sin()


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Float64, for x [B, heads, S, D]."""
    low, high = x.double().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def chosen_logits(logits: torch.Tensor, modality: torch.Tensor | None) -> torch.Tensor:
    """[N, E] of [N, 3 E] by modality code: 2 audio, 1 image, else text."""
    if modality is None:
        return logits
    text, image, audio = logits.chunk(3, dim=-1)
    code = modality.unsqueeze(-1)
    return torch.where(code == 2, audio, torch.where(code == 1, image, text))


def route(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids and float64 weights [N, top_k], best first, ties to the lower expert."""
    probability = logits.double().softmax(dim=-1)
    weight, expert = probability.sort(dim=-1, descending=True, stable=True)
    weight, expert = weight[:, :top_k], expert[:, :top_k]
    return expert, weight / weight.sum(-1, keepdim=True) if normalize else weight


def sparse_moe(
    x: torch.Tensor,
    logits: torch.Tensor,
    modality: torch.Tensor | None,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    normalize: bool,
    addend: torch.Tensor | None = None,
    rounding: tuple[float, float] | None = None,
) -> torch.Tensor:
    """Float64 [N, H]. Nothing is rounded on the way, but with `rounding` x and the inner activations, to FP8 in these
    units."""

    def rounded(value: torch.Tensor, which: int) -> torch.Tensor:
        if rounding is None:
            return value
        units = value * float(torch.tensor(1.0) / torch.tensor(rounding[which]))  # float32, as the kernels do
        return units.float().clamp(-448, 448).to(torch.float8_e4m3fn).double() * rounding[which]

    expert, weight = route(chosen_logits(logits, modality), top_k, normalize)
    total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e in expert.unique().tolist():
        token, place = (expert == e).nonzero(as_tuple=True)
        gate, up = (rounded(x[token].double(), 0) @ gate_up[e].double().T).chunk(2, dim=-1)
        out = rounded(torch.nn.functional.silu(gate) * up, 1) @ down[e].double().T
        total.index_add_(0, token, out * weight[token, place].unsqueeze(-1))
    return total if addend is None else total + addend.double()
