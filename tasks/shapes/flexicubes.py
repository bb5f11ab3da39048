"""FlexiCubes: the surface of a signed distance field on a deformable grid, differentiable in all it depends on.

Shen et al. 2023, "Flexible isosurface extraction for gradient-based mesh optimization" (SIGGRAPH), sections 4.1 to 4.3
and equation 8. Tensors over the grid are laid out with x slowest and z fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nextscale.tasks.shapes.flexicubes_tables import CORNERS, EDGES, tables

WEIGHTS = 21
"""Numbers of a cube: beta of its 12 edges, alpha of its 8 corners, gamma."""

RING = ((0, 0), (1, 0), (1, 1), (0, 1))
"""The four cubes around an edge, counter-clockwise as seen from its end; that of the least number first."""
REVERSED = (0, 3, 2, 1)


@dataclass(frozen=True, eq=False)
class FlexiMesh:
    """Attributes:

    faces: wound so that normals point to positive values.
    deviation: of every pair of a vertex and one of its crossed edges, how far their distance is from that vertex's mean
        (equation 8; its mean is the surface regulariser).
    """

    vertices: Float[Tensor, "vertices 3"]
    faces: Int[Tensor, "faces 3"]
    deviation: Float[Tensor, " pairs"]


@lru_cache(maxsize=4)
def grid_points(size: int, scale: float = 1.0, device: torch.device | str = "cpu") -> Float[Tensor, "points 3"]:
    """The corners of ``size`` cubes a side, in a centred box of side ``scale``; to five decimals before scaling."""
    with torch.inference_mode(False):
        ticks = torch.round(torch.arange(size + 1) / size * 1e5) / 1e5 - 0.5
        return (torch.cartesian_prod(ticks, ticks, ticks) * scale).to(device)


@lru_cache(maxsize=4)
def cube_corners(size: int, device: torch.device | str = "cpu") -> Int[Tensor, "cubes 8"]:
    """Numbers of the points at every cube's corners."""
    with torch.inference_mode(False):
        numbers = torch.arange((size + 1) ** 3).view(size + 1, size + 1, size + 1)
        corners = [numbers[x : x + size, y : y + size, z : z + size].flatten() for x, y, z in CORNERS]
        return torch.stack(corners, dim=1).to(device)


def extract(
    points: Float[Tensor, "points 3"],
    values: Float[Tensor, " points"],
    weights: Float[Tensor, "cubes 21"] | Callable[[Tensor], Tensor],
    size: int,
    *,
    weight_scale: float = 0.5,
    smooth: bool = False,
) -> FlexiMesh:
    """The surface where ``values`` change their sign; below zero is inside.

    Args:
        points: corners of the grid, deformed or not.
        weights: raw numbers of every cube, or what gives those of cubes with some numbers: beta = 1 + ``weight_scale``
            tanh, alpha likewise, gamma = ``weight_scale`` (sigmoid - 1/2) + 1/2.
        size: cubes a side.
        smooth: cut each quadrilateral into four triangles at a point between both diagonals, so that gamma has a
            gradient; else into two, along the diagonal whose cubes have the larger product of gammas.
    """
    device, table = points.device, tables()
    inside, corners = values < 0, cube_corners(size, device)
    powers = 2 ** torch.arange(8, device=device)
    patterns = _resolved((inside[corners] * powers).sum(1), size)
    cubes = ((patterns > 0) & (patterns < 255)).nonzero()[:, 0]
    if not len(cubes):
        return FlexiMesh(points.new_zeros(0, 3), corners.new_zeros(0, 3), points.new_zeros(0))
    corners, patterns = corners[cubes], patterns[cubes]
    weights = weights(cubes) if callable(weights) else weights[cubes]
    counts = torch.from_numpy(table.counts).to(device)[patterns]
    # Vertices are numbered by how many their cube has, then by cube.
    order = torch.sort(counts, stable=True).indices
    first = torch.empty_like(counts)
    first[order] = counts[order].cumsum(0) - counts[order]
    edges = torch.from_numpy(table.edges).to(device)[patterns]
    row, slot, place = (edges >= 0).nonzero(as_tuple=True)
    edge, owner = edges[row, slot, place], first[row] + slot

    ends = torch.tensor(EDGES, device=device)[edge]
    numbers = corners[row[:, None], ends]
    alpha = 1 + weight_scale * torch.tanh(weights[:, 12:20])[row[:, None], ends]
    beta = 1 + weight_scale * torch.tanh(weights[:, :12])[row, edge]
    gamma = weight_scale * (torch.sigmoid(weights[:, 20]) - 0.5) + 0.5
    crossings = _crossing(points[numbers], values[numbers] * alpha)
    total = int(counts.sum())
    share = beta.new_zeros(total).index_add(0, owner, beta)
    sums = crossings.new_zeros(total, 3).index_add(0, owner, crossings * beta[:, None])
    vertices = sums / share[:, None]

    plain = _crossing(points[numbers], values[numbers])
    distance = torch.linalg.vector_norm(plain - vertices[owner], dim=1)
    pairs = torch.bincount(owner, minlength=total)
    mean = distance.new_zeros(total).index_add(0, owner, distance) / pairs
    deviation = (distance - mean[owner]).abs()

    vertex_of = torch.full((len(cubes), 12), -1, device=device)
    vertex_of[row, edge] = owner
    row_of = torch.full((size**3,), -1, device=device)
    row_of[cubes] = torch.arange(len(cubes), device=device)
    quads, rows = _quads(inside, row_of, vertex_of, size)
    if smooth:
        vertices, faces = _cut_in_four(vertices, quads, gamma[rows])
    else:
        faces = _cut_in_two(quads, gamma[rows])
    return FlexiMesh(vertices, faces, deviation)


