"""iBims-1's planes and boundaries of a sample, from the files that come with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nextscale.datasets.depth_pairs import DepthSource, PairFiles
from nextscale.evaluation.depth_ibims import boundaries, planarity
from nextscale.evaluation.depth_maps import resize_map
from nextscale.evaluation.depth_protocols import Comparison


@dataclass(frozen=True)
class PlanesAndEdges:
    """Of one image.

    Attributes:
        flatness, orientation: sums over its planes, cm and degrees.
        planes: how many count.
        accuracy, completeness: of boundaries, pixels; None where no true boundaries are known.
    """

    flatness: float
    orientation: float
    planes: int
    accuracy: float | None
    completeness: float | None

    @staticmethod
    def summary(images: Sequence[PlanesAndEdges]) -> dict[str, float | int | None]:
        """Means over planes (flatness, orientation) and over images (boundaries)."""
        planes = sum(image.planes for image in images)
        accuracy = [image.accuracy for image in images if image.accuracy is not None]
        completeness = [image.completeness for image in images if image.completeness is not None]
        return {
            "pe_flatness_cm": math.fsum(image.flatness for image in images) / planes if planes else None,
            "pe_orientation_degrees": math.fsum(image.orientation for image in images) / planes if planes else None,
            "planes": planes,
            "dbe_accuracy_pixels": math.fsum(accuracy) / len(accuracy) if accuracy else None,
            "dbe_completeness_pixels": math.fsum(completeness) / len(completeness) if completeness else None,
        }


def planes_and_edges(source: DepthSource, index: int, compared: Comparison) -> PlanesAndEdges | None:
    """Errors of a sample that has planes or boundaries and a camera; None for others."""
    pair = source.pairs[index] if isinstance(source, PairFiles) else None
    extra = dict(pair.extra) if pair is not None else {}
    if (
        pair is None
        or pair.camera is None
        or not ({"edges", "table-planes", "floor-planes", "wall-planes"} & set(extra))
    ):
        return None
    size = compared.truth.shape
    flatness = orientation = 0.0
    planes = 0
    for kind in ("table", "floor", "wall"):
        if f"{kind}-planes" not in extra or f"{kind}-mask" not in extra:
            continue
        rows = np.atleast_2d(np.loadtxt(extra[f"{kind}-planes"], delimiter=",", ndmin=2))
        found = planarity(
            compared.truth,
            compared.prediction,
            _map(extra[f"{kind}-mask"], size),
            rows[:, 4:7],
            pair.camera,
            compared.mask,
        )
        flatness, orientation, planes = (
            flatness + found.flatness,
            orientation + found.orientation,
            planes + found.planes,
        )
    edges = boundaries(compared.prediction, _map(extra["edges"], size) > 0) if "edges" in extra else None
    return PlanesAndEdges(
        flatness,
        orientation,
        planes,
        None if edges is None else edges.accuracy,
        None if edges is None else edges.completeness,
    )


def _map(path: object, size: tuple[int, ...]) -> np.ndarray:
    from PIL import Image

    with Image.open(str(path), formats=("PNG",)) as image:
        values = np.asarray(image)
    return resize_map(values, (size[0], size[1]), "nearest")
