"""Dual marching cubes: which crossed edges of a cube belong to one vertex, for each of the 256 sign patterns.

Nielson 2004, "Dual marching cubes"; the numbering of corners and edges, the separation of inside corners on ambiguous
faces and the choice between two such cubes that share a face are those of Shen et al. 2023, "Flexible isosurface
extraction for gradient-based mesh optimization" (FlexiCubes), supplement 1.3. The tables are computed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

CORNERS = tuple((n & 1, n >> 1 & 1, n >> 2 & 1) for n in range(8))
"""(x, y, z) of each corner of a cube."""

EDGES = ((0, 1), (1, 5), (4, 5), (0, 4), (2, 3), (3, 7), (6, 7), (2, 6), (2, 0), (3, 1), (7, 5), (6, 4))
"""The corners that each edge joins."""

MAX_VERTICES, MAX_EDGES = 4, 7
"""Vertices of a cube, and edges of a vertex, at most."""


@dataclass(frozen=True)
class Tables:
    """Attributes:

    counts: vertices of each pattern. Bit n of a pattern's number says that corner n is inside.
    edges: of every vertex of each pattern, filled up with -1.
    ambiguous: whether all four edges of an ambiguous face belong to one vertex: where the cube behind that face has
        such a vertex too, both cubes take the pattern of the opposite signs, or the surface would not be a manifold.
    towards: the direction of that face, (x, y, z).
    """

    counts: np.ndarray
    edges: np.ndarray
    ambiguous: np.ndarray
    towards: np.ndarray


def _faces() -> list[tuple[tuple[int, int, int], list[int]]]:
    """Direction and corners, in a ring, of each face."""
    ring = ((0, 0), (1, 0), (1, 1), (0, 1))
    faces = []
    for axis in range(3):
        for side in (0, 1):
            corners = [_corner(axis, side, place) for place in ring]
            direction = [0, 0, 0]
            direction[axis] = 2 * side - 1
            faces.append(((direction[0], direction[1], direction[2]), corners))
    return faces


def _corner(axis: int, side: int, place: tuple[int, int]) -> int:
    position = [*place]
    position.insert(axis, side)
    return CORNERS.index((position[0], position[1], position[2]))


def _edge(a: int, b: int) -> int:
    return next(number for number, ends in enumerate(EDGES) if {a, b} == set(ends))


def _patches(inside: list[bool]) -> tuple[list[list[int]], list[tuple[int, int, int]]]:
    """The edges of every vertex, and the directions of the faces all of whose four edges are one vertex's."""
    links: dict[int, list[int]] = {}
    open_faces: list[tuple[tuple[int, int, int], list[int]]] = []
    for direction, ring in _faces():
        sides = [_edge(a, b) for a, b in pairwise([*ring, ring[0]])]
        crossed = [side for side in range(4) if inside[ring[side]] != inside[ring[(side + 1) % 4]]]
        if len(crossed) == 2:
            pairs = [(crossed[0], crossed[1])]
        elif len(crossed) == 4:  # the two edges at each inside corner: inside corners are separated
            pairs = [((place - 1) % 4, place) for place in range(4) if inside[ring[place]]]
            open_faces.append((direction, sides))
        else:
            continue
        for a, b in pairs:
            links.setdefault(sides[a], []).append(sides[b])
            links.setdefault(sides[b], []).append(sides[a])
    patches: list[list[int]] = []
    for start in sorted(links):
        if any(start in patch for patch in patches):
            continue
        patch, waiting = {start}, [start]
        while waiting:
            for other in links[waiting.pop()]:
                if other not in patch:
                    patch.add(other)
                    waiting.append(other)
        patches.append(sorted(patch))
    # The published order, by which vertices are numbered: by the least corner of the sign that has fewer of them.
    fewer = sum(inside) <= 4
    patches.sort(key=lambda patch: min(corner for edge in patch for corner in EDGES[edge] if inside[corner] == fewer))
    joined = [direction for direction, sides in open_faces if any(set(sides) <= set(patch) for patch in patches)]
    return patches, joined


@cache
def tables() -> Tables:
    """The tables of all 256 patterns."""
    counts, ambiguous = np.zeros(256, np.int64), np.zeros(256, bool)
    edges, towards = np.full((256, MAX_VERTICES, MAX_EDGES), -1), np.zeros((256, 3), np.int64)
    for pattern in range(256):
        patches, joined = _patches([bool(pattern >> corner & 1) for corner in range(8)])
        counts[pattern] = len(patches)
        for number, patch in enumerate(patches):
            edges[pattern, number, : len(patch)] = patch
        if len(joined) == 1:
            ambiguous[pattern], towards[pattern] = True, joined[0]
    return Tables(counts, edges, ambiguous, towards)
