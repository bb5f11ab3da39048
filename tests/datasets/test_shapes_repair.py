"""Repairing meshes: occupancy against winding numbers computed another way, each kind of trouble, refusals."""

from pathlib import Path

import numpy as np
import pytest
import trimesh

from nextscale.datasets.shapes_files import Mesh, MeshError, read_mesh
from nextscale.datasets.shapes_repair import repair
from nextscale.datasets.shapes_topology import closed
from nextscale.datasets.shapes_winding import SurfaceField, winding_numbers

BALL = trimesh.creation.icosphere(1, 1.0)


def mesh_of(*parts: trimesh.Trimesh) -> Mesh:
    whole = trimesh.util.concatenate(list(parts))
    return Mesh(np.asarray(whole.vertices, float), np.asarray(whole.faces, np.int64))


def ball(radius: float = 1.0, at: tuple[float, float, float] = (0, 0, 0), inverted: bool = False) -> trimesh.Trimesh:
    made = BALL.copy()
    made.apply_scale(radius)
    made.apply_translation(at)
    if inverted:
        made.invert()
    return made


def without(faces: int) -> trimesh.Trimesh:
    return trimesh.Trimesh(BALL.vertices, BALL.faces[faces:], process=False)


POINTS = np.random.default_rng(0).uniform(-1.1, 1.1, (300, 3))


def truth(mesh: Mesh) -> np.ndarray:
    """Inside by the exact winding number of the mesh as it came, put where it is put by repair."""
    placed = mesh.normalised(1.0)
    return winding_numbers(POINTS, placed.vertices, placed.faces) > 0.5


CASES = {
    "one": (ball(),),
    "apart": (ball(0.5, (-1, 0, 0)), ball(0.4, (1, 0.2, 0))),
    "overlapping": (ball(), ball(0.8, (0.9, 0.1, 0)), ball(0.5, (0.4, 0.6, 0.3))),
    "hollow": (ball(), ball(0.6, inverted=True)),
    "body in a cavity": (ball(), ball(0.8, inverted=True), ball(0.5)),
    "crossing itself": (trimesh.creation.torus(0.7, 0.5, 16, 12), trimesh.creation.box((2.4, 0.3, 0.3))),
}


@pytest.mark.parametrize("name", CASES)
def test_occupancy_is_that_of_winding_numbers(name: str) -> None:
    mesh = mesh_of(*CASES[name])
    repaired = repair(mesh, resolution=48)
    assert repaired.watertight and closed(repaired.mesh.faces)
    occupied = SurfaceField(repaired.mesh.vertices, repaired.mesh.faces).occupied(POINTS)
    wrong = occupied != truth(mesh)
    if any("grid" in step for step in repaired.steps):
        placed = mesh.normalised(1.0)  # right but for a cell
        wrong &= SurfaceField(placed.vertices, placed.faces).distance(POINTS) > 2 / 48
    assert not wrong.any() and 0.01 < occupied.mean() < 0.9
    if name == "overlapping":
        assert "united" in " ".join(repaired.steps)


def test_parity_of_crossings_would_be_wrong_where_bodies_overlap() -> None:
    mesh = mesh_of(*CASES["overlapping"]).normalised(1.0)
    winding = SurfaceField(mesh.vertices, mesh.faces).winding(POINTS)
    exact = winding_numbers(POINTS, mesh.vertices, mesh.faces)
    np.testing.assert_array_equal(winding, exact.round())
    np.testing.assert_allclose(exact, exact.round(), atol=1e-9)
    assert (winding == 2).any()


