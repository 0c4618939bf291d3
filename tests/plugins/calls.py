"""Calls of the kernels with torch tensors, on the host or on a GPU alike. Needs torch only."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tests.plugins import binding, reference

DTYPES = {torch.float32: binding.FLOAT32, torch.float16: binding.FLOAT16, torch.bfloat16: binding.BFLOAT16}
# Half of the spacing of a type's numbers at 1: what one rounding may cost, relatively.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
EMPTY = binding.HeadView(None, 0, 0, 0)


def view(x: torch.Tensor) -> binding.HeadView:
    """Of [batch, heads, tokens, head_dim], any strides but the last."""
    assert x.stride(-1) == 1
    return binding.HeadView(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def poisoned(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """A tensor of NaN: an element that nobody writes is seen."""
    return torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)


def check(status: int, library: ctypes.CDLL | None = None) -> None:
    if library is not None and hasattr(library, "ming_emulation_error"):
        said = library.ming_emulation_error().decode()
        library.ming_emulation_clear()
        assert not said, said
    assert status == 0, f"status {status}"


@dataclass
class Rope:
    """Inputs of one rotation. `write_index` and `v` as in `ming::RopeCall`."""

    q: torch.Tensor
    k: torch.Tensor
    positions: torch.Tensor
    axes: list[int]
    theta: float
    v: torch.Tensor | None = None
    write_index: torch.Tensor | None = None

    def call(
        self, q_out: torch.Tensor, k_out: torch.Tensor, v_out: torch.Tensor | None = None
    ) -> tuple[binding.RopeCall, ctypes.Array[ctypes.c_int32]]:
        values = (EMPTY, EMPTY) if self.v is None or v_out is None else (view(self.v), view(v_out))
        call = binding.RopeCall(
            view(self.q), view(self.k), values[0], view(q_out), view(k_out), values[1],
            self.positions.data_ptr(), None if self.write_index is None else self.write_index.data_ptr(),
            self.q.shape[0], self.q.shape[2], self.q.shape[1], self.k.shape[1],
            self.positions.element_size(), 0 if self.write_index is None else self.write_index.element_size(),
            DTYPES[self.q.dtype],
        )  # fmt: skip
        return call, binding.axes_argument(self.axes)

    def inverse(self) -> torch.Tensor:
        """The frequencies that the kernels use, float32."""
        out = torch.empty(len(self.axes))
        axes = binding.axes_argument(self.axes)
        check(binding.host_library().ming_frequencies_host(axes, len(self.axes), self.theta, out.data_ptr()))
        return out.to(self.q.device)


@dataclass
class Moe:
    """Inputs of one mixture-of-experts layer."""

    x: torch.Tensor
    logits: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    top_k: int
    normalize: bool
    modality: torch.Tensor | None = None
    addend: torch.Tensor | None = None
    # FP8: gate_up and down are torch.float8_e4m3fn then; scales float32, per output and per tensor.
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
    x_scale: float = 0.0
    inner_scale: float = 0.0

    def in_fp8(self) -> Moe:
        """The same layer with its weights rounded to FP8 per output, and activations per tensor."""
        rounded = []
        for weight in (self.gate_up, self.down):
            scale = weight.float().abs().amax(-1).clamp(min=1e-12) / 448
            rounded.append(((weight.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale))
        (gate_up, gate_up_scale), (down, down_scale) = rounded
        x_scale = float(self.x.abs().max()) / 448
        # An inner activation is a product of two numbers of size 1 at most times a few: saturation shows in the error.
        return replace(
            self, gate_up=gate_up, down=down, gate_up_scale=gate_up_scale, down_scale=down_scale, x_scale=x_scale,
            inner_scale=24 / 448,
        )  # fmt: skip

    def call(self, y: torch.Tensor, workspace: torch.Tensor | None, path: int) -> binding.MoeCall:
        return binding.MoeCall(
            self.x.data_ptr(), self.logits.data_ptr(), None if self.modality is None else self.modality.data_ptr(),
            self.gate_up.data_ptr(), self.down.data_ptr(), None if self.addend is None else self.addend.data_ptr(),
            y.data_ptr(), None if workspace is None else workspace.data_ptr(),
            0 if workspace is None else workspace.numel(), self.x.shape[0],
            self.x.shape[1], self.down.shape[2], self.down.shape[0], self.top_k, 1 if self.modality is None else 3,
            int(self.normalize), 0 if self.modality is None else self.modality.element_size(),
            DTYPES[self.x.dtype], path, int(self.gate_up_scale is not None), self.x_scale, self.inner_scale,
            None if self.gate_up_scale is None else self.gate_up_scale.data_ptr(),
            None if self.down_scale is None else self.down_scale.data_ptr(),
        )  # fmt: skip

    def expected(self) -> torch.Tensor:
        """Float64; of FP8, with the same roundings of activations."""
        weights = [self.gate_up.double(), self.down.double()]
        rounding = None
        if self.gate_up_scale is not None and self.down_scale is not None:
            weights = [
                w * s.double().unsqueeze(-1)
                for w, s in zip(weights, (self.gate_up_scale, self.down_scale), strict=True)
            ]
            rounding = (self.x_scale, self.inner_scale)
        return reference.sparse_moe(
            self.x,
            self.logits,
            self.modality,
            weights[0],
            weights[1],
            self.top_k,
            self.normalize,
            self.addend,
            rounding,
        )

    def run(self, library: ctypes.CDLL, path: int = binding.AUTOMATIC, stream: int | None = None) -> torch.Tensor:
        """y, from a poisoned output and a poisoned workspace."""
        size = library.ming_moe_workspace(
            self.x.shape[0], self.x.shape[1], self.down.shape[2], self.down.shape[0], self.top_k
        )
        assert size > 0
        workspace = torch.full((size,), 255, dtype=torch.uint8, device=self.x.device)
        y = poisoned(*self.x.shape, like=self.x)
        check(library.ming_moe(ctypes.byref(self.call(y, workspace, path)), stream), library)
        return y


def random_moe(
    tokens: int,
    hidden: int,
    width: int,
    experts: int,
    top_k: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    modality: bool = False,
    addend: bool = False,
    normalize: bool = True,
) -> Moe:
    """Unit-sized activations everywhere, so that every stage contributes to the error."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    return Moe(
        x=normal(tokens, hidden),
        logits=normal(tokens, experts * (3 if modality else 1), scale=2.0),
        gate_up=normal(experts, 2 * width, hidden, scale=hidden**-0.5),
        down=normal(experts, hidden, width, scale=2 * width**-0.5),
        top_k=top_k,
        normalize=normalize,
        modality=torch.randint(0, 3, (tokens,), generator=generator, device=device) if modality else None,
        addend=normal(tokens, hidden) if addend else None,
    )


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected||; NaN if any element is."""
    return float(((out.double() - expected).norm() / expected.norm()).item())


def launcher(library: ctypes.CDLL, host: bool) -> Callable[..., int]:
    """`ming_mrope` or its host reference with the same arguments but the stream."""
    return library.ming_mrope_host if host else lambda *a: library.ming_mrope(*a, None)
