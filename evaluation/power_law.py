"""Power laws of the loss, as scaling laws are stated: L = (beta x)^alpha, a straight line in log-log coordinates.

Kaplan et al. 2020 (arXiv 2001.08361); for next-scale prediction Tian et al. 2024 (arXiv 2404.02905, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """L = (coefficient x)^exponent.

    Attributes:
        exponent: alpha; below 0 where more gives less loss.
        at_one: L where x is 1, coefficient^exponent.
        correlation: Pearson's, of log x and log L; -1 where the law is exact and falling.
        points: how many it was fitted to.
    """

    exponent: float
    at_one: float
    correlation: float
    points: int

    @property
    def coefficient(self) -> float | None:
        """beta, per unit of x; None where the line is so flat that it is no number."""
        power = math.log(self.at_one) / self.exponent if self.exponent else math.inf
        return math.exp(power) if abs(power) < 700 else None

    def __call__(self, x: float) -> float:
        return self.at_one * x**self.exponent


def fit_power_law(x: Sequence[float], loss: Sequence[float]) -> PowerLaw:
    """The least-squares line through (log x, log loss).

    Raises:
        ValueError: there are fewer than two different x, or a value is not positive.
    """
    if len(x) != len(loss):
        raise ValueError(f"{len(x)} places were given for {len(loss)} losses")
    if len(set(x)) < 2:
        raise ValueError(f"a power law needs at least two different sizes, got {sorted(set(x))}")
    places, values = np.asarray(x, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    if not (np.all(places > 0) and np.all(values > 0) and np.all(np.isfinite(values))):
        raise ValueError("a power law is of positive numbers; a size or a loss is zero, negative or not finite")
    across, up = np.log(places), np.log(values)
    spread = across - across.mean()
    exponent = float(spread @ (up - up.mean()) / (spread @ spread))
    correlation = float(np.corrcoef(across, up)[0, 1]) if exponent else 0.0
    return PowerLaw(exponent, float(np.exp(up.mean() - exponent * across.mean())), correlation, len(x))


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto frontier of (cost, loss): the points that none of at most their cost is better than, by cost.

    Along the training curves of models of several sizes it is the best that each amount of compute has reached, with
    the size that suits it.
    """
    best, kept = np.inf, []
    for cost, loss in sorted(points):
        if loss < best:
            best = loss
            kept.append((cost, loss))
    return kept
