"""The float64 reference of these tests says the same as the operators that engines are exported from."""

from __future__ import annotations

import pytest
import torch

from ming_trt.models import ops, rope
from ming_trt.trtllm import rope_table
from tests.plugins import binding, calls, reference

SECTIONS = (16, 24, 24)
THETA = 600000.0


@pytest.mark.parametrize("kind", [reference.THREE_D, reference.VIDEO])
def test_axes_and_frequencies(kind: str) -> None:
    axes = reference.frequency_axes(kind, SECTIONS)
    assert axes == rope.frequency_axes(kind, SECTIONS) == rope_table.frequency_axes(kind, SECTIONS).tolist()
    kernel = calls.Rope(torch.empty(0), torch.empty(0), torch.empty(0), axes, THETA).inverse()
    module = rope.inverse_frequencies(2 * len(axes), THETA)
    assert ((kernel - module).abs() <= 2.0**-22 * module).all()  # both within an ulp or two of the exact value


@pytest.mark.parametrize("kind", [reference.THREE_D, reference.VIDEO])
def test_rotation(kind: str) -> None:
    axes = reference.frequency_axes(kind, SECTIONS)
    q, k = torch.randn(2, 3, 4, 128), torch.randn(2, 1, 4, 128)
    positions = torch.randint(0, 100, (3, 2, 4))
    tables = reference.cos_sin(positions, rope.inverse_frequencies(128, THETA), axes)
    for out, x in zip(ops.mrope(q, k, positions, THETA, kind, list(SECTIONS)), (q, k), strict=True):
        torch.testing.assert_close(out.double(), reference.rotated(x, *tables), rtol=0, atol=2e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_experts(normalize: bool) -> None:
    moe = calls.random_moe(20, 32, 24, 9, 3, seed=2, dtype=torch.float32, normalize=normalize)
    want = reference.sparse_moe(moe.x, moe.logits, None, moe.gate_up, moe.down, 3, normalize)
    got = ops.sparse_moe(moe.x, moe.logits, moe.gate_up, moe.down, 3, normalize)
    assert calls.relative_error(got, want) < 1e-6


def test_table_is_the_one_that_the_serving_code_makes() -> None:
    from ming_trt.config import LLMConfig

    sections = (2, 3, 3)
    positions = torch.randint(0, 500, (3, 7), dtype=torch.int64)
    config = LLMConfig.__new__(LLMConfig)
    for name, value in (("head_dim", 16), ("rope_theta", THETA), ("rope_kind", "3D"), ("rope_sections", sections)):
        object.__setattr__(config, name, value)
    want = torch.from_numpy(rope_table.rope_table(config, positions.numpy(), -2, 20)).view(20, 8, 2)
    table = torch.empty(20, 8, 2)
    delta = torch.tensor([-2])
    calls.check(
        binding.host_library().ming_mrope_table_host(
            positions.data_ptr(), 8, 7, delta.data_ptr(), 8,
            binding.axes_argument(rope.frequency_axes("3D", sections)), 8, THETA, 20, table.data_ptr(),
        )
    )  # fmt: skip
    # A frequency may differ by an ulp or two, 2^-22 of an angle of up to 500.
    assert (table - want).abs().max() < 500 * 2.0**-22
