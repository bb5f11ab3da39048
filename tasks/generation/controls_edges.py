"""Soft edges and what is made of them: thin lines and sketches.

The thinning is that of the structured-edge post-processing which ControlNet's annotators and CAR use.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor

DIRECTIONS = (((0, 1), (0, -1)), ((1, 0), (-1, 0)), ((1, 1), (-1, -1)), ((1, -1), (-1, 1)))
"""The two neighbours of a pixel along each of the four directions, as (down, right)."""


def gradient_edges(image: Float[Tensor, "3 height width"]) -> Float[Tensor, "height width"]:
    """Soft edges without a learned detector: the size of the luminance's gradient over three widths of blur.

    Args:
        image: in [0, 1].

    Returns:
        In [0, 1]; 1 from the 99th percentile on. A picture without any contrast gives zeros.
    """
    from kornia.color import rgb_to_grayscale
    from kornia.filters import gaussian_blur2d, sobel

    grey = rgb_to_grayscale(image[None].float())
    parts = []
    for sigma in (1.0, 2.0, 4.0):
        taps = 2 * min(round(3 * sigma), min(grey.shape[-2:]) - 1) + 1
        parts.append(sobel(gaussian_blur2d(grey, (taps, taps), (sigma, sigma)), eps=1e-12) * sigma)
    size = torch.stack(parts).amax(0)[0, 0]
    # The gradient of a flat picture is rounding, which must not be blown up to edges.
    strong = size.flatten().quantile(0.99).clamp_min(0.01)
    return (size / strong).clamp(0, 1)


def blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur as OpenCV's, with the kernel size it chooses for the type; the border is mirrored.

    Args:
        picture: (height, width): uint8, blurred in fixed-point numbers, or float32.
    """
    exact = picture.dtype == np.uint8
    # Three sigma to each side, or four; both roundings are those of an automatic kernel size.
    radius = (int(np.round(2 * (3 if exact else 4) * sigma + 1)) | 1) // 2
    distance = np.arange(-radius, radius + 1)
    kernel = np.exp(-(distance**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    if not exact:
        blurred = picture.astype(np.float32)
        for axis in (1, 0):
            blurred = ndimage.correlate1d(blurred, kernel, axis, mode="mirror")
        return blurred
    weights = _fixed_point(kernel)
    total = picture.astype(np.int64)
    for axis in (1, 0):
        total = ndimage.correlate1d(total, weights, axis, mode="mirror")
    return ((total + (1 << 15)) >> 16).astype(np.uint8)


def _fixed_point(kernel: np.ndarray) -> np.ndarray:
    """A symmetric kernel as whole 256ths that sum to 256: each rounding error goes to the next weight inwards."""
    half = len(kernel) // 2
    weights = np.zeros(len(kernel), dtype=np.int64)
    error = 0.0
    for i, value in enumerate(kernel[:half] * 256):
        weights[i] = weights[-1 - i] = np.round(value + error)
        error += value - weights[i]
    weights[half] = 256 - weights.sum()
    return weights


def thin(soft: np.ndarray, threshold: int = 127, sigma: float = 3.0) -> np.ndarray:
    """Soft edges to lines one or two pixels wide.

    Args:
        soft: (height, width), 0 to 255.
        threshold: blurred values must exceed it.
        sigma: of the blur before the maxima are looked for.

    Returns:
        bool: pixels that are the largest of three in a row along at least one of four directions.
    """
    x = blur(soft.astype(np.float32), sigma)
    around = np.pad(x, 1, constant_values=-np.inf)
    height, width = x.shape
    largest = np.zeros(x.shape, dtype=bool)
    for pair in DIRECTIONS:
        neighbours = [around[1 + a : 1 + a + height, 1 + b : 1 + b + width] for a, b in pair]
        largest |= (x >= neighbours[0]) & (x >= neighbours[1])
    return largest & (x > threshold)


def sketch(
    soft: np.ndarray,
    nms_threshold: int = 127,
    nms_sigma: float = 3.0,
    sigma: float = 3.0,
    threshold: int = 4,
) -> np.ndarray:
    """Soft edges to strokes: thinned, blurred by ``sigma``, and all that exceeds ``threshold`` of 255.

    Args:
        soft: (height, width), 0 to 255.
        nms_threshold, nms_sigma: of :func:`thin`.

    Returns:
        bool (height, width).
    """
    lines = thin(soft, nms_threshold, nms_sigma).astype(np.uint8) * np.uint8(255)
    strokes: np.ndarray = blur(lines, sigma) > threshold
    return strokes
