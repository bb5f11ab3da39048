"""iBims-1's own errors: how flat and how well turned planes are, and where depth boundaries lie.

Koch et al., "Evaluation of CNN-based Single-Image Depth Estimation Methods", ECCV Workshops 2018; in the form of
DepthART's evaluation, which sums over planes instead of images and cuts the completeness at the largest distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_PIXELS = 15360
"""Pixels of a plane that counts: 5 % of 640 x 480, whatever the image's size."""

MAX_DISTANCE = 10.0
"""Pixels beyond which an edge is not matched."""


@dataclass(frozen=True)
class Planarity:
    """Sums over the planes that count, to be added up over images.

    Attributes:
        flatness: standard deviation of the distances to the plane fitted to the prediction, cm.
        orientation: angle between its normal and the true one, degrees.
        planes: how many.
    """

    flatness: float
    orientation: float
    planes: int


@dataclass(frozen=True)
class Boundaries:
    """Pixels.

    Attributes:
        accuracy: mean distance to the nearest true edge, of predicted edges closer than the largest distance.
        completeness: mean distance of true edges to the nearest predicted one, none taken larger than the largest.
    """

    accuracy: float
    completeness: float


def planarity(
    truth: np.ndarray,
    prediction: np.ndarray,
    numbers: np.ndarray,
    normals: np.ndarray,
    camera: tuple[float, float, float, float],
    valid: np.ndarray | None = None,
    least_pixels: int = LEAST_PIXELS,
) -> Planarity:
    """Errors over the planes of one kind (tables, floors or walls) of one image.

    Args:
        truth, prediction: (height, width) metres, 0 where there is none. Each plane's prediction is scaled by the
            ratio of medians over the plane.
        numbers: (height, width) number of the plane a pixel lies on, from 1; 0 for none.
        normals: (planes, 3) true unit normals; x right, y forward, z up. Row 0 is plane 1's.
        camera: fx, fy, cx, cy in pixels, columns and rows counted from 1.
        valid: bool (height, width); what is not valid counts as 0 in all three maps.
    """
    keep = np.ones(truth.shape, bool) if valid is None else np.asarray(valid) > 0
    flatness = orientation = 0.0
    planes = 0
    for number, normal in enumerate(np.asarray(normals, np.float64).reshape(-1, 3), 1):
        plane = (numbers == number) & keep
        if np.count_nonzero(plane) < least_pixels:
            continue
        true, predicted = truth[plane].astype(np.float64), prediction[plane].astype(np.float64)
        rows, columns = np.nonzero(plane)
        there = predicted != 0
        if not there.any() or not (true != 0).any():
            continue
        depth = predicted[there] * (np.median(true[true != 0]) / np.median(predicted[there]))
        points = _points(depth, rows[there] + 1, columns[there] + 1, camera)
        own = _normal(points)
        flatness += 100 * float(np.std(points @ own))
        angle = np.arctan2(np.linalg.norm(np.cross(normal, own)), abs(float(normal @ own)))
        orientation += float(np.degrees(angle))
        planes += 1
    return Planarity(flatness, orientation, planes)


def _points(
    depth: np.ndarray, rows: np.ndarray, columns: np.ndarray, camera: tuple[float, float, float, float]
) -> np.ndarray:
    """(n, 3): x right, y forward, z up."""
    fx, fy, cx, cy = (float(value) for value in camera)
    return np.stack([(columns - cx) * depth / fx, depth, -(rows - cy) * depth / fy], axis=1)


def _normal(points: np.ndarray) -> np.ndarray:
    """Direction of least variance of (n, 3) points."""
    centred = points - points.mean(axis=0)
    # Eigenvectors come in the order of rising variance.
    _, directions = np.linalg.eigh(centred.T @ centred)
    normal: np.ndarray = directions[:, 0]
    return normal


def boundaries(prediction: np.ndarray, edges: np.ndarray, max_distance: float = MAX_DISTANCE) -> Boundaries | None:
    """How predicted depth boundaries match true ones.

    The prediction is stretched to [0, 1] and its edges found by Canny with sigma sqrt 2 and thresholds 0.1 and 0.2.

    Args:
        prediction: (height, width), finite.
        edges: bool (height, width) true boundaries.

    Returns:
        Both errors at the largest distance where no predicted edge is near a true one; None where there is no true
        edge, so that there is nothing to match.
    """
    from scipy.ndimage import distance_transform_edt
    from skimage.feature import canny

    edges = np.asarray(edges) > 0
    if not edges.any():
        return None
    prediction = np.asarray(prediction)
    if not np.isfinite(prediction).all():
        raise ValueError("the prediction holds NaN or infinity; boundaries are taken of whole, finite maps")
    low, high = prediction.min(), prediction.max()
    if low == high:
        return Boundaries(max_distance, max_distance)
    stretched = (prediction - low) / (high - low)
    found = canny(stretched, sigma=np.sqrt(2), low_threshold=0.1, high_threshold=0.2)
    to_true = distance_transform_edt(~edges)
    near = found & (to_true < max_distance)
    if not near.any():
        return Boundaries(max_distance, max_distance)
    to_found = np.minimum(distance_transform_edt(~found)[edges], max_distance)
    return Boundaries(float(to_true[near].mean()), float(to_found.mean()))
