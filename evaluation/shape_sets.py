"""How a set of generated shapes stands to a set of real ones: coverage, minimum matching distance, 1-NN accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

CONVENTION = (
    "Chamfer distance between clouds of equally many points: mean squared distance to the nearest point, both ways "
    "added (Achlioptas et al. 2018; Yang et al., PointFlow, 2019); MMD times 1000"
)


@dataclass(frozen=True)
class SetFigures:
    """Attributes:

    coverage: share of the reference shapes that are nearest to a generated one, in [0, 1]. It grows with the number of
        generated shapes: take as many as there are references.
    mmd: mean over the references of the distance to the nearest generated shape, times 1000.
    accuracy: of telling generated from reference shapes by the nearest other one, in [0, 1]; 0.5 is best, and below it
        generated shapes are nearer to references than these are to each other.
    """

    coverage: float
    mmd: float
    accuracy: float


def set_figures(between: np.ndarray, references: np.ndarray, generated: np.ndarray) -> SetFigures:
    """From distances.

    Args:
        between: (references, generated). references: (references, references). generated: (generated, generated).

    Raises:
        ValueError: shapes do not fit, or a set has fewer than 2 shapes.
    """
    n, m = between.shape
    if references.shape != (n, n) or generated.shape != (m, m) or min(n, m) < 2:
        raise ValueError(
            f"distances have shapes {between.shape}, {references.shape}, {generated.shape}; expected (n, m), (n, n), "
            "(m, m), of 2 or more of each"
        )
    coverage = len(np.unique(between.argmin(axis=0))) / n
    own_r, own_g = references.astype(np.float64).copy(), generated.astype(np.float64).copy()
    np.fill_diagonal(own_r, np.inf)
    np.fill_diagonal(own_g, np.inf)
    # Of equally near ones of both sets, which copies have, neither may win: half a point.
    right_r = _wins(own_r.min(1), between.min(1))
    right_g = _wins(own_g.min(1), between.min(0))
    accuracy = float((right_r.sum() + right_g.sum()) / (n + m))
    return SetFigures(coverage, float(between.min(1).mean() * 1000), accuracy)


def _wins(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.where(own < other, 1.0, np.where(own == other, 0.5, 0.0))


def chamfer_distances(clouds: Sequence[np.ndarray], progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """Distances between all pairs of clouds, each (points, 3), by :data:`CONVENTION`: float64 (clouds, clouds).

    Args:
        progress: called with (pairs compared, all).
    """
    from scipy.spatial import KDTree

    trees = [KDTree(cloud) for cloud in clouds]
    total, done = len(clouds) * (len(clouds) - 1) // 2, 0
    distances = np.zeros((len(clouds), len(clouds)))

    def row(i: int) -> list[float]:
        found = []
        for j in range(i):
            there, back = trees[j].query(clouds[i])[0], trees[i].query(clouds[j])[0]
            found.append(float(np.square(there).mean() + np.square(back).mean()))
        return found

    # Searches leave Python's lock to others.
    with ThreadPoolExecutor() as pool:
        for i, found in enumerate(pool.map(row, range(len(clouds)))):
            distances[i, :i] = distances[:i, i] = found
            done += i
            if progress is not None:
                progress(done, total)
    return distances


def compare_sets(
    references: Sequence[np.ndarray],
    generated: Sequence[np.ndarray],
    progress: Callable[[int, int], None] | None = None,
) -> SetFigures:
    """Compare sets of clouds; ``progress`` as of :func:`chamfer_distances`."""
    distances, n = chamfer_distances([*references, *generated], progress), len(references)
    return set_figures(distances[:n, n:], distances[:n, :n], distances[n:, n:])


def floor_figures(references: np.ndarray, seed: int = 0) -> SetFigures:
    """The same figures of one half of the references against the other, drawn at random: what a perfect set has.

    Args:
        references: (references, references), distances between them.
    """
    order = np.random.default_rng(seed).permutation(len(references))
    half = len(order) // 2
    first, second = order[:half], order[half : 2 * half]
    parts = (references[np.ix_(rows, columns)] for rows, columns in ((first, second), (first, first), (second, second)))
    return set_figures(*parts)
