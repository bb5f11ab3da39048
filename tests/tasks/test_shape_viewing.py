"""Pictures of shapes, turntables, pages that work alone; surfaces of fields, refined where they are."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from nextscale.tasks.shapes.objects import Shape
from nextscale.tasks.shapes.surfaces import grid_values, marching_cubes
from nextscale.tasks.shapes.viewing import camera, pictures, turntable, viewer


@pytest.fixture(scope="module")
def box() -> Shape:
    """Red above, blue below."""
    mesh = trimesh.creation.box((1.0, 1.0, 1.0)).subdivide()
    colours = np.where(mesh.vertices[:, 2:] > 0, [[1.0, 0, 0]], [[0, 0, 1.0]])
    return Shape(mesh.vertices, mesh.faces, colours, up="z")


def test_pictures_show_what_is_up_above(box: Shape) -> None:
    front, behind = pictures(box, [0, 180], elevation=0, size=32)
    assert (front[0] == 255).all() and (front[:, 0] == 255).all()  # the background, all around
    seen = np.argwhere((front != 255).any(-1))
    high, low = front[seen[:, 0].min() + 2, 16], front[seen[:, 0].max() - 2, 16]
    assert high[0] > high[2] and low[2] > low[0]
    assert behind.shape == front.shape
    assert np.array_equal(pictures(box.turned("y"), [0], elevation=0, size=32)[0], front)


def test_a_camera_looks_at_the_origin() -> None:
    pose = camera(40, 25, 3)
    np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(pose[:3, 3] + 3 * pose[:3, 2], 0, atol=1e-12)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1) and pose[2, 1] < 0  # y points down in the picture


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_turntable(tmp_path: Path, box: Shape, suffix: str) -> None:
    path = turntable(box, tmp_path / f"turn{suffix}", frames=3, size=16)
    with Image.open(path) as opened:
        assert opened.n_frames == 3 and opened.size == (16, 16)


def test_what_cannot_be_shown(tmp_path: Path, box: Shape) -> None:
    empty = Shape(np.zeros((0, 3)), np.zeros((0, 3)))
    with pytest.raises(ValueError, match="no faces to look at"):
        pictures(empty, [0])
    with pytest.raises(ValueError, match="is no animation"):
        turntable(box, tmp_path / "turn.jpg")
    with pytest.raises(ValueError, match="expected at least 1"):
        turntable(box, tmp_path / "turn.gif", frames=0)
    with pytest.raises(ValueError, match="Shape 2 has no faces"):
        viewer([box, empty], tmp_path / "page.html")
    with pytest.raises(ValueError, match="1 titles for 2 shapes"):
        viewer([box, box], tmp_path / "page.html", ["one"])
    with pytest.raises(ValueError, match=r"pages are written as \.html"):
        viewer(box, tmp_path / "page.pdf")
    assert not list(tmp_path.iterdir())


def test_a_page_needs_nothing_else(tmp_path: Path, box: Shape) -> None:
    path = viewer([box, box], tmp_path / "page.html", ["a </script> box", "another"])
    text = path.read_text()
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", text)
    [data] = re.findall(r'<script id="shapes"[^>]*>(.*?)</script>', text, flags=re.DOTALL)
    shapes = json.loads(data)
    assert [shape["title"] for shape in shapes] == ["a </script> box", "another"]
    places = np.frombuffer(base64.b64decode(shapes[0]["positions"]), "<i2").reshape(-1, 3)
    faces = np.frombuffer(base64.b64decode(shapes[0]["faces"]), "<u4").reshape(-1, 3)
    assert len(places) == shapes[0]["vertices"] and faces.max() == len(places) - 1
    assert np.linalg.norm(places / 32767, axis=1).max() == pytest.approx(1, abs=1e-3)


# --- surfaces ---------------------------------------------------------------------------------------


def blob(points: torch.Tensor) -> torch.Tensor:
    return 1 / (0.1 + (points - torch.tensor([0.1, 0.0, -0.1])).norm(dim=1))


@pytest.mark.parametrize(("points", "stride"), [(25, 4), (26, 4), (24, 5)])
def test_refined_grids_have_the_surface_of_whole_ones(points: int, stride: int) -> None:
    whole, every = grid_values(blob, points, 0.45, 3.0, stride=1)
    refined, some = grid_values(blob, points, 0.45, 3.0, stride=stride)
    assert every == points**3 and some < every
    assert torch.equal(whole > 3, refined > 3)
    for ours, theirs in zip(marching_cubes(refined, 0.45, 3.0), marching_cubes(whole, 0.45, 3.0), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_surface_encloses_what_is_above_the_level() -> None:
    values, _ = grid_values(blob, 33, 0.45, 3.0)
    vertices, faces = marching_cubes(values, 0.45, 3.0)
    mesh = trimesh.Trimesh(vertices, faces)
    assert mesh.is_watertight and mesh.volume == pytest.approx(4 / 3 * np.pi * (1 / 3 - 0.1) ** 3, rel=0.05)
    np.testing.assert_allclose(mesh.centroid, [0.1, 0, -0.1], atol=0.01)
    assert len(marching_cubes(values, 0.45, 1e9)[0]) == 0
