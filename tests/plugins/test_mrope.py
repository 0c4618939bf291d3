"""The rotary kernels against torch in float64: the host reference, and the kernel source run on the host."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins import binding, calls, reference

AXES = [
    reference.frequency_axes(reference.THREE_D, (16, 24, 24)),
    reference.frequency_axes(reference.VIDEO, (16, 24, 24)),
    reference.frequency_axes(reference.THREE_D, (2, 3, 3)),
    reference.frequency_axes(reference.VIDEO, (1, 2, 2)),  # halves of 5: no vector loads
]
THETA = 600000.0


@pytest.fixture(params=["host", "emulated"])
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return binding.host_library() if request.param == "host" else binding.emulated_library("mrope")


def is_host(library: ctypes.CDLL) -> bool:
    return hasattr(library, "ming_mrope_host")


def random_rope(seed: int, batch: int, tokens: int, axes: list[int], dtype: torch.dtype, **more: int) -> calls.Rope:
    generator = torch.Generator().manual_seed(seed)
    half = len(axes)
    q = torch.randn(batch, more.get("heads", 3), tokens, 2 * half, generator=generator).to(dtype)
    k = torch.randn(batch, more.get("kv_heads", 2), tokens, 2 * half, generator=generator).to(dtype)
    positions = torch.randint(-40, more.get("reach", 32768), (3, batch, tokens), generator=generator)
    return calls.Rope(q, k, positions, axes, THETA)


def assert_rotated(out: torch.Tensor, x: torch.Tensor, rope: calls.Rope) -> None:
    expected = reference.rotated(x, *reference.cos_sin(rope.positions, rope.inverse(), rope.axes))
    # One rounding to the dtype, and float32 maths on |low| + |high| before it: sincosf and two products.
    bound = calls.ROUNDING[x.dtype] * expected.abs() + 2.0**-21 * (x.double().abs().max() + 1)
    assert ((out.double() - expected).abs() <= bound).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**30),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    heads=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    axes=st.sampled_from(AXES),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_rotation_matches_float64(
    seed: int,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    axes: list[int],
    dtype: torch.dtype,
    index: torch.dtype,
) -> None:
    rope = random_rope(seed, batch, tokens, axes, dtype, heads=heads, kv_heads=kv_heads)
    rope.positions = rope.positions.to(index)
    for library in (binding.host_library(), binding.emulated_library("mrope")):
        q_out, k_out = (calls.poisoned(*x.shape, like=x) for x in (rope.q, rope.k))
        call, axes_argument = rope.call(q_out, k_out)
        run = calls.launcher(library, is_host(library))
        calls.check(run(ctypes.byref(call), axes_argument, len(axes), THETA), library)
        assert_rotated(q_out, rope.q, rope)
        assert_rotated(k_out, rope.k, rope)


def test_packed_input_and_append_to_a_cache(library: ctypes.CDLL) -> None:
    """q, k, v read from a packed projection; k and v go to each entry's own place in caches, all else is untouched."""
    rope = random_rope(5, 2, 6, AXES[0], torch.bfloat16)
    heads, kv_heads, head_dim = 3, 2, 2 * len(rope.axes)
    packed = torch.randn(2, 6, (heads + 2 * kv_heads) * head_dim).to(torch.bfloat16)
    split = packed.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    rope.q, rope.k, rope.v = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in split)
    rope.write_index = torch.tensor([3, 10], dtype=torch.int32)
    q_out = calls.poisoned(2, heads, 6, head_dim, like=packed)
    k_cache, v_cache = (calls.poisoned(2, kv_heads, 17, head_dim, like=packed) for _ in range(2))
    call, axes = rope.call(q_out, k_cache, v_cache)
    run = calls.launcher(library, is_host(library))
    calls.check(run(ctypes.byref(call), axes, len(rope.axes), THETA), library)
    assert_rotated(q_out, rope.q, rope)
    written = torch.zeros(2, 17, dtype=torch.bool)
    for entry, first in enumerate(rope.write_index.tolist()):
        written[entry, first : first + 6] = True
        one = calls.Rope(rope.q[entry : entry + 1], rope.k, rope.positions[:, entry : entry + 1], rope.axes, THETA)
        assert_rotated(k_cache[entry : entry + 1, :, first : first + 6], rope.k[entry : entry + 1], one)
        assert torch.equal(v_cache[entry, :, first : first + 6], rope.v[entry])
    for cache in (k_cache, v_cache):
        assert torch.equal(cache.isnan().any(-1).all(1), ~written)


