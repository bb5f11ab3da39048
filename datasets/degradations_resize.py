"""Fewer pixels: MATLAB's bicubic ``imresize``, by which super-resolution's low-resolution images are made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from .degradations_base import Degradation

if TYPE_CHECKING:
    from torch import Tensor


def matlab_resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic resize as by MATLAB's ``imresize(double(image), size)``, of floats, not rounded or clipped.

    Keys' cubic with a = -0.5, widened by the factor where the image shrinks (anti-aliasing), pixels mirrored with the
    edge repeated beyond the borders.

    Args:
        image: (..., height, width).
        size: (height, width) of the result.
    """
    import torch

    values = image.double()
    for dim, wanted in ((-2, size[0]), (-1, size[1])):
        if wanted < 1:
            raise ValueError(f"size is {size}, expected at least one pixel")
        weights, places = _taps(image.shape[dim], wanted)
        moved = values.movedim(dim, -1)
        taken = moved[..., torch.from_numpy(places)] * torch.from_numpy(weights)
        values = taken.sum(-1).movedim(-1, dim)
    return values.to(image.dtype)


@lru_cache(maxsize=64)
def _taps(length: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights and places (wanted, taps) of one side."""
    scale = wanted / length
    narrow = min(scale, 1.0)
    centres = (np.arange(wanted) + 0.5) / scale - 0.5
    taps = int(np.ceil(4 / narrow)) + 2
    places = np.floor(centres - 2 / narrow).astype(int)[:, None] + np.arange(taps)
    distance = np.abs((places - centres[:, None]) * narrow)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    weights /= weights.sum(1, keepdims=True)
    period = places % (2 * length)
    places = np.where(period < length, period, 2 * length - 1 - period)
    used = (weights != 0).any(0)
    return weights[:, used], places[:, used]


@dataclass(frozen=True, kw_only=True)
class Downsample(Degradation):
    """Fewer pixels, as in super-resolution: the clean image is cropped to a multiple of ``scale`` and reduced.

    Attributes:
        scale: how many times fewer rows and columns.
        rounds: the small image is rounded to 8 bits, as it is when saved.
        enlarge: back to the clean image's size by the same bicubic, for networks that keep an image's size.
    """

    kind: Literal["downsample"] = "downsample"
    scale: int = 4
    rounds: bool = True
    enlarge: bool = True

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"scale is {self.scale}, expected 1 or more")

    @property
    def multiple(self) -> int:
        return self.scale

    def apply(self, image: Tensor, draws: np.random.Generator, depth: Tensor | None = None) -> Tensor:
        height, width = image.shape[-2:]
        small = matlab_resize(image, (max(height // self.scale, 1), max(width // self.scale, 1))).clamp(0, 1)
        if self.rounds:
            small = (small * 255).round() / 255
        return matlab_resize(small, (height, width)).clamp(0, 1) if self.enlarge else small
