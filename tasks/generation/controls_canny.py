"""Canny edges of 8-bit pictures, pixel for pixel as OpenCV's ``Canny`` draws them.

Canny 1986. Gradients by the 3 x 3 Sobel operator, their size as |dx| + |dy|; of a colour picture, each pixel
takes the channel with the largest. Adapters were trained on maps of that implementation, so its integer
arithmetic and its choices on ties are kept.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

TAN_22 = 13573
"""tan(22.5 degrees) as a fixed-point number of 15 binary digits; tan(67.5) is that plus 2."""


def canny(pixels: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Edge maps.

    Args:
        pixels: uint8 (height, width, channels) or a batch (…, height, width, channels).
        low, high: thresholds on the gradient's size, 0 to 2040: edges are the maxima across the gradient above
            ``low`` that touch, over other such pixels, one above ``high``.

    Returns:
        bool, the shape without the channels.

    Raises:
        ValueError: the pixels are no uint8 or lack an axis, or a threshold is negative.
    """
    if pixels.dtype != np.uint8 or pixels.ndim < 3:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, expected uint8 (…, height, width, channels)")
    if min(low, high) < 0:
        raise ValueError(f"the thresholds are {low} and {high}, expected numbers from 0 to 2040")
    batch = pixels.reshape(-1, *pixels.shape[-3:])
    weak, strong = (int(np.floor(threshold)) for threshold in sorted((low, high)))
    dx, dy = _sobel(batch)
    size = np.abs(dx) + np.abs(dy)
    largest = size.argmax(-1)[..., None]
    dx, dy, size = (np.take_along_axis(part, largest, -1)[..., 0] for part in (dx, dy, size))
    candidate = (size > weak) & _is_maximum(dx, dy, size)
    # Neighbours touch within a picture only, also over corners.
    touching = np.zeros((3, 3, 3), dtype=bool)
    touching[1] = True
    regions, count = ndimage.label(candidate, touching)
    kept = np.zeros(count + 1, dtype=bool)
    kept[regions[candidate & (size > strong)]] = True
    edges: np.ndarray = kept[regions]
    return edges.reshape(pixels.shape[:-1])


def _sobel(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Horizontal and vertical gradients, int32; beyond the edge the border's pixels are repeated."""
    p = np.pad(batch.astype(np.int32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    down = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    across = p[:, :, :-2] + 2 * p[:, :, 1:-1] + p[:, :, 2:]
    return down[:, :, 2:] - down[:, :, :-2], across[:, 2:] - across[:, :-2]


def _is_maximum(dx: np.ndarray, dy: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Whether no neighbour along the gradient, rounded to one of four directions, is larger."""
    around = np.pad(size, ((0, 0), (1, 1), (1, 1)))
    height, width = size.shape[1:]

    def neighbour(down: int, right: int) -> np.ndarray:
        return around[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = np.abs(dx), np.abs(dy) << 15
    tangent = x * TAN_22
    flat, steep = y < tangent, y > tangent + (x << 16)
    level = (size > neighbour(0, -1)) & (size >= neighbour(0, 1))
    upright = (size > neighbour(-1, 0)) & (size >= neighbour(1, 0))
    falling = (size > neighbour(-1, -1)) & (size > neighbour(1, 1))
    rising = (size > neighbour(-1, 1)) & (size > neighbour(1, -1))
    slanted = np.where((dx ^ dy) < 0, rising, falling)
    return np.where(flat, level, np.where(steep, upright, slanted))
