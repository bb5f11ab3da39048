"""Bringing a prediction without a known scale onto the ground truth, image by image, before errors are taken.

g is the true and p the predicted depth over the pixels compared; an alignment fitted there is applied to the whole map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Space = Literal["depth", "inverse", "log"]


class AlignmentError(ValueError):
    """A prediction that cannot be aligned."""


@dataclass(frozen=True)
class Affine:
    """p -> scale x p + shift, of the depths, of their inverses, or of their logarithms."""

    scale: float = 1.0
    shift: float = 0.0
    space: Space = "depth"

    def __call__(self, depth: np.ndarray) -> np.ndarray:
        """The aligned map, float64.

        In inverse space, what comes out at zero or below lies beyond every distance: infinity, for a cap to cut.
        """
        depth = np.asarray(depth, np.float64)
        if self.space == "depth":
            return depth * self.scale + self.shift
        with np.errstate(divide="ignore", over="ignore"):
            if self.space == "log":
                return np.exp(self.scale * np.log(depth) + self.shift)
            inverse = self.scale / depth + self.shift
            return np.where(inverse > 0, 1 / np.where(inverse > 0, inverse, 1), math.inf)


def lower_median(values: np.ndarray) -> float:
    """The middle value; of an even count the lower of the two in the middle (as torch.median)."""
    middle = (values.size - 1) // 2
    return float(np.partition(values.reshape(-1), middle)[middle])


def _least_squares(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """scale and shift that minimise the sum of (scale x + shift - y)^2; scale 0 where x is constant."""
    # About the means: the plain normal equations lose half of the digits.
    mean_x, mean_y = float(np.mean(x)), float(np.mean(y))
    away = x - mean_x
    spread = float(np.dot(away, away))
    scale = float(np.dot(away, y - mean_y)) / spread if spread > 0 else 0.0
    return scale, mean_y - scale * mean_x


def _ratios(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    # A prediction of zero gives infinity, which a median takes without harm.
    with np.errstate(divide="ignore"):
        ratios: np.ndarray = truth / prediction
    return ratios


def none(truth: np.ndarray, prediction: np.ndarray) -> Affine:
    """Nothing: the prediction is metric."""
    return Affine()


def median(truth: np.ndarray, prediction: np.ndarray) -> Affine:
    """Scale median(g) / median(p), means of the two in the middle (Zhou et al., CVPR 2017; monodepth2)."""
    middle = float(np.median(prediction))
    if middle == 0:
        raise AlignmentError("the prediction's median is 0, so there is no scale; predictions must be positive depths")
    return Affine(float(np.median(truth)) / middle)


def median_of_ratios(truth: np.ndarray, prediction: np.ndarray) -> Affine:
    """Scale median(g / p), the lower one of an even count: least in absolute error relative to p (DepthART)."""
    return Affine(lower_median(_ratios(truth, prediction)))


def scale(truth: np.ndarray, prediction: np.ndarray) -> Affine:
    """Scale that minimises the sum of (s p - g)^2."""
    squares = float(np.dot(prediction, prediction))
    return Affine(float(np.dot(prediction, truth)) / squares if squares > 0 else 0.0)


def scale_shift(truth: np.ndarray, prediction: np.ndarray) -> Affine:
    """Scale and shift that minimise the sum of (s p + t - g)^2 (Marigold)."""
    return Affine(*_least_squares(prediction, truth))


def inverse_scale_shift(truth: np.ndarray, prediction: np.ndarray) -> Affine:
    """Scale and shift that minimise the sum of (s / p + t - 1 / g)^2, then inverted (MiDaS)."""
    return Affine(*_least_squares(1 / prediction, 1 / truth), "inverse")


def log_scale_shift(truth: np.ndarray, prediction: np.ndarray) -> Affine:
    """Scale and shift that minimise the sum of (s ln p + t - ln g)^2."""
    return Affine(*_least_squares(np.log(prediction), np.log(truth)), "log")


def log_median(truth: np.ndarray, prediction: np.ndarray) -> Affine:
    """Adds median(ln g - ln p) to ln p, the lower one of an even count."""
    return Affine(math.exp(lower_median(np.log(truth) - np.log(prediction))))


def median_shift(truth: np.ndarray, prediction: np.ndarray) -> Affine:
    """Adds median(g - p), the lower one of an even count: log_median as DepthART applies it to plain depths."""
    return Affine(1.0, lower_median(truth - prediction))


def mean_deviation(truth: np.ndarray, prediction: np.ndarray) -> Affine:
    """p x mean(abs(p - m)) + m with m = median(g), the lower one: DepthART's ``ssi_l1``, which is no fit."""
    middle = lower_median(truth)
    return Affine(float(np.mean(np.abs(prediction - middle))), middle)


ALIGNMENTS: dict[str, Callable[[np.ndarray, np.ndarray], Affine]] = {
    "none": none,
    "median": median,
    "median_of_ratios": median_of_ratios,
    "scale": scale,
    "scale_shift": scale_shift,
    "inverse_scale_shift": inverse_scale_shift,
    "log_scale_shift": log_scale_shift,
    "log_median": log_median,
    "median_shift": median_shift,
    "mean_deviation": mean_deviation,
}
"""Alignments by name: (true, predicted) depths of the pixels compared -> :class:`Affine`."""

_POSITIVE = ("inverse_scale_shift", "log_scale_shift", "log_median")


def align(truth: np.ndarray, prediction: np.ndarray, name: str) -> Affine:
    """Fit an alignment over the pixels compared.

    Args:
        truth, prediction: of equal shape; finite. In inverse and log space both must be positive.
        name: of :data:`ALIGNMENTS`.

    Raises:
        AlignmentError: the name is unknown, or the values are not of this kind, or there are none.
    """
    if name not in ALIGNMENTS:
        raise AlignmentError(f"unknown alignment {name!r}; known: {', '.join(ALIGNMENTS)}")
    if name == "none":
        return Affine()
    true, predicted = (np.asarray(values, np.float64).reshape(-1) for values in (truth, prediction))
    if not true.size or true.shape != predicted.shape:
        raise AlignmentError(f"{true.size} true and {predicted.size} predicted depths; expected as many, and some")
    if wrong := int((~(np.isfinite(true) & np.isfinite(predicted))).sum()):
        raise AlignmentError(f"{wrong} of {true.size} depths are infinite or NaN and cannot be aligned")
    if name in _POSITIVE and (wrong := int(((true <= 0) | (predicted <= 0)).sum())):
        raise AlignmentError(f"{wrong} of {true.size} depths are not positive; {name} takes positive ones")
    return ALIGNMENTS[name](true, predicted)