def _crossing(ends: Float[Tensor, "edges 2 3"], values: Float[Tensor, "edges 2"]) -> Float[Tensor, "edges 3"]:
    """Where linear interpolation along edges is zero."""
    (a, b), (start, stop) = values.unbind(1), ends.unbind(1)
    return (start * b[:, None] - stop * a[:, None]) / (b - a)[:, None]


def _resolved(patterns: Int[Tensor, " cubes"], size: int) -> Int[Tensor, " cubes"]:
    """Sign patterns; of two cubes that both join the four edges of the face between them, the opposite ones."""
    table = tables()
    ambiguous = torch.from_numpy(table.ambiguous).to(patterns.device)[patterns]
    found = ambiguous.nonzero()[:, 0]
    steps = torch.from_numpy(table.towards).to(patterns.device)[patterns[found]]
    places = torch.stack((found // size**2, found // size % size, found % size), dim=1) + steps
    within = ((places >= 0) & (places < size)).all(1)
    found, places = found[within], places[within]
    neighbours = (places[:, 0] * size + places[:, 1]) * size + places[:, 2]
    return patterns.index_put((found[ambiguous[neighbours]],), 255 - patterns[found[ambiguous[neighbours]]])


@torch.no_grad()
def _quads(
    inside: Bool[Tensor, " points"], row_of: Tensor, vertex_of: Tensor, size: int
) -> tuple[Int[Tensor, "quads 4"], Int[Tensor, "quads 4"]]:
    """For every crossed edge inside the grid, the vertices (and rows of cubes) around it, wound outwards."""
    signs, rows_of_all = inside.view(size + 1, size + 1, size + 1), row_of.view(size, size, size)
    quads, rows = [], []
    for axis in range(3):
        second, third = (axis + 1) % 3, (axis + 2) % 3
        turned = signs.permute(axis, second, third)[:, 1:-1, 1:-1]
        i, j, k = (turned[:-1] != turned[1:]).nonzero(as_tuple=True)
        around = rows_of_all.permute(axis, second, third)
        cubes = torch.stack([around[i, j + a, k + b] for a, b in RING], dim=1)
        # In a cube that lies on one side of the edge, the edge lies on the other.
        numbers = [_edge_number(axis, second, third, 1 - a, 1 - b) for a, b in RING]
        quad = vertex_of[cubes, torch.tensor(numbers, device=inside.device)]
        outwards = turned[:-1][i, j, k][:, None]
        quads.append(torch.where(outwards, quad, quad[:, REVERSED]))
        rows.append(torch.where(outwards, cubes, cubes[:, REVERSED]))
    return torch.cat(quads), torch.cat(rows)


def _edge_number(axis: int, second: int, third: int, a: int, b: int) -> int:
    place = [0, 0, 0]
    place[second], place[third] = a, b
    low = CORNERS.index((place[0], place[1], place[2]))
    return next(number for number, ends in enumerate(EDGES) if set(ends) == {low, low | 1 << axis})


def _diagonals(gamma: Float[Tensor, "quads 4"]) -> tuple[Tensor, Tensor]:
    """Products of gamma at the ends of each diagonal, first of that from the cube of the least number."""
    return gamma[:, 0] * gamma[:, 2], gamma[:, 1] * gamma[:, 3]


def _cut_in_two(quads: Int[Tensor, "quads 4"], gamma: Float[Tensor, "quads 4"]) -> Int[Tensor, "faces 3"]:
    even, odd = _diagonals(gamma)
    along_even = quads[:, [0, 1, 2, 0, 2, 3]]
    along_odd = quads[:, [0, 1, 3, 3, 1, 2]]
    return torch.where((even > odd)[:, None], along_even, along_odd).view(-1, 3)


def _cut_in_four(
    vertices: Float[Tensor, "vertices 3"], quads: Int[Tensor, "quads 4"], gamma: Float[Tensor, "quads 4"]
) -> tuple[Tensor, Tensor]:
    even, odd = (product[:, None] for product in _diagonals(gamma))
    corners = vertices[quads]
    middle_even, middle_odd = (corners[:, 0] + corners[:, 2]) / 2, (corners[:, 1] + corners[:, 3]) / 2
    centres = (middle_even * even + middle_odd * odd) / (even + odd + 1e-8)
    number = len(vertices) + torch.arange(len(quads), device=quads.device)
    faces = [torch.stack((quads[:, i], quads[:, (i + 1) % 4], number), dim=1) for i in range(4)]
    return torch.cat((vertices, centres)), torch.stack(faces, dim=1).view(-1, 3)
