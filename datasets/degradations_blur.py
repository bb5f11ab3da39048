"""Blur of lenses and of motion, each by its point spread function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from .degradations_base import Degradation, Range, Whole, check_range, convolved, draw, draw_whole

if TYPE_CHECKING:
    from torch import Tensor

_SUPERSAMPLING = 8


def disk(radius: float) -> np.ndarray:
    """The image of a point out of focus: a filled circle, its edge anti-aliased; (size, size), sum 1."""
    reach = max(math.ceil(radius), 0)
    fine = (np.arange((2 * reach + 1) * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING - reach - 0.5
    inside = np.hypot(fine[:, None], fine[None]) <= max(radius, 0.5)
    kernel = inside.reshape(2 * reach + 1, _SUPERSAMPLING, 2 * reach + 1, _SUPERSAMPLING).mean((1, 3))
    return kernel / kernel.sum()


def line(length: int, angle: float, fade: float = 0.0) -> np.ndarray:
    """A straight motion: kornia's kernel; (length, length) with odd length, `angle` in degrees, anti-clockwise.

    `fade` in [0, 1]: how much weaker one end is than the other.
    """
    from kornia.filters import get_motion_kernel2d

    if length < 3:
        return np.ones((1, 1))
    kernel = get_motion_kernel2d(length, float(angle), float(fade), mode="bilinear")[0].double().numpy()
    return kernel / kernel.sum()


def shake(size: int, draws: np.random.Generator, steps: int = 256) -> np.ndarray:
    """A hand's motion during the exposure: a smooth random path, laid down bilinearly; (size, size) with odd size.

    The path is that of a particle with inertia that is pushed at random and pulled back (Boracchi and Foi 2012,
    "Modeling the Performance of Image Restoration from Motion Blur"), scaled to fill the kernel.
    """
    if size < 3:
        return np.ones((1, 1))
    pushes = draws.standard_normal((steps, 2))
    jerks = draws.random(steps) < 4 / steps
    velocity, place, path = pushes[0], np.zeros(2), np.empty((steps, 2))
    for i in range(steps):
        if jerks[i]:
            velocity = -velocity
        velocity = 0.98 * velocity + 0.15 * pushes[i] - 0.002 * place
        place = place + velocity
        path[i] = place
    path -= (path.max(0) + path.min(0)) / 2
    path = path / np.abs(path).max() * ((size - 1) / 2) + (size - 1) / 2
    kernel, corner = np.zeros((size + 1, size + 1)), np.floor(path).astype(int)
    share = path - corner
    for dy in (0, 1):
        for dx in (0, 1):
            weight = np.abs(1 - dy - share[:, 0]) * np.abs(1 - dx - share[:, 1])
            np.add.at(kernel, (corner[:, 0] + dy, corner[:, 1] + dx), weight)
    return kernel[:size, :size] / kernel[:size, :size].sum()


@dataclass(frozen=True, kw_only=True)
class DefocusBlur(Degradation):
    """A scene out of focus, everywhere alike.

    Attributes:
        radius: of the circle in pixels.
    """

    kind: Literal["defocus"] = "defocus"
    radius: Range = (1.0, 4.0)

    def __post_init__(self) -> None:
        check_range(self, "radius", 0)

    def apply(self, image: Tensor, draws: np.random.Generator, depth: Tensor | None = None) -> Tensor:
        return convolved(image, disk(draw(self.radius, draws))).clamp(0, 1)

    def psf(self) -> np.ndarray | None:
        return disk(self.radius) if isinstance(self.radius, int | float) else None


@dataclass(frozen=True, kw_only=True)
class MotionBlur(Degradation):
    """Motion during the exposure, the same for every pixel.

    Attributes:
        length: of the path in pixels; an even one becomes odd by one more.
        angle: of a straight path, in degrees.
        path: ``line``, or ``shake``: a hand's.
    """

    kind: Literal["motion"] = "motion"
    length: Whole = (5, 21)
    angle: Range = (0.0, 180.0)
    path: Literal["line", "shake"] = "shake"

    def __post_init__(self) -> None:
        check_range(self, "length", 1)
        check_range(self, "angle", -360, 360)

    def apply(self, image: Tensor, draws: np.random.Generator, depth: Tensor | None = None) -> Tensor:
        length, angle = draw_whole(self.length, draws) | 1, draw(self.angle, draws)
        kernel = line(length, angle) if self.path == "line" else shake(length, draws)
        return convolved(image, kernel).clamp(0, 1)

    def psf(self) -> np.ndarray | None:
        if self.path != "line" or isinstance(self.length, tuple) or isinstance(self.angle, tuple):
            return None
        return line(self.length | 1, self.angle)
