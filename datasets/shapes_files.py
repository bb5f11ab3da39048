"""Files of meshes and point clouds, read as one mesh each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .errors import DatasetError

Axis = Literal["y", "z"]
UP: dict[str, Axis] = {".obj": "y", ".glb": "y", ".gltf": "y", ".ply": "z", ".off": "z", ".stl": "z"}
"""Files of meshes, with the axis that is usually up in them."""
CLOUDS = (".xyz", ".npy", ".npz")
"""Files that hold points only; PLY may hold either."""
SUFFIXES = (*UP, *CLOUDS)


class MeshError(DatasetError):
    """A mesh or point cloud cannot be used; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles, or with no faces a cloud of points.

    Attributes:
        vertices: float64 (n, 3). faces: int64 (m, 3), counter-clockwise from outside.
        colours: uint8 (m, 3) of the faces; None: none are known.
        normals: float64 (n, 3), of a cloud's points where they are known.
    """

    vertices: np.ndarray
    faces: np.ndarray
    colours: np.ndarray | None = None
    normals: np.ndarray | None = None

    @property
    def volume(self) -> float:
        """Enclosed, of a closed mesh; negative where it is inside out."""
        a, b, c = self.vertices[self.faces].transpose(1, 0, 2)
        return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)

    @property
    def areas(self) -> np.ndarray:
        """float64 (m,)."""
        a, b, c = self.vertices[self.faces].transpose(1, 0, 2)
        return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2

    def select(self, faces: np.ndarray) -> Mesh:
        """Some of the faces (numbers, or truth values), with the vertices they use."""
        used, numbers = np.unique(self.faces[faces], return_inverse=True)
        colours = None if self.colours is None else self.colours[faces]
        return Mesh(self.vertices[used], numbers.reshape(-1, 3), colours)

    def turned(self, up: Axis) -> Mesh:
        """With z up, from an axis that was up."""
        if up == "z":
            return self

        def turn(rows: np.ndarray) -> np.ndarray:
            x, y, z = rows.T
            return np.stack((x, -z, y), axis=1)

        return replace(self, vertices=turn(self.vertices), normals=None if self.normals is None else turn(self.normals))

    def normalised(self, half: float) -> Mesh:
        """The middle of its box at the origin, the box's longest side 2 ``half``.

        Raises:
            MeshError: it has no extent.
        """
        low, high = self.vertices.min(0), self.vertices.max(0)
        longest = float((high - low).max())
        if not longest > 0:
            raise MeshError("all of its points coincide")
        return replace(self, vertices=(self.vertices - (low + high) / 2) * (2 * half / longest))

    def to_trimesh(self) -> Any:
        """With the same vertices in the same order."""
        import trimesh

        return trimesh.Trimesh(self.vertices, self.faces, process=False)


def read_mesh(path: str | Path, up: Axis | None = None) -> Mesh:
    """The mesh of a file, with all parts of a scene in their places, z up; or its cloud of points.

    Args:
        up: axis that is up in the file; None: as is usual for its kind (:data:`UP`).

    Raises:
        MeshError: the file cannot be read as it should, holds nothing, or coordinates that are not finite.
        OSError: there is no such file.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise MeshError(f"{suffix or 'no suffix'} is no kind of mesh; expected one of {', '.join(SUFFIXES)}")
    if not path.stat().st_size:
        raise MeshError("the file is empty")
    found = _arrays(path) if suffix in (".npy", ".npz") else _scene(path)
    if not len(found.vertices):
        raise MeshError("it holds no vertices")
    if len(found.faces) and (found.faces.min() < 0 or found.faces.max() >= len(found.vertices)):
        raise MeshError(f"a face names vertex {found.faces.max()} of {len(found.vertices)}")
    wrong = ~np.isfinite(found.vertices).all(1)
    if len(found.faces):
        wrong &= np.isin(np.arange(len(wrong)), found.faces)
    if wrong.any():
        raise MeshError(f"{int(wrong.sum())} of its {len(wrong)} vertices are NaN or infinite")
    if len(found.faces):
        found = found.select(np.arange(len(found.faces)))
    return found.turned(up or UP.get(suffix, "z"))


def _arrays(path: Path) -> Mesh:
    """NumPy's files: points (n, 3), or with normals (n, 6); or `points` and perhaps `normals`."""
    try:
        held = np.load(path, allow_pickle=False)
        if isinstance(held, np.ndarray):
            points, normals = held[:, :3], held[:, 3:6] if held.shape[1] >= 6 else None
        else:
            with held:
                points, normals = held["points"], held.get("normals")
        points = np.asarray(points, np.float64).reshape(-1, 3)
        normals = None if normals is None else np.asarray(normals, np.float64).reshape(len(points), 3)
    except (OSError, ValueError, EOFError, KeyError, IndexError, TypeError) as error:
        raise MeshError(f"it cannot be read as points ({_first_line(error)})") from None
    return Mesh(points, np.zeros((0, 3), np.int64), normals=normals)


def _scene(path: Path) -> Mesh:
    import trimesh

    beside: Any = _Beside(path)
    try:
        scene = trimesh.load_scene(path, process=False, resolver=beside)
        meshes, clouds = [], []
        for node in scene.graph.nodes_geometry:
            transform, name = scene.graph[node]
            part = scene.geometry[name]
            moved = trimesh.transform_points(np.asarray(part.vertices, np.float64), transform)
            if isinstance(part, trimesh.Trimesh):
                faces = np.asarray(part.faces, np.int64)
                faces = faces[:, ::-1] if np.linalg.det(transform[:3, :3]) < 0 else faces
                meshes.append((moved, faces, _colours(part)))
            elif isinstance(part, trimesh.PointCloud):
                clouds.append(moved)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # its readers raise whatever happens to go wrong
        raise MeshError(f"it is damaged, or not what its suffix says ({_first_line(error)})") from None
    meshes = [part for part in meshes if len(part[1])]
    if not meshes:
        points = np.concatenate(clouds) if clouds else np.zeros((0, 3))
        return Mesh(points, np.zeros((0, 3), np.int64))
    firsts = np.cumsum([0, *(len(vertices) for vertices, _, _ in meshes)])
    faces = np.concatenate([part[1] + first for part, first in zip(meshes, firsts, strict=False)])
    colours = None
    if any(part[2] is not None for part in meshes):
        colours = np.concatenate(
            [np.full((len(part[1]), 3), 200, np.uint8) if part[2] is None else part[2] for part in meshes]
        )
    return Mesh(np.concatenate([part[0] for part in meshes]), faces, colours)


def _colours(part: Any) -> np.ndarray | None:
    """uint8 (faces, 3), where the part has any; those that cannot be read are left out."""
    visual = part.visual
    try:
        if visual is None or not visual.defined:
            return None
        coloured = visual.to_color() if visual.kind == "texture" else visual
        return np.asarray(coloured.face_colors, np.uint8)[:, :3]
    except Exception:
        return None


class _Beside:
    """Opens files that a mesh names, such as materials, in its own folder and below only."""

    def __init__(self, path: Path) -> None:
        self._folder = path.parent.resolve()

    def get(self, name: str) -> bytes:
        place = (self._folder / str(name).strip()).resolve()
        if not place.is_relative_to(self._folder):
            raise ValueError(f"{name} lies outside of the mesh's folder")
        return place.read_bytes()

    def namespaced(self, namespace: str) -> _Beside:
        return self

    def keys(self) -> list[str]:
        return []

    def get_base(self) -> str:
        return str(self._folder)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
