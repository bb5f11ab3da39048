"""How far a reconstructed surface is from the true one: Chamfer distances, F-score, normal consistency, volume IoU.

Plain functions of clouds of points and of labels. Published figures differ in what is summed, squared and scaled:
a :class:`Convention` names one way, and reports carry its name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Convention:
    """How the figures of a publication are taken.

    Attributes:
        source: whose evaluation it is.
        half: half the longest side of a shape: distances are in units in which it has that size.
        points: drawn on the prediction, and on the target where it is a mesh.
        chamfer: how the two mean distances are put together.
        thresholds: of F-scores, in the units of ``half``.
        iou: the volume in which points for the IoU are drawn, half its side.
    """

    source: str
    half: float
    points: int
    chamfer: Literal["half sum", "sum"]
    thresholds: tuple[float, ...]
    iou: float


CONVENTIONS: dict[str, Convention] = {
    "3dshape2vecset": Convention(
        "3DShape2VecSet's evaluation: box [-1, 1]^3, Chamfer as the sum of both mean distances, F-score at 0.02",
        half=1.0,
        points=100_000,
        chamfer="sum",
        thresholds=(0.02,),
        iou=1.0,
    ),
    "occupancy-networks": Convention(
        "occupancy_networks' evaluator: box [-0.5, 0.5]^3, Chamfer as half the sum of both mean (squared) distances, "
        "IoU in the box padded by 0.1",
        half=0.5,
        points=100_000,
        chamfer="half sum",
        thresholds=(0.01,),
        iou=0.55,
    ),
}
"""F-scores are not part of occupancy_networks; the threshold there is 1 % of the box."""


@dataclass(frozen=True)
class SurfaceFigures:
    """Of a predicted cloud of points and a target. With a_i the distance from each predicted point to the nearest
    target point, c_j from each target point to the nearest predicted one:

    Attributes:
        accuracy, completeness: means of a, of c; accuracy2, completeness2: of their squares.
        normals_accuracy, normals_completeness: means of the absolute cosine between a point's normal and that of the
            nearest point of the other cloud; NaN without normals.
        precision, recall: shares of a, of c strictly below each threshold. (3DShape2VecSet's code exchanges the two
            names, which leaves the F-score as it is.)
    """

    accuracy: float
    completeness: float
    accuracy2: float
    completeness2: float
    normals_accuracy: float
    normals_completeness: float
    precision: tuple[float, ...]
    recall: tuple[float, ...]

    @property
    def chamfer_l1(self) -> float:
        """Half the sum of the mean distances, which are Euclidean: the name is that of occupancy_networks."""
        return (self.accuracy + self.completeness) / 2

    @property
    def chamfer_l2(self) -> float:
        """Half the sum of the mean squared distances."""
        return (self.accuracy2 + self.completeness2) / 2

    @property
    def chamfer_sum(self) -> float:
        """The sum of the mean distances, as 3DShape2VecSet has it."""
        return self.accuracy + self.completeness

    @property
    def normals(self) -> float:
        """Normal consistency."""
        return (self.normals_accuracy + self.normals_completeness) / 2

    @property
    def f_score(self) -> tuple[float, ...]:
        """Harmonic means of precision and recall; 0 where both are 0."""
        return tuple(2 * p * r / (p + r) if p + r else 0.0 for p, r in zip(self.precision, self.recall, strict=True))

    def by_name(self) -> dict[str, Any]:
        """All figures, derived ones too."""
        derived = ("chamfer_l1", "chamfer_l2", "chamfer_sum", "normals", "f_score")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def compare_clouds(
    points: np.ndarray,
    target: np.ndarray,
    thresholds: Sequence[float] = (),
    normals: np.ndarray | None = None,
    target_normals: np.ndarray | None = None,
) -> SurfaceFigures:
    """Compare clouds of points.

    Args:
        points: (n, 3) on the predicted surface. An empty cloud has the figures that occupancy_networks gives it:
            distances sqrt(3), squared ones 3, normals -1, shares 0.
        target: (m, 3) on the true one.
        thresholds: of precision and recall, in the points' units.
        normals, target_normals: (n, 3), (m, 3), of any length and either sign; both or neither.

    Raises:
        ValueError: shapes do not fit, or a coordinate is not finite.
    """
    from scipy.spatial import KDTree

    points, target = _checked("points", points), _checked("target points", target)
    if not len(target):
        raise ValueError("the target has no points to compare with")
    if (normals is None) != (target_normals is None):
        raise ValueError("normals are compared with normals: give those of both clouds, or of neither")
    if not len(points):
        none = tuple(0.0 for _ in thresholds)
        missing = math.nan if normals is None else -1.0
        return SurfaceFigures(math.sqrt(3), math.sqrt(3), 3.0, 3.0, missing, missing, none, none)
    a, to_target = KDTree(target).query(points)
    c, to_points = KDTree(points).query(target)
    cosines = [math.nan, math.nan]
    if normals is not None and target_normals is not None:
        mine, theirs = _unit("normals", normals, points), _unit("target normals", target_normals, target)
        cosines = [
            float(np.abs(np.einsum("ij,ij->i", mine, theirs[to_target])).mean()),
            float(np.abs(np.einsum("ij,ij->i", theirs, mine[to_points])).mean()),
        ]
    return SurfaceFigures(
        float(a.mean()),
        float(c.mean()),
        float(np.square(a).mean()),
        float(np.square(c).mean()),
        cosines[0],
        cosines[1],
        tuple(float((a < threshold).mean()) for threshold in thresholds),
        tuple(float((c < threshold).mean()) for threshold in thresholds),
    )


def volume_iou(occupied: np.ndarray, target: np.ndarray) -> np.ndarray:
    """float64 (...): intersection over union of labels (..., points) at common points; 0 where one side is empty.

    Both empty: 1, as they agree.
    """
    occupied, target = np.asarray(occupied, bool), np.asarray(target, bool)
    if occupied.shape != target.shape:
        raise ValueError(f"labels have shapes {occupied.shape} and {target.shape}; expected those of common points")
    union = (occupied | target).sum(-1)
    return np.where(union, (occupied & target).sum(-1) / np.maximum(union, 1), 1.0)


def _checked(name: str, points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"{name} have shape {points.shape}; expected (number, 3)")
    if not np.isfinite(points).all():
        raise ValueError(f"{int((~np.isfinite(points)).any(1).sum())} of {len(points)} {name} are not finite")
    return points


def _unit(name: str, normals: np.ndarray, points: np.ndarray) -> np.ndarray:
    normals = np.asarray(normals, np.float64)
    if normals.shape != points.shape:
        raise ValueError(f"{name} have shape {normals.shape}; expected {points.shape} as their points")
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
