"""FlexiCubes: tables made by rule, closed surfaces of the right side, and gradients."""

import numpy as np
import pytest
import torch
import trimesh

from nextscale.tasks.shapes.flexicubes import cube_corners, extract, grid_points
from nextscale.tasks.shapes.flexicubes_tables import EDGES, tables
from nextscale.tasks.shapes.sar3d_fields import one_sign, repair


def ball(size: int, radius: float = 0.35) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    points = grid_points(size)
    return points, points.norm(dim=1) - radius, torch.zeros(size**3, 21)


def mesh_of(found) -> trimesh.Trimesh:
    return trimesh.Trimesh(found.vertices.numpy(), found.faces.numpy(), process=False)


def test_every_crossed_edge_of_every_pattern_belongs_to_one_vertex() -> None:
    table = tables()
    for pattern in range(256):
        inside = [bool(pattern >> corner & 1) for corner in range(8)]
        crossed = [number for number, (a, b) in enumerate(EDGES) if inside[a] != inside[b]]
        assert sorted(edge for edge in table.edges[pattern].flatten().tolist() if edge >= 0) == crossed
        assert (table.edges[pattern] >= 0).any(1).sum() == table.counts[pattern]
    assert table.counts.max() == 4 and (table.counts > 0).sum() == 254
    # Two opposite outside corners of a face, alone or with a third: C16 and C19, however they are turned.
    assert {bin(pattern).count("1") for pattern in np.flatnonzero(table.ambiguous)} == {5, 6}


def test_a_ball_is_closed_and_its_faces_look_outwards() -> None:
    mesh = mesh_of(extract(*ball(12), 12))
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.euler_number == 2
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 0.35**3, rel=0.08)
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=1), 0.35, atol=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_any_field_gives_a_manifold(seed: int) -> None:
    torch.manual_seed(seed)
    size = 7
    values = torch.randn((size + 1,) * 3)
    for axis in range(3):  # nothing inside touches the border
        for end in (0, size):
            values.select(axis, end).fill_(1)
    found = extract(grid_points(size), values.flatten(), torch.randn(size**3, 21), size)
    mesh = mesh_of(found)
    edges, counts = np.unique(mesh.edges_sorted, axis=0, return_counts=True)
    assert (counts == 2).all() and mesh.is_winding_consistent and len(edges)


def test_weights_of_the_cubes_at_the_surface_suffice() -> None:
    points, values, _ = ball(6)
    weights = torch.randn(6**3, 21)
    asked: list[int] = []

    def some(cubes: torch.Tensor) -> torch.Tensor:
        asked.append(len(cubes))
        return weights[cubes]

    whole, part = extract(points, values, weights, 6), extract(points, values, some, 6)
    assert torch.equal(whole.vertices, part.vertices) and torch.equal(whole.faces, part.faces)
    assert asked[0] < 6**3


def test_gradients_reach_all_that_the_surface_depends_on() -> None:
    points, values, weights = (part.clone().requires_grad_() for part in ball(5))
    found = extract(points, values, weights, 5, smooth=True)
    (found.vertices[found.faces].std() + found.deviation.mean()).backward()
    assert points.grad is not None and values.grad is not None and weights.grad is not None
    assert points.grad.abs().sum() > 0 and values.grad.abs().sum() > 0
    assert (weights.grad.abs().sum(0) > 0).all()  # beta, alpha and gamma


def test_four_triangles_lie_where_two_do() -> None:
    two, four = (extract(*ball(8), 8, smooth=smooth) for smooth in (False, True))
    assert len(four.faces) == 2 * len(two.faces)
    assert mesh_of(four).volume == pytest.approx(mesh_of(two).volume, rel=0.02)


def test_nothing_to_find_and_fields_of_one_sign() -> None:
    points, values, weights = ball(6, radius=-1)
    assert len(extract(points, values, weights, 6).faces) == 0
    assert one_sign(values, 6) and not one_sign(ball(6)[1], 6)
    repaired = repair(values, 6)
    assert not one_sign(repaired, 6)
    grid = repaired.view(7, 7, 7)
    assert grid[4, 4, 4] == 1 - values.min() and (grid[:2] == -1 - values.max()).all()
    assert mesh_of(extract(points, repaired, weights, 6)).is_watertight


def test_the_grid_is_rounded_before_it_is_scaled() -> None:
    points = grid_points(3, 2.0)
    assert points.shape == (64, 3) and points[1].tolist() == pytest.approx([-1, -1, (0.33333 - 0.5) * 2], abs=1e-7)
    assert cube_corners(3)[0].tolist() == [0, 16, 4, 20, 1, 17, 5, 21]