@pytest.mark.parametrize(
    ("parts", "step"),
    [
        ((ball(inverted=True),), "turned inside out"),
        ((ball(), ball(0.5, (2, 0, 0), inverted=True)), "turned 1 of 2 pieces inside out"),
        ((without(1),), "filled holes"),
        ((ball(), trimesh.Trimesh(BALL.vertices, BALL.faces[:3], process=False)), "copies of faces"),
        ((ball(), trimesh.Trimesh([[0, 0, 0], [1e-9, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False)), "degenerate"),
    ],
)
def test_trouble_is_put_right_and_said(parts: tuple[trimesh.Trimesh, ...], step: str) -> None:
    repaired = repair(mesh_of(*parts))
    assert step in " ".join(repaired.steps), repaired.steps
    assert closed(repaired.mesh.faces) and repaired.mesh.volume > 0


def test_faces_wound_at_random_are_turned() -> None:
    mesh = mesh_of(ball())
    faces = mesh.faces.copy()
    chosen = np.random.default_rng(0).random(len(faces)) < 0.4
    faces[chosen] = faces[chosen][:, ::-1]
    repaired = repair(Mesh(mesh.vertices, faces))
    assert not repaired.watertight and closed(repaired.mesh.faces)
    assert repaired.mesh.volume == pytest.approx(repair(mesh).mesh.volume)


def test_an_open_surface_is_rebuilt_thickened_or_refused() -> None:
    open_ball = mesh_of(without(9))
    rebuilt = repair(open_ball, resolution=32)
    assert closed(rebuilt.mesh.faces) and "open edges" in rebuilt.steps[-1]
    whole = mesh_of(ball()).volume * (1 / open_ball.vertices.max()) ** 3
    assert rebuilt.mesh.volume == pytest.approx(whole, rel=0.12)
    assert repair(open_ball, "thicken", 32).mesh.volume < rebuilt.mesh.volume
    with pytest.raises(MeshError, match=r"open: .* edges"):
        repair(open_ball, "refuse")
    sheet = trimesh.creation.box((1, 1, 1))
    sheet = mesh_of(trimesh.Trimesh(sheet.vertices, sheet.faces[:2], process=False))
    with pytest.raises(MeshError, match="bounds no volume"):
        repair(sheet, resolution=32)
    assert repair(sheet, "thicken", 32).mesh.volume > 0


def test_sheets_of_two_sides_are_thickened_or_refused() -> None:
    """Closed by its edges, and around nothing: as chairs of back-to-back faces are."""
    sheet = trimesh.creation.box((1, 1, 1))
    once = np.asarray(sheet.faces[:2])
    mesh = Mesh(np.asarray(sheet.vertices, float), np.concatenate((once, once[:, ::-1])).astype(np.int64))
    assert closed(mesh.faces)
    with pytest.raises(MeshError, match="no volume"):
        repair(mesh, resolution=32)
    repaired = repair(mesh, "thicken", 32)
    assert closed(repaired.mesh.faces) and 0.1 < repaired.mesh.volume < 0.8


def test_a_lattice_sees_the_generalised_winding_number() -> None:
    mesh = mesh_of(without(30))
    ticks = (np.arange(9) + 0.137) / 9 * 2.6 - 1.3
    grid = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), -1).reshape(-1, 3)
    exact = winding_numbers(grid, mesh.vertices, mesh.faces)
    field = SurfaceField(mesh.vertices, mesh.faces)
    assert np.abs(field.lattice_winding(ticks).reshape(-1) - exact).max() < 0.15
    assert np.abs(field.mean_winding(grid) - exact).max() < 0.08


def test_points_become_a_surface() -> None:
    draw = np.random.default_rng(0)
    points = draw.normal(size=(1500, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    none = np.zeros((0, 3), np.int64)
    for normals in (points, None):
        repaired = repair(Mesh(points, none, normals=normals), resolution=32)
        assert repaired.mesh.volume == pytest.approx(4 / 3 * np.pi, rel=0.08) and "1500 points" in repaired.steps[0]
    with pytest.raises(MeshError, match="20 points"):
        repair(Mesh(points[:20], none))


# --- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["obj", "ply", "off", "stl", "glb"])
def test_every_format_is_read_at_a_path_with_spaces_and_unicode(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "möbel und 椅子" / f"ein Ball.{suffix}"
    path.parent.mkdir()
    BALL.export(path)
    mesh = read_mesh(path, "z")
    assert len(mesh.faces) == len(BALL.faces)
    assert repair(mesh).mesh.volume == pytest.approx(repair(mesh_of(BALL)).mesh.volume, rel=1e-5)


@pytest.mark.parametrize("suffix", ["ply", "off", "stl", "glb"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    BALL.export(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(MeshError):
        repair(read_mesh(path), "refuse")


def test_empty_and_broken_files_are_refused(tmp_path: Path) -> None:
    contents = {
        "empty.obj": ("", "the file is empty"),
        "no.obj": ("# nothing\n", "."),
        "nan.obj": ("v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "NaN"),
        "range.off": ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "."),
        "flat.obj": ("v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n", "coincide"),
        "picture.png": ("x", "no kind of mesh"),
    }
    for name, (text, reason) in contents.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(MeshError, match=reason):
            repair(read_mesh(tmp_path / name))


def test_parts_of_a_scene_are_put_in_their_places(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    part = trimesh.creation.box((1, 1, 1))
    part.visual.face_colors = [255, 0, 0, 255]
    for x in (0.0, 3.0):
        scene.add_geometry(part, transform=trimesh.transformations.translation_matrix((x, 0, 0)))
    scene.export(tmp_path / "two.glb")
    mesh = read_mesh(tmp_path / "two.glb")
    assert np.ptp(mesh.vertices, axis=0) == pytest.approx([4, 1, 1]) and mesh.colours is not None
    assert (mesh.colours == [255, 0, 0]).all() and mesh.volume == pytest.approx(2)


def test_materials_are_not_looked_for_outside_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.mtl").write_text("newmtl red\nKd 1 0 0\n")
    folder = tmp_path / "meshes"
    folder.mkdir()
    text = "mtllib ../secret.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nusemtl red\nf 1 3 2\nf 1 2 4\nf 2 3 4\nf 1 4 3\n"
    (folder / "a.obj").write_text(text)
    try:
        colours = read_mesh(folder / "a.obj").colours
    except MeshError:
        return
    assert colours is None or not (colours == [255, 0, 0]).all()
