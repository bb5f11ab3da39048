"""Distances to the camera's centre turned into depths along its axis, and holes filled (Hypersim)."""

from __future__ import annotations

import math

import numpy as np

HYPERSIM_FOV = math.pi / 3
"""Horizontal angle of view, radians, of nearly all Hypersim scenes."""


def focal_length(width: int, fov_x: float) -> float:
    """Pixels: width / (2 tan(fov_x / 2))."""
    if not 0 < fov_x < math.pi:
        raise ValueError(f"the angle of view is {fov_x} radians; expected between 0 and pi")
    return width / (2 * math.tan(fov_x / 2))


def planar_depth(distance: np.ndarray, fov_x: float = HYPERSIM_FOV) -> np.ndarray:
    """Depth along the axis from the distance to the camera's centre.

    distance x f / |(u, v, f)| with u, v the offsets of the pixel's column and row from the middle of the map.

    Args:
        distance: (height, width) metres; NaN stays NaN.
        fov_x: horizontal angle of view, radians.

    Returns:
        float32 (height, width).
    """
    height, width = distance.shape
    focal = focal_length(width, fov_x)
    u = np.arange(width) - (width - 1) / 2
    v = np.arange(height) - (height - 1) / 2
    ray = np.sqrt(u[None, :] ** 2 + v[:, None] ** 2 + focal**2)
    return (distance.astype(np.float64) * (focal / ray)).astype(np.float32)


def fill_holes(depth: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The map with each hole pixel (bool) replaced by the value of the nearest pixel that is none.

    Raises:
        ValueError: there are only holes.
    """
    from scipy.ndimage import distance_transform_edt

    if hole.all():
        raise ValueError(f"all {hole.size} pixels are holes, so there is nothing to fill them with")
    rows, columns = distance_transform_edt(hole, return_distances=False, return_indices=True)
    filled: np.ndarray = depth[rows, columns]
    return filled
