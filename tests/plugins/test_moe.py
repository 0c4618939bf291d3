"""The kernels of the experts against torch in float64: the host reference, and the kernel source run on the host."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins import binding, calls, reference

# Relative error of the whole output, which may be a few numbers only. Operands are exact in their type; what is rounded
# to it is the inner activation, in prefill an expert's output, and the result (twice, if something is added).
TOLERANCE = {torch.float32: 2e-6} | {t: 3 * calls.ROUNDING[t] for t in (torch.float16, torch.bfloat16)}
PATHS = {
    "decode": (binding.DECODE, (8, 9)),
    "prefill": (binding.PREFILL, (8, 9)),
    "prefill-wgmma": (binding.PREFILL, (9, 0)),
}


def run_host(moe: calls.Moe) -> torch.Tensor:
    y = calls.poisoned(*moe.x.shape, like=moe.x)
    calls.check(binding.host_library().ming_moe_host(ctypes.byref(moe.call(y, None, binding.AUTOMATIC))))
    return y


def run_emulated(moe: calls.Moe, path: str) -> torch.Tensor:
    library = binding.emulated_library("moe")
    code, capability = PATHS[path]
    library.ming_emulation_capability(*capability)
    conflicts = library.ming_emulation_conflicts()
    y = moe.run(library, code)
    assert library.ming_emulation_conflicts() == conflicts, "ldmatrix rows share banks"
    return y


def assert_close(y: torch.Tensor, moe: calls.Moe) -> None:
    assert calls.relative_error(y, moe.expected()) < TOLERANCE[moe.x.dtype]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**30),
    tokens=st.integers(1, 12),
    hidden=st.sampled_from([8, 24, 64]),
    width=st.sampled_from([8, 40]),
    experts=st.integers(1, 70),
    top_k=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    modality=st.booleans(),
    addend=st.booleans(),
    normalize=st.booleans(),
)
def test_host_reference(
    seed: int, tokens: int, hidden: int, width: int, experts: int, top_k: int, dtype: torch.dtype, modality: bool,
    addend: bool, normalize: bool,
) -> None:  # fmt: skip
    moe = calls.random_moe(
        tokens, hidden, width, experts, min(top_k, experts),
        seed=seed, dtype=dtype, modality=modality, addend=addend, normalize=normalize,
    )  # fmt: skip
    assert_close(run_host(moe), moe)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**30),
    tokens=st.integers(1, 20),
    experts=st.integers(1, 100),
    top_k=st.integers(1, 16),
    normalize=st.booleans(),
    repeats=st.booleans(),
)
def test_host_routing(seed: int, tokens: int, experts: int, top_k: int, normalize: bool, repeats: bool) -> None:
    """With `repeats` the logits are whole numbers, so that many experts tie: the lower one comes first."""
    moe = calls.random_moe(tokens, 8, 8, experts, min(top_k, experts), seed=seed, modality=True, normalize=normalize)
    if repeats:
        moe.logits = moe.logits.round()
    expert = torch.full((tokens, moe.top_k), -1, dtype=torch.int32)
    weight = torch.full((tokens, moe.top_k), float("nan"))
    call = moe.call(moe.x, None, binding.AUTOMATIC)
    calls.check(binding.host_library().ming_moe_route_host(ctypes.byref(call), expert.data_ptr(), weight.data_ptr()))
    logits = reference.chosen_logits(moe.logits, moe.modality)
    want_expert, want_weight = reference.route(logits, moe.top_k, normalize)
    assert torch.equal(expert.long(), want_expert)
    assert torch.allclose(weight.double(), want_weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "experts", "top_k"),
    [
        (1, 64, 64, 8, 2),
        (3, 72, 40, 5, 5),  # nothing divides a tile
        (8, 264, 136, 16, 3),  # more than one step of a block over K
        (9, 64, 24, 70, 6),  # two column tiles; more experts than two per lane
        (16, 32, 16, 3, 1),
    ],
)
def test_decode_kernel(tokens: int, hidden: int, width: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
    moe = calls.random_moe(tokens, hidden, width, experts, top_k, seed=tokens, dtype=dtype, modality=True, addend=True)
    assert_close(run_emulated(moe, "decode"), moe)


@pytest.mark.parametrize("path", ["prefill", "prefill-wgmma"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "experts", "top_k", "dtype"),
    [
        (150, 136, 72, 2, 1, torch.bfloat16),  # an expert with two row tiles; ragged rows, columns and depth
        (40, 264, 80, 3, 2, torch.float16),  # five steps over the depth: the ring of stages turns
        (17, 64, 64, 70, 6, torch.bfloat16),  # experts without a token
    ],
)
def test_prefill_kernels(
    path: str, tokens: int, hidden: int, width: int, experts: int, top_k: int, dtype: torch.dtype
) -> None:
    moe = calls.random_moe(tokens, hidden, width, experts, top_k, seed=tokens, dtype=dtype, modality=True, addend=True)
    assert_close(run_emulated(moe, path), moe)


@pytest.mark.parametrize("run", ["host", *sorted(PATHS)])
@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "experts", "top_k"),
    [(5, 144, 80, 6, 2), (13, 272, 176, 3, 2)],  # two steps over the depth of a tile of 128; ragged everywhere
)
def test_fp8(run: str, tokens: int, hidden: int, width: int, experts: int, top_k: int) -> None:
    """Against float64 with the same roundings to FP8. Against the layer without FP8 the error is that of FP8: about
    2.6 % for each rounding of random numbers, of which a path through gate and up has six: 6.4 %."""
    moe = calls.random_moe(tokens, hidden, width, experts, top_k, seed=tokens, modality=True, addend=True)
    rounded = moe.in_fp8()
    y = run_host(rounded) if run == "host" else run_emulated(rounded, run)
    assert_close(y, rounded)
    assert 0.02 < calls.relative_error(y, moe.expected()) < 0.1


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**30),
    tokens=st.integers(1, 16),
    hidden=st.integers(1, 6).map(lambda n: 8 * n),
    width=st.integers(1, 6).map(lambda n: 8 * n),
    experts=st.integers(1, 40),
    top_k=st.integers(1, 8),
    normalize=st.booleans(),
    path=st.sampled_from(sorted(PATHS)),
)
def test_any_size(
    seed: int, tokens: int, hidden: int, width: int, experts: int, top_k: int, normalize: bool, path: str
) -> None:
    moe = calls.random_moe(tokens, hidden, width, experts, min(top_k, experts), seed=seed, normalize=normalize)
    assert_close(run_emulated(moe, path), moe)


@pytest.mark.parametrize("path", sorted(PATHS))
def test_weights_of_experts_that_nobody_chose_are_not_read(path: str) -> None:
    """They are NaN here: one element of them in a sum would show."""
    moe = calls.random_moe(5, 64, 48, 12, 2, seed=3)
    chosen, _ = reference.route(moe.logits, 2, True)
    others = torch.ones(12, dtype=torch.bool)
    others[chosen.flatten()] = False
    assert others.any()
    moe.gate_up[others] = float("nan")
    moe.down[others] = float("nan")
    assert_close(run_emulated(moe, path), moe)


@pytest.mark.parametrize("path", sorted(PATHS))
def test_nan_logits_reach_the_output(path: str) -> None:
    moe = calls.random_moe(4, 32, 16, 6, 2, seed=4)
    moe.logits[1, 3] = float("nan")
    y = run_emulated(moe, path)
    assert y[1].isnan().all()
    assert not y[[0, 2, 3]].isnan().any()


def test_all_tokens_at_one_expert_and_a_repeated_run_is_equal() -> None:
    moe = calls.random_moe(130, 64, 64, 8, 1, seed=6)
    moe.logits[:] = 0
    moe.logits[:, 5] = 4
    first = run_emulated(moe, "prefill")
    assert_close(first, moe)
    assert torch.equal(first, run_emulated(moe, "prefill"))


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("hidden", 60, -2),
        ("width", 12, -2),
        ("experts", 257, -2),
        ("top_k", 17, -2),
        ("routers", 2, -2),
        ("routers", 3, -2),  # no modality codes given
        ("dtype", binding.FLOAT32, -1),
        ("workspace_bytes", 10, -4),
        ("path", 9, -2),
        ("fp8", 1, -2),  # no scales given
    ],
)
def test_calls_out_of_range_are_refused(field: str, value: int, status: int) -> None:
    moe = calls.random_moe(2, 64, 16, 4, 2, seed=1)
    library = binding.emulated_library("moe")
    workspace = torch.empty(library.ming_moe_workspace(2, 64, 16, 4, 2), dtype=torch.uint8)
    call = moe.call(moe.x, workspace, binding.AUTOMATIC)
    setattr(call, field, value)
    assert library.ming_moe(ctypes.byref(call), None) == status
    assert binding.emulated_library("mrope").ming_status_text(status) != b"unknown status"


def test_fp8_is_refused_on_older_chips() -> None:
    moe = calls.random_moe(2, 64, 16, 4, 2, seed=1).in_fp8()
    library = binding.emulated_library("moe")
    library.ming_emulation_capability(8, 0)
    workspace = torch.empty(library.ming_moe_workspace(2, 64, 16, 4, 2), dtype=torch.uint8)
    assert library.ming_moe(ctypes.byref(moe.call(moe.x, workspace, binding.AUTOMATIC)), None) == -5


def test_misaligned_tensor_is_refused() -> None:
    moe = calls.random_moe(2, 64, 16, 4, 2, seed=1)
    library = binding.emulated_library("moe")
    workspace = torch.empty(library.ming_moe_workspace(2, 64, 16, 4, 2), dtype=torch.uint8)
    call = moe.call(moe.x, workspace, binding.AUTOMATIC)
    call.x += 2
    assert library.ming_moe(ctypes.byref(call), None) == -3
