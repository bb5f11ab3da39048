"""Errors of depth maps, as pure functions of the pixels that are compared.

g is the true and p the predicted depth of a pixel, both in metres (or both up to a common scale), e = ln p - ln g. A
figure of a benchmark is the mean over images of each image's value (:func:`mean_over_images`); which pixels count,
and what is done to a prediction before it is compared, is a protocol's business (``depth_protocols``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np


class DepthMetricError(ValueError):
    """Depths that no error can be computed of."""


class EmptyMaskError(DepthMetricError):
    """No pixel is left to compare."""


class Pixels:
    """The pixels of one image that are compared, and what several errors need of them.

    Attributes:
        truth, prediction: float64 (n,), n >= 1.

    Raises:
        EmptyMaskError: there is no pixel.
        DepthMetricError: shapes differ; a true depth is not finite and positive; a predicted one is negative or NaN.
            A prediction of zero or infinity is let through: its errors are infinite.
    """

    def __init__(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        self.truth = np.asarray(truth, np.float64).reshape(-1)
        self.prediction = np.asarray(prediction, np.float64).reshape(-1)
        if self.truth.shape != self.prediction.shape:
            raise DepthMetricError(
                f"{self.truth.size} true depths and {self.prediction.size} predicted ones; expected as many"
            )
        if not self.truth.size:
            raise EmptyMaskError("no pixel to compare: the ground truth has no valid pixel in the region and range")
        if wrong := int((~((self.truth > 0) & (self.truth < math.inf))).sum()):
            raise DepthMetricError(
                f"{wrong} of {self.truth.size} true depths are zero, negative, infinite or NaN; leave such pixels out"
            )
        if wrong := int((~(self.prediction >= 0)).sum()):
            raise DepthMetricError(
                f"{wrong} of {self.truth.size} predicted depths are negative or NaN; depths are positive, so "
                "correct the prediction, or use a protocol that clamps"
            )

    @cached_property
    def scratch(self) -> np.ndarray:
        """Room for intermediate values, used again and again: fresh memory costs more than the arithmetic."""
        return np.empty_like(self.truth)

    @cached_property
    def difference(self) -> np.ndarray:
        """p - g."""
        return self.prediction - self.truth

    @cached_property
    def quotient(self) -> np.ndarray:
        """p / g."""
        return self.prediction / self.truth

    @cached_property
    def log_difference(self) -> np.ndarray:
        """e = ln p - ln g: minus infinity where p is 0."""
        with np.errstate(divide="ignore"):
            logs: np.ndarray = np.log(self.quotient)
        return logs

    @cached_property
    def ratio(self) -> np.ndarray:
        """max(g / p, p / g), at least 1."""
        with np.errstate(divide="ignore"):
            inverse: np.ndarray = 1 / self.quotient
        return np.maximum(self.quotient, inverse, out=inverse)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values))


def _mean_size(values: np.ndarray, pixels: Pixels) -> float:
    return _mean(np.abs(values, out=pixels.scratch))


def _mean_square(values: np.ndarray, pixels: Pixels) -> float:
    # No dot product: it starts threads of its own, which wait for those that evaluate other images.
    return _mean(np.square(values, out=pixels.scratch))


def _relative(operation: np.ufunc, pixels: Pixels) -> float:
    """Mean of a function of the difference, as a share of the truth."""
    error = operation(pixels.difference, out=pixels.scratch)
    error /= pixels.truth
    return _mean(error)


def _silog(pixels: Pixels) -> float:
    error = pixels.log_difference
    # 100 sqrt(mean e^2 - (mean e)^2) as a deviation from the mean, which rounding cannot make negative.
    with np.errstate(invalid="ignore"):
        deviation = np.subtract(error, np.mean(error), out=pixels.scratch)
    return 100 * math.sqrt(_mean_square(deviation, pixels))


def _inverse(pixels: Pixels) -> np.ndarray:
    with np.errstate(divide="ignore"):
        difference: np.ndarray = 1 / pixels.prediction - 1 / pixels.truth
    return difference


def _within(threshold: float) -> Callable[[Pixels], float]:
    return lambda pixels: np.count_nonzero(pixels.ratio < threshold) / pixels.truth.size


METRICS: dict[str, Callable[[Pixels], float]] = {
    "abs_rel": lambda pixels: _relative(np.abs, pixels),
    "sq_rel": lambda pixels: _relative(np.square, pixels),
    "rmse": lambda pixels: math.sqrt(_mean_square(pixels.difference, pixels)),
    "rmse_log": lambda pixels: math.sqrt(_mean_square(pixels.log_difference, pixels)),
    "silog": _silog,
    "log10": lambda pixels: _mean_size(pixels.log_difference, pixels) / math.log(10),
    "d1": _within(1.25),
    "d2": _within(1.25**2),
    "d3": _within(1.25**3),
    "mae": lambda pixels: _mean_size(pixels.difference, pixels),
    "mse": lambda pixels: _mean_square(pixels.difference, pixels),
    "log10_rmse": lambda pixels: math.sqrt(_mean_square(pixels.log_difference, pixels)) / math.log(10),
    "irmse": lambda pixels: 1000 * math.sqrt(_mean_square(_inverse(pixels), pixels)),
    "imae": lambda pixels: 1000 * _mean_size(_inverse(pixels), pixels),
    "d102": _within(1.02),
    "d105": _within(1.05),
    "d110": _within(1.1),
}
"""Errors by name.