def test_rotates_in_place(library: ctypes.CDLL) -> None:
    rope = random_rope(7, 2, 5, AXES[1], torch.float16)
    before = calls.Rope(rope.q.clone(), rope.k.clone(), rope.positions, rope.axes, THETA)
    call, axes = rope.call(rope.q, rope.k)
    run = calls.launcher(library, is_host(library))
    calls.check(run(ctypes.byref(call), axes, len(rope.axes), THETA), library)
    assert_rotated(rope.q, before.q, before)
    assert_rotated(rope.k, before.k, before)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("with_delta", [False, True])
def test_table_of_a_request(library: ctypes.CDLL, axes: list[int], with_delta: bool) -> None:
    """(cos, sin) per place and frequency: the prompt's positions, then place + delta."""
    length, places = 11, 40
    positions = torch.randint(0, 3000, (3, length), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    delta = torch.tensor([-4], dtype=torch.int64)
    table = torch.full((places, len(axes), 2), float("nan"))
    arguments = [
        positions.data_ptr(), 4, length, delta.data_ptr() if with_delta else None, 8,
        binding.axes_argument(axes), len(axes), THETA, places, table.data_ptr(),
    ]  # fmt: skip
    if is_host(library):
        calls.check(library.ming_mrope_table_host(*arguments))
    else:
        calls.check(library.ming_mrope_table(*arguments, None), library)
    rest = (torch.arange(length, places) + (-4 if with_delta else 0)).expand(3, -1)
    every = torch.cat((positions.long(), rest), dim=1).unsqueeze(1)
    like = calls.Rope(table, table, every, axes, THETA)
    expected = torch.stack(reference.cos_sin(every, like.inverse(), axes), dim=-1)[0]
    assert (table.double() - expected).abs().max() < 2.0**-22  # two float32 roundings of numbers up to 1


def test_frequencies_are_right_to_float32() -> None:
    # The power and the division round once each; where 2j/D is not a float32, its rounding counts ln(theta) times.
    bound = 2.0**-23 + math.log(THETA) * 2.0**-25
    for axes in AXES:
        half = len(axes)
        like = calls.Rope(torch.empty(0), torch.empty(0), torch.empty(0), axes, THETA)
        exact = THETA ** (-torch.arange(half, dtype=torch.float64) / half)
        assert ((like.inverse().double() - exact).abs() <= bound * exact).all()


def test_conversions_match_torch_for_every_half_number_and_its_neighbourhood() -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    values = torch.cat((values, torch.arange(2**16).bitwise_left_shift(16).to(torch.int32).view(torch.float32)))
    values = values[~values.isnan()]
    nudged = torch.cat([(values.view(torch.int32) + by).view(torch.float32) for by in (-4097, -4096, -1, 0, 1, 4096)])
    nudged = torch.cat((nudged, (values.view(torch.int32) + 32768).view(torch.float32)))
    nudged = nudged[~nudged.isnan()].contiguous()
    codes = {torch.float16: binding.FLOAT16, torch.bfloat16: binding.BFLOAT16, torch.float8_e4m3fn: binding.FLOAT8}
    for dtype, code in codes.items():
        if dtype == torch.float8_e4m3fn:  # the kernels saturate
            nudged = nudged.clamp(-448, 448)
        out = torch.empty_like(nudged)
        binding.host_library().ming_round_host(nudged.data_ptr(), len(nudged), code, out.data_ptr())
        assert torch.equal(out, nudged.to(dtype).float())


@pytest.mark.parametrize(("dtype", "expected"), [(3, -1), (binding.FLOAT32, 0)])
def test_unknown_dtype_is_refused(library: ctypes.CDLL, dtype: int, expected: int) -> None:
    rope = random_rope(1, 1, 2, AXES[2], torch.float32)
    call, axes = rope.call(rope.q, rope.k)
    call.dtype = dtype
    run = calls.launcher(library, is_host(library))
    assert run(ctypes.byref(call), axes, len(rope.axes), THETA) == expected


def test_axes_out_of_range_are_refused(library: ctypes.CDLL) -> None:
    rope = random_rope(1, 1, 2, [0, 1, 3, 0], torch.float32)
    call, axes = rope.call(rope.q, rope.k)
    run = calls.launcher(library, is_host(library))
    assert run(ctypes.byref(call), axes, 4, THETA) == -2
    assert run(ctypes.byref(call), axes, 300, THETA) == -2
