"""Golden cases of 3D metrics: those of occupancy_networks and 3DShape2VecSet, by which G3PT is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nextscale.evaluation.shapes import compare_clouds, volume_iou
from nextscale.parity.case import Case
from nextscale.parity.replay import Operations

operations = Operations()


@operations
def metrics(case: Case) -> Mapping[str, Any]:
    """Distances between two clouds with normals, scores at thresholds, and overlap of labels."""
    given = case.inputs
    figures = compare_clouds(
        given["points"],
        given["target_points"],
        tuple(case.options["thresholds"]),
        given["normals"],
        given["target_normals"],
    )
    return {**figures.by_name(), "iou": volume_iou(given["occupancy"], given["target_occupancy"])}
