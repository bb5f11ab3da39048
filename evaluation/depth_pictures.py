"""Errors of depth maps as colours, for people."""

from __future__ import annotations

import numpy as np

WRONG = 0.5
"""Relative error at which an error map is fully red."""


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
        picture[mask] = colormaps["bwr"](np.clip(0.5 + error / (2 * WRONG), 0, 1), bytes=True)[:, :3]
    return picture
