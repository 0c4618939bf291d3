"""Rotary position embedding with three axes (time, height, width), and the vision tower's with two.

Frequency `j` of `head_dim / 2` turns by `theta^(-2j / head_dim)` per unit of the position on one axis:

* "3D": the frequencies are cut into three consecutive sections for time, height and width (16, 24, 24 of 64).
* "video_rope": time has the lowest frequencies (the last `sections[0]`); before them even ones read the height and odd
  ones the width.

Everything is float32; a vector is rotated as two halves (NeoX style), so each angle serves elements `j` and
`j + head_dim / 2`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ming_trt.config import ROPE_3D, ROPE_VIDEO

TIME, HEIGHT, WIDTH = 0, 1, 2


def inverse_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> torch.Tensor:
    """`theta^(-2j / head_dim)` for j = 0 .. head_dim / 2 - 1, float32. Arithmetic only: can be part of a graph."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)


def frequency_axes(kind: str, sections: Sequence[int]) -> list[int]:
    """The axis (0 time, 1 height, 2 width) that each frequency reads."""
    time, height, width = sections
    if kind == ROPE_3D:
        return [TIME] * time + [HEIGHT] * height + [WIDTH] * width
    if kind == ROPE_VIDEO:
        return [HEIGHT if j % 2 == 0 else WIDTH for j in range(height + width)] + [TIME] * time
    raise ValueError(f"unknown rope kind {kind!r}")


def cos_sin(
    position_ids: torch.Tensor, theta: float, kind: str, sections: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables float32 [B, S, head_dim / 2] for `position_ids` [3, B, S]."""
    axes = torch.tensor(frequency_axes(kind, sections), device=position_ids.device)
    inverse = inverse_frequencies(2 * len(axes), theta, position_ids.device)
    angles = position_ids.float().index_select(0, axes).permute(1, 2, 0) * inverse
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the last dimension of `x` by tables of half its width that broadcast to it; float32 inside."""
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def vision_cos_sin(patch_position: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables float32 [N, head_dim / 2] for (row, column) pairs [N, 2]: the first half of the angles reads rows."""
    inverse = inverse_frequencies(head_dim // 2, theta, patch_position.device)
    angles = (patch_position.float().unsqueeze(-1) * inverse).flatten(1)
    return angles.cos(), angles.sin()
