"""Depth maps and their errors as colours, for people."""

from __future__ import annotations

import numpy as np

WRONG = 0.5
"""Relative error at which an error map is fully red."""


def depth_picture(
    depth: np.ndarray,
    mask: np.ndarray | None = None,
    span: tuple[float, float] | None = None,
    colours: str = "magma",
) -> np.ndarray:
    """Near light, far dark, by inverse depth; grey where there is no depth.

    Args:
        depth: (height, width); values that are not positive and finite count as none.
        mask: bool, where the depth is known.
        span: (nearest, farthest) depth of the scale; the 2 and 98 % quantiles, unless given.
        colours: a colour map of matplotlib.

    Returns:
        uint8 (height, width, 3).
    """
    from matplotlib import colormaps

    depth = np.asarray(depth, np.float64)
    with np.errstate(invalid="ignore"):
        known = np.isfinite(depth) & (depth > 0)
    if mask is not None:
        known = known & mask
    picture = np.full((*depth.shape, 3), 128, np.uint8)
    if not known.any():
        return picture
    near, far = np.quantile(depth[known], [0.02, 0.98]) if span is None else span
    low, high = 1 / max(far, 1e-9), 1 / max(near, 1e-9)
    share = (1 / depth[known] - low) / max(high - low, 1e-12)
    picture[known] = _bytes(colormaps[colours](np.clip(share, 0, 1)))
    return picture


def error_picture(truth: np.ndarray, prediction: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Relative error: white where right, red where predicted too far, blue where too near, grey where not compared.

    Args:
        truth, prediction: (height, width). mask: bool, the pixels that are compared.

    Returns:
        uint8 (height, width, 3); full colour at an error of :data:`WRONG`.
    """
    from matplotlib import colormaps

    picture = np.full((*truth.shape, 3), 128, np.uint8)
    if mask.any():
        error = np.asarray(prediction, np.float64)[mask] / np.asarray(truth, np.float64)[mask] - 1
        picture[mask] = _bytes(colormaps["bwr"](np.clip(0.5 + error / (2 * WRONG), 0, 1)))
    return picture


def _bytes(colours: np.ndarray) -> np.ndarray:
    values: np.ndarray = (colours[..., :3] * 255 + 0.5).astype(np.uint8)
    return values
