"""Closed meshes as samples: points of the surface, points in space with what is inside, pictures."""

from __future__ import annotations

import numpy as np

from .shapes import ShapeSamples, packed_row, quantised, restored
from .shapes_files import Mesh, MeshError
from .shapes_views import object_cameras, render
from .shapes_winding import SurfaceField

_STEP = 2e-3
"""How far from a sample its two sides are looked at, in the units of the cube."""


def surface_points(mesh: Mesh, count: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points drawn uniformly by area: float64 (count, 3), unit normals of their faces (count, 3), face numbers.

    Raises:
        MeshError: the mesh has no area.
    """
    areas = mesh.areas
    total = np.cumsum(areas)
    if not len(total) or not total[-1] > 0:
        raise MeshError("it has no area")
    faces = np.searchsorted(total, draw.uniform(0, total[-1], count), "right").clip(0, len(total) - 1)
    a, b, c = mesh.vertices[mesh.faces[faces]].transpose(1, 0, 2)
    # Uniform in a triangle: the square root evens out that lines towards a corner grow shorter.
    u, v = draw.random((2, count))
    u = np.sqrt(u)[:, None]
    points = (1 - u) * a + u * (1 - v[:, None]) * b + u * v[:, None] * c
    normals = np.cross(b - a, c - a)
    return points, normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30), faces


def sample(
    mesh: Mesh, samples: ShapeSamples, label: int, draw: np.random.Generator
) -> tuple[dict[str, np.ndarray], float]:
    """A row of the prepared objects, and the share of its points in space that two sides of the surface contradict.

    Occupancy and distances are computed where the stored points lie. As a check, points a little below the surface and
    a little above it are asked for too.

    Args:
        mesh: closed, wound outwards, without overlaps, in [-1, 1]^3.

    Raises:
        MeshError: the mesh has no area.
    """
    field = SurfaceField(mesh.vertices, mesh.faces)
    points, normals, _ = surface_points(mesh, samples.surface, draw)
    uniform = draw.uniform(-1, 1, (samples.uniform, 3))
    near, _, _ = surface_points(mesh, samples.near, draw)
    deviation = np.where(np.arange(samples.near) % 2, *samples.noise[::-1])[:, None]
    near = near + deviation * draw.standard_normal(near.shape)
    queries = quantised(np.concatenate((uniform, near)))
    where = restored(queries)
    occupied = field.occupied(where)
    distance = None
    if samples.distances:
        distance = field.distance(where)
        distance = np.where(occupied, -distance, distance)
    image = None
    if samples.views:
        image = render(mesh, object_cameras(draw, samples.views), samples.size).colours
    some = slice(0, 256)
    below, above = (field.occupied(points[some] - side * _STEP * normals[some]) for side in (1, -1))
    return packed_row(label, points, normals, queries, occupied, distance, image), float(1 - (below & ~above).mean())
