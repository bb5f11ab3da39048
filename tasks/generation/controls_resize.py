"""The sizes of control pictures: what a detector sees, and the pyramid that enters a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

LANCZOS_TAPS = 8


def resize(images: Float[Tensor, "batch channels height width"], size: tuple[int, int]) -> Tensor:
    """A batch at another size, on any device: :func:`squash` but for roundings, at most one level of 255.

    Bicubic with antialiasing; first across, then down, rounded to 8 bits each time.

    Args:
        images: in [0, 1]; values are rounded to 8 bits.
        size: (height, width).
    """
    for axes in ((images.shape[-2], size[1]), size):
        if axes != tuple(images.shape[-2:]):
            images = F.interpolate(images, size=axes, mode="bicubic", antialias=True)
        images = (images.clamp(0, 1) * 255 + 0.5).floor() / 255
    return images


def squash(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """One 8-bit picture at another size, whatever its shape, by Pillow's bicubic filter.

    Args:
        pixels: uint8 (height, width, 3).
        size: (height, width).
    """
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def pyramid(
    control: Float[Tensor, "batch 3 height width"], grids: Sequence[tuple[int, int]], stride: int
) -> list[Float[Tensor, "batch 3 pixels_high pixels_wide"]]:
    """The control picture at every scale: ``stride`` pixels a token, in [-1, 1].

    Args:
        control: in [0, 1], of any size; each scale is resized from it (see :func:`resize`).
        grids: (height, width) of each scale in tokens.
    """
    return [resize(control, (height * stride, width * stride)) * 2 - 1 for height, width in grids]


def detector_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """(height, width) at which a detector looks: the short side becomes ``resolution``, both multiples of 64."""
    share = resolution / min(height, width)
    rounded = tuple(int(np.round(side * share / 64)) * 64 for side in (height, width))
    if 0 in rounded:
        raise ValueError(f"{height} x {width} pixels at a resolution of {resolution} leave a side of 0; use 64 or more")
    return rounded[0], rounded[1]


def resize_for_detector(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """A photograph at a detector's size: enlarged by an 8-tap Lanczos kernel, shrunk by area, as by OpenCV.

    Args:
        pixels: uint8 (height, width, 3).
        resolution: of the short side; see :func:`detector_size`.

    Returns:
        uint8 (height, width, 3).
    """
    height, width = pixels.shape[:2]
    size = detector_size(height, width, resolution)
    enlarged = resolution / min(height, width) > 1
    # Area resampling is exact where both sides shrink; if rounding makes one grow, both are interpolated.
    kind = _lanczos if enlarged else _area if size[0] <= height and size[1] <= width else _stretched
    down, across = kind(height, size[0]), kind(width, size[1])
    resized = np.einsum("ph,hwc,qw->pqc", down, pixels.astype(np.float64), across, optimize=True)
    rounded: np.ndarray = np.round(resized).clip(0, 255).astype(np.uint8)
    return rounded


def _lanczos(old: int, new: int) -> np.ndarray:
    """(new, old) weights of sinc(t) sinc(t / 4), without antialiasing; the border is repeated."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centre)[:, None] + np.arange(1 - LANCZOS_TAPS // 2, 1 + LANCZOS_TAPS // 2)
    distance = centre[:, None] - taps
    weights = np.sinc(distance) * np.sinc(distance / (LANCZOS_TAPS // 2))
    # OpenCV computes with whole 2048ths.
    return _matrix(taps, np.round(2048 * weights / weights.sum(1, keepdims=True)) / 2048, old)


def _area(old: int, new: int) -> np.ndarray:
    """(new, old) share of each old pixel in each new one."""
    edges = np.arange(new + 1) * old / new
    cells = np.arange(old)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    shares: np.ndarray = overlap.clip(0) * new / old
    return shares


def _stretched(old: int, new: int) -> np.ndarray:
    """(new, old) weights of OpenCV's area mode where a side grows: new pixels inside an old one take its value."""
    first = np.floor(np.arange(new) * old / new)
    share = np.arange(1, new + 1) - (first + 1) * new / old
    share = np.where(share <= 0, 0.0, share - np.floor(share))
    return _matrix(first[:, None] + np.arange(2), np.stack((1 - share, share), axis=1), old)


def _matrix(taps: np.ndarray, weights: np.ndarray, old: int) -> np.ndarray:
    matrix = np.zeros((len(taps), old))
    rows = np.arange(len(taps))[:, None]
    np.add.at(matrix, (rows, taps.clip(0, old - 1).astype(int)), weights)
    return matrix
