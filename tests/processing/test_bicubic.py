import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ming_trt.processing.bicubic import resize_frames


@settings(max_examples=30)
@given(st.integers(20, 300), st.integers(20, 300), st.integers(1, 10), st.integers(1, 10), st.integers(0, 99))
def test_frames_equal_torch_s_antialiased_bicubic(h: int, w: int, cells_h: int, cells_w: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    frames = np.random.default_rng(seed).integers(0, 256, (2, h, w, 3), dtype=np.uint8)
    size = (28 * cells_h, 28 * cells_w)
    floats = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    want = torch.nn.functional.interpolate(floats, size=size, mode="bicubic", antialias=True, align_corners=False)
    want = want.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    got = resize_frames(frames, *size)
    # Other processors round the sums differently: then single pixels of noise may differ by one level.
    difference = np.abs(got.astype(int) - want)
    assert difference.max() <= 1
    assert (difference != 0).mean() < 1e-3


def test_the_same_size_and_flat_frames_stay_as_they_are() -> None:
    flat = np.full((1, 50, 60, 3), 77, np.uint8)
    assert resize_frames(flat, 50, 60) is flat
    assert (resize_frames(flat, 28, 280) == 77).all()
