"""Closed surfaces made on a grid, of meshes that have holes or cut through themselves, and of clouds of points."""

from __future__ import annotations

import numpy as np

from .shapes_files import Mesh, MeshError
from .shapes_topology import closed, pieces
from .shapes_winding import SurfaceField

_LOST = 0.1
_FEW = 100


def rebuilt(mesh: Mesh, resolution: int) -> Mesh:
    """The boundary of where the generalised winding number is above 1/2, with the mesh's own surface kept in place.

    Args:
        mesh: its longest side 2. resolution: cells along a side of 2.

    Raises:
        MeshError: more than a tenth of its surface bounds no volume: it consists of sheets.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    field, ticks = SurfaceField(mesh.vertices, mesh.faces), _ticks(resolution)
    cell = ticks[1] - ticks[0]
    winding = field.lattice_winding(ticks)
    inside = winding > 0.5
    # Distances place the surface; they are needed beside it only.
    beside = maximum_filter(inside, 3) & ~minimum_filter(inside, 3)
    distance = np.full(inside.shape, 4 * cell)
    distance[beside] = field.distance(ticks[np.argwhere(beside)])
    # Where a hole is closed no face is near, and the winding number passes 1/2 slowly: it says where.
    size = np.minimum(distance, np.abs(winding - 0.5) * 8 * cell)
    values = np.where(inside, size, -size)
    made = _without_crumbs(_surface(values, ticks))
    if len(made.faces):
        points, normals = _samples(mesh)
        far = SurfaceField(made.vertices, made.faces).distance(points) > 1.5 * cell
        both = [field.mean_winding(points + side * 1e-3 * normals, 16) > 0.5 for side in (1, -1)]
        lost = float((far & ~(both[0] & both[1])).mean())
    else:
        lost = 1.0
    if lost > _LOST:
        raise MeshError(f"{lost:.0%} of its surface bounds no volume, as sheets do not; it can be thickened instead")
    return made


def thickened(mesh: Mesh, resolution: int) -> Mesh:
    """The boundary of all that is at most one cell of the grid away from the surface, or enclosed by it."""
    from scipy.ndimage import label

    field, ticks = SurfaceField(mesh.vertices, mesh.faces), _ticks(resolution)
    cell = ticks[1] - ticks[0]
    distance = field.distance(_grid(ticks)).reshape((len(ticks),) * 3)
    regions, _ = label(distance > cell)
    values = cell - distance
    # What cannot be reached from outside is filled.
    values[(regions > 0) & (regions != regions[0, 0, 0])] = cell
    return _without_crumbs(_surface(values, ticks))


def from_points(cloud: Mesh, resolution: int) -> Mesh:
    """A closed surface through points, by Poisson reconstruction (Kazhdan and Hoppe 2013) of open3d.

    Normals that are not known are fitted and turned alike.

    Raises:
        MeshError: there are too few points, or the surface does not pass near them.
    """
    import open3d as o3d

    if len(cloud.vertices) < _FEW:
        raise MeshError(f"{len(cloud.vertices)} points show no surface; expected {_FEW} or more")
    points = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(cloud.vertices))
    if cloud.normals is not None and np.isfinite(cloud.normals).all():
        points.normals = o3d.utility.Vector3dVector(cloud.normals)
    else:
        # Points on one exact sphere or plane would have no Delaunay triangulation, by which normals are turned.
        shaken = cloud.vertices + np.random.default_rng(0).normal(0, 1e-4, cloud.vertices.shape)
        fitted = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(shaken))
        fitted.estimate_normals(o3d.geometry.KDTreeSearchParamKNN(16))
        try:
            fitted.orient_normals_consistent_tangent_plane(12)
        except RuntimeError:
            raise MeshError("normals of its points cannot be found: give them, or other points") from None
        points.normals = fitted.normals
    depth = max(5, round(np.log2(resolution)))
    with o3d.utility.VerbosityContextManager(o3d.utility.VerbosityLevel.Error):
        found, _ = o3d.geometry.TriangleMesh.create_from_point_cloud_poisson(
            points, depth=depth, scale=1.2, n_threads=1
        )
    made = Mesh(np.asarray(found.vertices), np.asarray(found.triangles, np.int64))
    if len(made.faces) and made.volume < 0:
        made = Mesh(made.vertices, made.faces[:, ::-1].copy())
    if not closed(made.faces):
        if not len(made.faces):
            raise MeshError("its points show no surface")
        made = rebuilt(made, resolution)
    far = SurfaceField(made.vertices, made.faces).distance(cloud.vertices) > 4 / resolution
    if far.mean() > _LOST:
        raise MeshError(f"no closed surface passes through its points: {far.mean():.0%} of them are far from it")
    return _without_crumbs(made)


def _ticks(resolution: int) -> np.ndarray:
    """Coordinates of a grid's points along a side: three cells more than [-1, 1] at both ends, and no round numbers,
    at which the faces of machine parts like to lie."""
    cell = 2 / resolution
    return (np.arange(resolution + 7) - 3 + 0.137) * cell - 1


def _grid(ticks: np.ndarray) -> np.ndarray:
    return np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 3)


def _surface(values: np.ndarray, ticks: np.ndarray) -> Mesh:
    """Where values pass zero, wound so that normals point to negative ones."""
    from skimage.measure import marching_cubes

    if not values.min() < 0 < values.max():
        return Mesh(np.zeros((0, 3)), np.zeros((0, 3), np.int64))
    # At zeros marching cubes tears the surface: they are moved by a thousandth of a cell.
    least = 1e-3 * (ticks[1] - ticks[0])
    values = np.where(np.abs(values) < least, np.copysign(least, values), values)
    # Faces without area stay: without them the surface would have holes.
    vertices, faces, _, _ = marching_cubes(values.astype(np.float32), 0.0)
    return Mesh(ticks[0] + vertices.astype(np.float64) * (ticks[1] - ticks[0]), faces[:, ::-1].astype(np.int64))


def _without_crumbs(mesh: Mesh) -> Mesh:
    """Without pieces of less than a ten-thousandth of the largest one's volume."""
    if not len(mesh.faces):
        return mesh
    parts = pieces(mesh)
    volumes = np.array([abs(mesh.select(part).volume) for part in parts])
    return mesh.select(
        np.concatenate([part for part, v in zip(parts, volumes, strict=True) if v > 1e-4 * volumes.max()])
    )


def _samples(mesh: Mesh, count: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """Points on the surface with their normals."""
    import trimesh

    points, faces = trimesh.sample.sample_surface(mesh.to_trimesh(), count, seed=0)
    a, b, c = mesh.vertices[mesh.faces[faces]].transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    return points, normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
