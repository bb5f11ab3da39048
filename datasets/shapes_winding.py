"""Inside and outside of triangle surfaces, and distances to them.

Whether a point lies inside is decided by its winding number: how often the surface goes around it. A ray from the point
counts it as faces left minus faces entered, which unlike the parity of all crossings stays right where parts overlap
and where a surface cuts through itself. Of an open surface the count depends on the ray; its mean over all directions
is the generalised winding number (Jacobson et al. 2013). Rays and distances are open3d's.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

CHUNK = 1 << 17
"""Rays cast at once."""
_FIRST, _MORE = 3, 8
_LEBEDEV = {1: 1 / 21, 2: 4 / 105, 3: 9 / 280}
"""Weights of a direction along so many axes at once."""


class SurfaceField:
    """A triangle surface (vertices (n, 3), faces (m, 3), counter-clockwise from outside) to be asked about points.

    Results do not depend on how many points are asked for at once: directions of rays are drawn from ``seed`` and each
    point's place in the question.
    """

    def __init__(self, vertices: np.ndarray, faces: np.ndarray, seed: int = 0) -> None:
        import open3d as o3d

        self._scene = o3d.t.geometry.RaycastingScene()
        vertices = np.ascontiguousarray(vertices, np.float32)
        tensor = self._tensor = cast(Any, o3d.core.Tensor)
        self._scene.add_triangles(tensor(vertices), tensor(np.ascontiguousarray(faces, np.uint32)))
        a, b, c = vertices.astype(np.float64)[np.asarray(faces)].transpose(1, 0, 2)
        self._normals = np.cross(b - a, c - a)
        self._seed = seed

    def crossings(self, points: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """int64 (n,): faces left minus faces entered on the way from each point along its direction."""
        counts = np.zeros(len(points), np.int64)
        for first in range(0, len(points), CHUNK):
            part = points[first : first + CHUNK]
            ray, signs, _ = self._hits(part, directions[first : first + CHUNK])
            counts[first : first + CHUNK] = np.bincount(ray, signs, len(part)).round()
        return counts

    def winding(self, points: np.ndarray) -> np.ndarray:
        """int64 (n,): winding numbers about a closed surface.

        Three rays each, and eight more where these disagree, as one that meets an edge may; their median counts.
        """
        draw = np.random.default_rng(self._seed)
        counts = np.stack([self.crossings(points, _directions(draw, len(points))) for _ in range(_FIRST)])
        winding = np.median(counts, axis=0)
        unsure = np.flatnonzero(np.ptp(counts, axis=0))
        if len(unsure):
            more = [self.crossings(points[unsure], _directions(draw, len(unsure))) for _ in range(_MORE)]
            winding[unsure] = np.median(np.concatenate((counts[:, unsure], more)), axis=0)
        return winding.round().astype(np.int64)

    def mean_winding(self, points: np.ndarray, rays: int = 64) -> np.ndarray:
        """float64 (n,): generalised winding numbers, by the mean over evenly spread directions.

        Of an open surface they are off by about 0.5 / sqrt(``rays``) at most.
        """
        total = np.zeros(len(points))
        for direction in _spread(rays) @ _rotation(np.random.default_rng(self._seed)):
            total += self.crossings(points, np.broadcast_to(direction, points.shape))
        return total / rays

    def lattice_winding(self, ticks: np.ndarray) -> np.ndarray:
        """float64 (k, k, k): generalised winding numbers at all points with coordinates among evenly spaced ticks.

        The mean over the 26 directions between neighbours, with the weights of Lebedev's rule of degree 7. A ray counts
        for all points on its line, so that there are some 27 k^2 rays. The lattice has to enclose the surface.
        """
        count, cell = len(ticks), ticks[1] - ticks[0]
        places = np.indices((count,) * 3).reshape(3, -1).T
        total = np.zeros((count,) * 3)
        for step in [np.array(step) - 1 for step in np.ndindex(3, 3, 3)][
            14:
        ]:  # the others run the same lines backwards
            before = places - step
            starts = places[((before < 0) | (before >= count)).any(1)]
            ray, signs, steps = self._hits(ticks[starts], np.broadcast_to(step * cell, starts.shape))
            ahead = np.zeros((count,) * 3)
            last = (starts[ray] + np.floor(steps).astype(np.int64)[:, None] * step).clip(0, count - 1)
            np.add.at(ahead, tuple(last.T), signs)
            whole = _sum_along(ahead, step)
            # Backwards, what lies behind is met from the other side.
            total += _LEBEDEV[int(np.abs(step).sum())] * (2 * ahead - whole)
        return total

    def _hits(self, points: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every crossing of some rays: the ray's number, 1 where it leaves and -1 where it enters, its length."""
        rays = np.concatenate((points, directions), axis=1).astype(np.float32)
        found = self._scene.list_intersections(self._tensor(rays))
        ray = found["ray_ids"].numpy().astype(np.int64)
        signs = np.sign(np.einsum("ij,ij->i", rays[ray, 3:], self._normals[found["primitive_ids"].numpy()]))
        return ray, signs, found["t_hit"].numpy()

    def occupied(self, points: np.ndarray) -> np.ndarray:
        """bool (n,): which points lie inside a closed surface."""
        return self.winding(points) > 0

    def distance(self, points: np.ndarray) -> np.ndarray:
        """float32 (n,): distances to the nearest face, never negative."""
        parts = [
            self._scene.compute_distance(self._tensor(np.ascontiguousarray(part, np.float32))).numpy()
            for part in np.split(points, range(CHUNK, len(points), CHUNK))
        ]
        return np.concatenate(parts)

    def signed_distance(self, points: np.ndarray) -> np.ndarray:
        """float32 (n,): distances to a closed surface that does not overlap itself, negative inside."""
        distance = self.distance(points)
        return np.where(self.occupied(points), -distance, distance)


