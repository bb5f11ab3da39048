"""DepthART's evaluator: five alignments, errors, and the share of pixels that are *wrong* by more than a ratio.

Gabdullin et al., DepthART, IJCAI 2025, and its released code; all in the arithmetic of that code, float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .depth_alignment import align
from .depth_maps import resize_map

ALIGNERS = {
    "si_l1": "median_of_ratios",
    "si_l2": "scale",
    "ssi_l2": "scale_shift",
    "ssi_l1": "mean_deviation",
    "si_l1log": "median_shift",
}
"""Its names of ``depth_alignment.ALIGNMENTS``."""

ERRORS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "mae": lambda g, p: float(np.mean(np.abs(p - g))),
    "mse": lambda g, p: float(np.mean((p - g) ** 2)),
    "absrel": lambda g, p: float(np.mean(np.abs(p - g) / g)),
    "sqrel": lambda g, p: float(np.mean((p - g) ** 2 / g)),
}
"""By name, of (true, predicted) depths."""

SHARES = {"d1": 1.25, "d2": 1.25**2, "d3": 1.25**3, "d102": 1.02, "d105": 1.05, "d110": 1.1}
"""Ratios by name. Its class list writes 1.25 for d110, its paper 1.1."""


def resize_pair(
    truth: np.ndarray, prediction: np.ndarray, mask: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth and mask by nearest, the prediction bilinearly between the corners, all to (height, width)."""
    return (
        resize_map(truth, size, "nearest"),
        resize_map(prediction, size, "bilinear_corners"),
        resize_map(np.asarray(mask, bool), size, "nearest"),
    )


def aligned(truth: np.ndarray, prediction: np.ndarray, mask: np.ndarray, aligner: str) -> np.ndarray:
    """The whole prediction (height, width), aligned over the mask by one of :data:`ALIGNERS`."""
    if aligner not in ALIGNERS:
        raise ValueError(f"unknown aligner {aligner!r}; known: {', '.join(ALIGNERS)}")
    return align(truth[mask], prediction[mask], ALIGNERS[aligner])(prediction)


def wrong_share(truth: np.ndarray, prediction: np.ndarray, ratio: float) -> float:
    """Share of pixels with max(g / p, p / g) above ``ratio``.

    A prediction of 0 is wrong; a negative one, which alignments with a shift can give, has a negative ratio and is not
    counted as wrong, as in the released code.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        larger = np.maximum(truth / prediction, prediction / truth)
    return float(np.mean(larger > ratio))


def evaluate(
    truth: np.ndarray, prediction: np.ndarray, mask: np.ndarray, errors: list[str], shares: list[str]
) -> tuple[list[float], list[float]]:
    """Errors and wrong shares of an aligned prediction over the mask, in the order of the names."""
    g, p = truth[mask], prediction[mask]
    if not g.size:
        raise ValueError("the mask is empty, so there is nothing to compare")
    return [ERRORS[name](g, p) for name in errors], [wrong_share(g, p, SHARES[name]) for name in shares]