abs_rel mean abs(g - p) / g; sq_rel mean (g - p)^2 / g; rmse sqrt mean (g - p)^2; rmse_log sqrt mean e^2; log10 mean
abs(log10 g - log10 p); silog 100 sqrt(mean e^2 - (mean e)^2), not defined (NaN) where a prediction is 0 or infinite;
d1, d2, d3 the share of pixels with max(g / p, p / g) strictly below 1.25, 1.25^2, 1.25^3; d102, d105, d110 below 1.02,
1.05, 1.1; mae, mse plain; log10_rmse with decadic logarithms (DIODE); irmse, imae of 1 / depth, in 1/km (the KITTI
server). All after Eigen et al., NIPS 2014, and the KITTI depth benchmark.
"""

STANDARD = ("abs_rel", "sq_rel", "rmse", "rmse_log", "silog", "log10", "d1", "d2", "d3")
"""What most papers report."""

HIGHER_IS_BETTER = frozenset(name for name in METRICS if name.startswith("d"))


def depth_metrics(truth: np.ndarray, prediction: np.ndarray, names: Sequence[str] = STANDARD) -> dict[str, float]:
    """Errors of one image over the pixels given, in float64.

    Args:
        truth, prediction: of equal shape, metres. True depths finite and positive, predicted ones not negative.
        names: of :data:`METRICS`.

    Raises:
        EmptyMaskError, DepthMetricError: see :class:`Pixels`; or a name is unknown.
    """
    if unknown := [name for name in names if name not in METRICS]:
        raise DepthMetricError(f"unknown metrics {', '.join(unknown)}; known: {', '.join(METRICS)}")
    pixels = Pixels(truth, prediction)
    return {name: METRICS[name](pixels) for name in names}


def mean_over_images(images: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over images of each metric: what papers report.

    Raises:
        DepthMetricError: there is no image, or they do not hold the same metrics.
    """
    if not images:
        raise DepthMetricError("no image was evaluated, so there is no mean")
    names = list(images[0])
    if any(set(image) != set(names) for image in images):
        raise DepthMetricError("images hold different metrics; evaluate all of them alike")
    return {name: math.fsum(image[name] for image in images) / len(images) for name in names}


def pooled_rmse(images: Sequence[tuple[float, int]]) -> float:
    """rmse over the pixels of all images, from each image's (rmse, pixels).

    An older habit on NYU Depth; larger than the mean of the images' values, and not to be compared with it.
    """
    pixels = sum(count for _, count in images)
    if not pixels:
        raise EmptyMaskError("no pixel in any image, so there is no pooled error")
    return math.sqrt(math.fsum(rmse**2 * count for rmse, count in images) / pixels)