def winding_numbers(points: np.ndarray, vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """float64 (n,): generalised winding numbers as sums of solid angles (van Oosterom and Strackee 1983), exact.

    Slow: every point looks at every face.
    """
    corners = np.asarray(vertices, np.float64)[np.asarray(faces)]
    total = np.empty(len(points))
    step = max(1, (1 << 15) // max(len(faces), 1))
    for first in range(0, len(points), step):
        towards = corners[None] - np.asarray(points[first : first + step], np.float64)[:, None, None]
        a, b, c = np.moveaxis(towards, 2, 0)
        la, lb, lc = (np.linalg.norm(side, axis=-1) for side in (a, b, c))
        volume = np.einsum("nfi,nfi->nf", a, np.cross(b, c))
        dot = la * lb * lc
        for (p, q), length in (((a, b), lc), ((b, c), la), ((c, a), lb)):
            dot = dot + np.einsum("nfi,nfi->nf", p, q) * length
        total[first : first + step] = np.arctan2(volume, dot).sum(1) / (2 * np.pi)
    return total


def _sum_along(values: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Replace values on a lattice by their sums from each place to its line's end; returns the sums of whole lines."""
    axes = tuple(axis for axis in range(3) if step[axis] < 0)
    main = int(np.flatnonzero(step)[0])
    ahead = np.moveaxis(np.flip(values, axes), main, 0)
    others = np.delete(step, main) != 0
    near = tuple(slice(None, -1) if moves else slice(None) for moves in others)
    far = tuple(slice(1, None) if moves else slice(None) for moves in others)
    for place in range(len(ahead) - 2, -1, -1):
        ahead[place][near] += ahead[place + 1][far]
    whole = ahead.copy()
    for place in range(1, len(ahead)):
        whole[place][far] = whole[place - 1][near]
    return np.flip(np.moveaxis(whole, 0, main), axes)


def _directions(draw: np.random.Generator, count: int) -> np.ndarray:
    return draw.normal(size=(count, 3)).astype(np.float32)


def _spread(count: int) -> np.ndarray:
    """Directions on a Fibonacci spiral (count, 3)."""
    place = np.arange(count) + 0.5
    z = 1 - 2 * place / count
    angle = np.pi * (1 + 5**0.5) * place
    radius = np.sqrt(1 - z**2)
    return np.stack((radius * np.cos(angle), radius * np.sin(angle), z), axis=1)


def _rotation(draw: np.random.Generator) -> np.ndarray:
    q, _ = np.linalg.qr(draw.normal(size=(3, 3)))
    return q
