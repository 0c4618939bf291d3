"""Flow-match Euler schedule, guidance, and the initial noise: the arithmetic around the denoiser; numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ming_trt.errors import InputError
from ming_trt.processing.draw import MAX_STEPS

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FlowMatchSchedule:
    """The noise levels that a checkpoint's `scheduler/scheduler_config.json` describes (`ScheduleConfig`)."""

    shift: float
    train_steps: int = 1000

    def _shifted(self, sigma: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        result: npt.NDArray[np.float64] = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        return result

    def levels(self, steps: int) -> tuple[F32, F32]:
        """`(sigmas [steps + 1], times [steps])`: noise levels from 1 to 0, and what the denoiser is told.

        The low end is shifted twice (once in the training schedule, once here), as in the reference. Raises
        `InputError` for a number of steps outside 1..200.
        """
        if not 1 <= steps <= MAX_STEPS:
            raise InputError(f"{steps} denoising steps: choose between 1 and {MAX_STEPS} (30 is the model's default)")
        lowest = self._shifted(np.array([1 / self.train_steps]))[0]
        sigmas = self._shifted(np.linspace(1.0, lowest, steps)).astype(np.float32)
        return np.append(sigmas, np.float32(0)), sigmas * np.float32(self.train_steps)


def euler_step(latent: F32, velocity: F32, sigma: np.float32, next_sigma: np.float32) -> F32:
    """One step of the probability-flow ODE from noise level `sigma` down to `next_sigma`."""
    result: F32 = latent + (next_sigma - sigma) * velocity
    return result


# A branch of the denoiser is (with the prompt's condition, with the reference picture).
Branch = tuple[bool, bool]
_U: Branch = (False, False)
_I: Branch = (False, True)
_X: Branch = (True, False)
_F: Branch = (True, True)
_MODE_BRANCHES: dict[int, tuple[Branch, ...]] = {
    1: (_U, _I, _F),
    2: (_U, _I),
    3: (_X, _F),
    4: (_U, _X),
    5: (_I, _F),
    6: (_U, _X, _I),
}


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance. `cfg` weighs the prompt, `image_cfg` the reference picture, `mode` says how.

    `image_cfg` and `mode` matter only for edits with `image_cfg` > 1; otherwise the prompt alone is weighed. With
    u, i, x, f = denoiser without both / with picture / with prompt / with both, a = image_cfg, g = cfg:

    1: u + a(i-u) + g(f-i)   2: u + a(i-u)   3: x + a(f-x)   4: u + g(x-u)   5: i + g(f-i)   6: u + g(x-u) + a(i-u)
    """

    cfg: float = 5.0
    image_cfg: float = 1.0
    mode: int = 1

    def branches(self, reference: bool) -> tuple[Branch, ...]:
        """The denoiser evaluations a step needs: (with condition, with reference), 2 or 3 of them."""
        if not reference:
            return _U, _X
        if self.image_cfg <= 1:
            return _I, _F
        return _MODE_BRANCHES[self.mode]

    def combine(self, velocities: Mapping[Branch, F32], reference: bool) -> F32:
        """The guided velocity from the denoiser's velocity for each of `branches(reference)`."""
        g, a = np.float32(self.cfg), np.float32(self.image_cfg)
        result: F32
        if not reference or self.image_cfg <= 1:
            low, high = (velocities[branch] for branch in self.branches(reference))
            result = low + g * (high - low)
        elif self.mode == 1:
            u, i, f = velocities[_U], velocities[_I], velocities[_F]
            result = u + a * (i - u) + g * (f - i)
        elif self.mode == 2:
            result = velocities[_U] + a * (velocities[_I] - velocities[_U])
        elif self.mode == 3:
            result = velocities[_X] + a * (velocities[_F] - velocities[_X])
        elif self.mode == 4:
            result = velocities[_U] + g * (velocities[_X] - velocities[_U])
        elif self.mode == 5:
            result = velocities[_I] + g * (velocities[_F] - velocities[_I])
        else:
            u, x, i = velocities[_U], velocities[_X], velocities[_I]
            result = u + g * (x - u) + a * (i - u)
        return result


def initial_noise(seed: int, shape: tuple[int, ...]) -> F32:
    """Standard normal noise f32, the numbers of `torch.manual_seed(seed); torch.randn(shape)` on a CPU.

    Mersenne twister words give 24-bit uniforms; blocks of 16 become normals by Box-Muller, eight radii and eight
    angles; a last partial block is drawn again over the last 16 values. Equal to torch's except for the rounding of
    its vectorised log, sin and cos (a few units in the last place). Needs at least 16 values.
    """
    count = int(np.prod(shape))
    if count < 16:
        raise InputError(f"noise of shape {shape}: at least 16 values are needed")
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    blocks, rest = divmod(count, 16)

    def uniform(size: int) -> F32:
        words = generator.randint(0, 1 << 32, size, dtype=np.uint32)
        return (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)

    def normal(values: F32) -> F32:
        pairs = values.reshape(-1, 2, 8)
        radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - pairs[:, 0]))
        angle = np.float32(2 * np.pi) * pairs[:, 1]
        result: F32 = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
        return result

    drawn = uniform(count)
    noise = np.empty(count, np.float32)
    noise[: blocks * 16] = normal(drawn[: blocks * 16])
    if rest:
        noise[-16:] = normal(uniform(16))
    return noise.reshape(shape)
