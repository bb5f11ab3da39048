"""Meshes made to enclose a volume: what is wrong with one is put right and said, or it is refused with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from .shapes_files import Mesh, MeshError
from .shapes_rebuild import from_points, rebuilt, thickened
from .shapes_topology import closed, open_edges, pieces
from .shapes_winding import SurfaceField

Opening = Literal["rebuild", "thicken", "refuse"]
"""What to do with a surface whose holes cannot be filled: take what it mostly encloses, or give it a thickness."""
_PROBES, _STEP, _BAD = 1000, 1e-4, 0.01


@dataclass(frozen=True, eq=False)
class Repaired:
    """Attributes:

    mesh: closed, wound outwards, without parts that overlap; its longest side is 2.
    steps: what was done, each a phrase.
    watertight: whether the file's own surface, its vertices merged, was closed.
    components: pieces of the file's surface.
    """

    mesh: Mesh
    steps: list[str] = field(default_factory=list)
    watertight: bool = True
    components: int = 1

    def record(self) -> dict[str, Any]:
        """For a report."""
        return {
            "watertight": self.watertight,
            "components": self.components,
            "steps": self.steps,
            "faces": len(self.mesh.faces),
        }


def repair(mesh: Mesh, opening: Opening = "rebuild", resolution: int = 128) -> Repaired:
    """A mesh that encloses a volume, from any mesh or cloud of points.

    Vertices at one place (to 1e-6 of the longest side) are merged, faces without area and copies removed, small holes
    filled, faces wound outwards (a surface inside of another that is wound the other way stays a cavity), and bodies
    that overlap united. What is open, or cuts through itself, after that is rebuilt on a grid as ``opening`` says.

    Args:
        resolution: cells along the longest side of a rebuilt surface.

    Raises:
        MeshError: it encloses no volume, or is open and ``opening`` is "refuse".
    """
    steps: list[str] = []
    mesh = mesh.normalised(1.0)
    if not len(mesh.faces):
        made = from_points(mesh, resolution)
        steps.append(f"reconstructed from {len(mesh.vertices)} points")
        return Repaired(_checked(made, steps, opening, resolution), steps, watertight=False)
    mesh = _cleaned(mesh, steps)
    watertight = closed(mesh.faces)
    components = len(pieces(mesh))
    if not watertight:
        mesh = _sewn(mesh, steps)
    if not closed(mesh.faces):
        if opening == "refuse":
            raise MeshError(f"it is open: {open_edges(mesh.faces)} of its edges have no other side")
        edges = open_edges(mesh.faces)
        make = rebuilt if opening == "rebuild" else thickened
        mesh = make(mesh, resolution)
        steps.append(f"{opening}: {edges} open edges, closed on a grid of {resolution} cells")
    else:
        mesh = _outwards(mesh, steps)
    return Repaired(_checked(mesh, steps, opening, resolution), steps, watertight, components)


def _cleaned(mesh: Mesh, steps: list[str]) -> Mesh:
    """Vertices at one place merged, faces of fewer than three of them removed."""
    places = np.round(mesh.vertices / 2e-6).astype(np.int64)
    _, first, number = np.unique(places, axis=0, return_index=True, return_inverse=True)
    if len(first) < len(mesh.vertices):
        steps.append(f"merged {len(mesh.vertices) - len(first)} vertices")
        mesh = replace(mesh, vertices=mesh.vertices[first], faces=number.reshape(-1)[mesh.faces])
    a, b, c = mesh.faces.T
    whole = (a != b) & (b != c) & (c != a)
    if not whole.all():
        steps.append(f"removed {int((~whole).sum())} degenerate faces")
        mesh = mesh.select(whole)
    if not len(mesh.faces):
        raise MeshError("none of its faces has an area")
    return mesh


def _sewn(mesh: Mesh, steps: list[str]) -> Mesh:
    """Copies of faces removed, neighbours wound alike, small holes filled."""
    import trimesh

    _, first = np.unique(np.sort(mesh.faces, axis=1), axis=0, return_index=True)
    if len(first) < len(mesh.faces):
        steps.append(f"removed {len(mesh.faces) - len(first)} copies of faces")
        mesh = mesh.select(np.sort(first))
    wound = mesh.to_trimesh()
    before = wound.faces.copy()
    trimesh.repair.fix_winding(wound)
    if turned := int((wound.faces != before).any(1).sum()):
        if open_edges(np.asarray(wound.faces)) < open_edges(mesh.faces):
            steps.append(f"turned {turned} faces")
            mesh = replace(mesh, faces=np.asarray(wound.faces, np.int64))
        else:
            wound = mesh.to_trimesh()
    if not closed(mesh.faces):
        trimesh.repair.fill_holes(wound)
        added = len(wound.faces) - len(mesh.faces)
        if added > 0 and open_edges(np.asarray(wound.faces)) < open_edges(mesh.faces):
            steps.append(f"filled holes with {added} faces")
            colours = mesh.colours
            if colours is not None:
                colours = np.concatenate((colours, np.repeat(colours[-1:], added, axis=0)))
            mesh = Mesh(np.asarray(wound.vertices), np.asarray(wound.faces, np.int64), colours)
    return mesh


def _outwards(mesh: Mesh, steps: list[str]) -> Mesh:
    """A closed surface with its bodies wound outwards and its cavities inwards."""
    faces = mesh.faces.copy()
    if mesh.volume < 0:
        faces = faces[:, ::-1].copy()
        steps.append("turned inside out")
    parts = pieces(mesh)
    turned = replace(mesh, faces=faces)
    inverted = [part for part in parts if turned.select(part).volume < 0] if len(parts) > 1 else []
    wrong = 0
    for part in inverted:
        others = turned.select(np.setdiff1d(np.arange(len(faces)), part))
        point = turned.vertices[faces[part[0]]].mean(0)
        if SurfaceField(others.vertices, others.faces).winding(point[None])[0] < 1:
            faces[part] = faces[part][:, ::-1]
            wrong += 1
    if wrong:
        steps.append(f"turned {wrong} of {len(parts)} pieces inside out")
    if len(inverted) > wrong:
        steps.append(f"kept {len(inverted) - wrong} cavities")
    return replace(mesh, faces=faces)


def _checked(mesh: Mesh, steps: list[str], opening: Opening, resolution: int) -> Mesh:
    """A closed mesh that bounds its volume everywhere: bodies united, or rebuilt, where it does not.

    Raises:
        MeshError: even so it does not.
    """
    if not len(mesh.faces) or (mesh.volume <= 0 and opening != "thicken"):
        raise MeshError("it encloses no volume")
    if _wrong(mesh) > _BAD:
        whole = united(mesh)
        if whole is not None and _wrong(whole) <= _BAD:
            steps.append(f"united bodies that overlap: {len(mesh.faces)} faces became {len(whole.faces)}")
            mesh = whole
        else:
            try:
                mesh = rebuilt(mesh, resolution)
                steps.append(f"rebuilt on a grid of {resolution} cells, as it cuts through itself")
            except MeshError:
                if opening != "thicken":
                    raise
                mesh = thickened(mesh, resolution)
                steps.append(f"thicken: sheets of two sides, thickened on a grid of {resolution} cells")
    if not closed(mesh.faces) or mesh.volume <= 0:
        raise MeshError("it encloses no volume, also after it was rebuilt")
    if (share := _wrong(mesh)) > _BAD:
        raise MeshError(f"{share:.0%} of its surface has no inside on one side and outside on the other")
    return mesh


def _wrong(mesh: Mesh) -> float:
    """Share of the surface that does not have winding number 1 just below and 0 just above."""
    import trimesh

    points, faces = trimesh.sample.sample_surface(mesh.to_trimesh(), _PROBES, seed=0)
    a, b, c = mesh.vertices[mesh.faces[faces]].transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
    winding = SurfaceField(mesh.vertices, mesh.faces).winding
    right = (winding(points - _STEP * normals) == 1) & (winding(points + _STEP * normals) == 0)
    return float(1 - right.mean())


def united(mesh: Mesh) -> Mesh | None:
    """The surface of the union of a closed mesh's bodies, without its cavities' contents; None where manifold3d cannot.

    Faces of the union have the colours of those they were part of.
    """
    from manifold3d import Error, Manifold, OpType
    from manifold3d import Mesh as ManifoldMesh

    numbers = np.arange(len(mesh.faces), dtype=np.uint32)
    try:
        whole = Manifold(ManifoldMesh(mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32), face_id=numbers))
    except (TypeError, ValueError):
        return None
    if whole.status() != Error.NoError:
        return None
    bodies = whole.decompose()
    solid = [body for body in bodies if body.volume() > 0]
    holes = [body for body in bodies if body.volume() <= 0]
    if holes or not solid:  # a cavity's boundary cannot be united by itself
        return None
    made = Manifold.batch_boolean(solid, OpType.Add).to_mesh()
    colours = None if mesh.colours is None else mesh.colours[np.asarray(made.face_id)]
    return Mesh(np.asarray(made.vert_properties, np.float64)[:, :3], np.asarray(made.tri_verts, np.int64), colours)
