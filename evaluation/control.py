"""How closely one picture's edges follow another's."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage


class EdgeAgreement(NamedTuple):
    """Shares of 1.

    Attributes:
        f1: harmonic mean of the other two.
        precision: of the edges found, those that lie on a wanted one.
        recall: of the edges wanted, those that lie on a found one.
    """

    f1: float
    precision: float
    recall: float


def edge_agreement(wanted: np.ndarray, found: np.ndarray, tolerance: int = 0) -> EdgeAgreement:
    """F1 of edge pixels.

    Args:
        wanted, found: truth values (height, width), the control's edges and those of what was made from it.
        tolerance: pixels, along rows, columns and diagonals, by which an edge may lie beside the other. At 32 x 32
            pixels edges are so dense that one pixel of tolerance lets unrelated pictures agree by half.

    Returns:
        1 throughout where neither picture has an edge.

    Raises:
        ValueError: the sizes differ.
    """
    wanted, found = np.asarray(wanted, bool), np.asarray(found, bool)
    if wanted.shape != found.shape or wanted.ndim != 2:
        raise ValueError(f"edges are {wanted.shape} and {found.shape}, expected two maps (height, width) of one size")
    if not wanted.any() and not found.any():
        return EdgeAgreement(1.0, 1.0, 1.0)
    if not wanted.any() or not found.any():
        return EdgeAgreement(0.0, 0.0, 0.0)
    precision = float(_near(wanted, tolerance)[found].mean())
    recall = float(_near(found, tolerance)[wanted].mean())
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return EdgeAgreement(f1, precision, recall)


def _near(edges: np.ndarray, tolerance: int) -> np.ndarray:
    if tolerance == 0:
        return edges
    side = 2 * tolerance + 1
    grown: np.ndarray = ndimage.binary_dilation(edges, np.ones((side, side), bool))
    return grown
