"""The rotary kernels on a GPU against torch in float64."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch

from tests.gpu import gpu
from tests.plugins import binding, calls, reference

pytestmark = [pytest.mark.gpu, gpu.needs_gpu]

THETA = 600000.0
SECTIONS = {64: (16, 24, 24), 32: (8, 12, 12), 8: (2, 3, 3), 5: (1, 2, 2)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GUARD = 4096  # elements around an output that nobody may touch


def random_rope(seed: int, half: int, kind: str, dtype: torch.dtype, **sizes: int) -> calls.Rope:
    generator = torch.Generator("cuda").manual_seed(seed)
    batch, tokens = sizes["batch"], sizes["tokens"]

    def heads(count: int) -> torch.Tensor:
        return torch.randn(batch, count, tokens, 2 * half, generator=generator, device="cuda").to(dtype)

    positions = torch.randint(-64, sizes.get("reach", 32768), (3, batch, tokens), generator=generator, device="cuda")
    axes = reference.frequency_axes(kind, SECTIONS[half])
    return calls.Rope(heads(sizes["heads"]), heads(sizes["kv_heads"]), positions, axes, THETA)


def guarded(shape: torch.Size, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A NaN tensor inside a larger one, and the larger one."""
    whole = torch.full((shape.numel() + 2 * GUARD,), float("nan"), dtype=dtype, device="cuda")
    return whole[GUARD:-GUARD].view(shape), whole


def rotate(rope: calls.Rope, q_out: torch.Tensor, k_out: torch.Tensor, v_out: torch.Tensor | None = None) -> None:
    call, axes = rope.call(q_out, k_out, v_out)
    calls.check(gpu.library("mrope").ming_mrope(ctypes.byref(call), axes, len(rope.axes), rope.theta, gpu.stream()))
    gpu.finish()


def assert_rotated(out: torch.Tensor, x: torch.Tensor, rope: calls.Rope) -> None:
    expected = reference.rotated(x, *reference.cos_sin(rope.positions, rope.inverse(), rope.axes))
    # One rounding to the dtype, and float32 maths on |low| + |high| before it: sincosf (2 ulp) and two products.
    bound = calls.ROUNDING[x.dtype] * expected.abs() + 2.0**-20 * (x.double().abs().max() + 1)
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed: int) -> None:
    choose = random.Random(seed)
    sizes = {
        "batch": choose.randint(1, 5), "tokens": choose.choice([1, 2, 7, 64, 333]),
        "heads": choose.randint(1, 20), "kv_heads": choose.randint(1, 6),
    }  # fmt: skip
    kind = choose.choice([reference.THREE_D, reference.VIDEO])
    rope = random_rope(seed, choose.choice(list(SECTIONS)), kind, choose.choice(DTYPES), **sizes)
    rope.positions = rope.positions.to(choose.choice([torch.int32, torch.int64]))
    (q_out, q_whole), (k_out, k_whole) = (guarded(x.shape, x.dtype) for x in (rope.q, rope.k))
    rotate(rope, q_out, k_out)
    assert_rotated(q_out, rope.q, rope)
    assert_rotated(k_out, rope.k, rope)
    for whole in (q_whole, k_whole):
        assert whole[:GUARD].isnan().all()
        assert whole[-GUARD:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [reference.THREE_D, reference.VIDEO])
def test_official_size(kind: str, dtype: torch.dtype) -> None:
    rope = random_rope(1, 64, kind, dtype, batch=1, tokens=2048, heads=16, kv_heads=4)
    q_out, k_out = (calls.poisoned(*x.shape, like=x) for x in (rope.q, rope.k))
    rotate(rope, q_out, k_out)
    assert_rotated(q_out, rope.q, rope)
    assert_rotated(k_out, rope.k, rope)


def test_packed_input_and_append_to_a_cache() -> None:
    tokens, places = 37, 128
    rope = random_rope(2, 64, reference.THREE_D, torch.bfloat16, batch=3, tokens=tokens, heads=16, kv_heads=4)
    packed = torch.randn(3, tokens, 24 * 128, device="cuda").to(torch.bfloat16)
    split = packed.split([16 * 128, 4 * 128, 4 * 128], dim=-1)
    rope.q, rope.k, rope.v = (part.unflatten(-1, (-1, 128)).transpose(1, 2) for part in split)
    rope.write_index = torch.tensor([0, 91, 40], device="cuda")
    q_out = calls.poisoned(3, 16, tokens, 128, like=packed)
    k_cache, v_cache = (calls.poisoned(3, 4, places, 128, like=packed) for _ in range(2))
    rotate(rope, q_out, k_cache, v_cache)
    assert_rotated(q_out, rope.q, rope)
    k_rotated = calls.poisoned(3, 4, tokens, 128, like=packed)
    written = torch.zeros(3, places, dtype=torch.bool, device="cuda")
    for entry, first in enumerate(rope.write_index.tolist()):
        written[entry, first : first + tokens] = True
        k_rotated[entry] = k_cache[entry, :, first : first + tokens]
        assert torch.equal(v_cache[entry, :, first : first + tokens], rope.v[entry])
    assert_rotated(k_rotated, rope.k, rope)
    for cache in (k_cache, v_cache):
        assert torch.equal(cache.isnan().any(-1).all(1), ~written)


def test_rotates_in_place() -> None:
    rope = random_rope(3, 64, reference.VIDEO, torch.float16, batch=2, tokens=100, heads=4, kv_heads=2)
    before = calls.Rope(rope.q.clone(), rope.k.clone(), rope.positions, rope.axes, THETA)
    rotate(rope, rope.q, rope.k)
    assert_rotated(rope.q, before.q, before)
    assert_rotated(rope.k, before.k, before)


@pytest.mark.parametrize("kind", [reference.THREE_D, reference.VIDEO])
def test_table_of_a_request(kind: str) -> None:
    length, places, delta = 700, 4096, -123
    axes = reference.frequency_axes(kind, SECTIONS[64])
    positions = torch.randint(0, 9000, (3, length), dtype=torch.int32, device="cuda")
    on_device = torch.tensor([delta], dtype=torch.int32, device="cuda")
    table = torch.full((places, 64, 2), float("nan"), device="cuda")
    calls.check(
        gpu.library("mrope").ming_mrope_table(
            positions.data_ptr(), 4, length, on_device.data_ptr(), 4,
            binding.axes_argument(axes), 64, THETA, places, table.data_ptr(), gpu.stream(),
        )
    )  # fmt: skip
    gpu.finish()
    rest = (torch.arange(length, places, device="cuda") + delta).expand(3, -1)
    every = torch.cat((positions.long(), rest), dim=1).unsqueeze(1)
    inverse = calls.Rope(table, table, every, axes, THETA).inverse()
    expected = torch.stack(reference.cos_sin(every, inverse, axes), dim=-1)[0]
    assert (table.double() - expected).abs().max() < 2.0**-21  # sincosf is within 2 ulp of numbers up to 1
