"""Views of meshes with depth, outline, normals and cameras, by casting rays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .gbuffers import Views
from .shapes_files import Mesh

FOCAL = 1.3889
"""Focal length in sides of a picture, as in SAR3D's data: a field of view of 39.6 degrees."""
DISTANCE, HALF = 1.77, 0.45
"""Of the camera from the origin, and half the side of the box that objects lie in there."""
_KEY, _FILL = np.array([0.35, -0.55, -0.75]), np.array([-0.7, -0.1, -0.4])
"""Towards the lights, in the camera's axes: x right, y down, z forward."""
_AMBIENT, _GREY = 0.3, 190


def camera(azimuth: float, elevation: float, distance: float = DISTANCE) -> np.ndarray:
    """float64 (4, 4): camera to world (x right, y down, z forward), looking at the origin; z is up; in degrees."""
    a, e = math.radians(azimuth), math.radians(elevation)
    back = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.array([-math.sin(a), math.cos(a), 0.0])
    pose = np.eye(4)
    pose[:3, :3] = np.stack((right, np.cross(-back, right), -back), axis=1)
    pose[:3, 3] = distance * back
    return pose


def ring(count: int, start: float = 30.0, elevations: Sequence[float] = (20.0,)) -> np.ndarray:
    """(count, 4, 4): cameras evenly around, their elevations in turn."""
    return np.stack([camera(start + 360 * i / count, elevations[i % len(elevations)]) for i in range(count)])


def object_cameras(draw: np.random.Generator, count: int = 12) -> np.ndarray:
    """(count, 4, 4): cameras from which an object is seen all around in the first half, and again in the second.

    Every half goes once around in even steps from a random start; views from above and from slightly below take turns,
    and one of each half looks down steeply.
    """
    half, poses = max(1, -(-count // 2)), []
    start = draw.uniform(0, 360)
    for i in range(count):
        turn, place = divmod(i, half)
        elevation = (65.0 if place == half - 1 and half > 2 else (25.0, -5.0)[place % 2]) + draw.uniform(-5, 5)
        poses.append(camera(start + 360 * (place + turn / 2) / half, elevation))
    return np.stack(poses)


def packed_cameras(poses: np.ndarray) -> np.ndarray:
    """float32 (n, 25): camera-to-world matrices and intrinsics in sides of the picture, row by row."""
    intrinsics = np.array([[FOCAL, 0, 0.5], [0, FOCAL, 0.5], [0, 0, 1]]).reshape(1, 9)
    return np.concatenate((poses.reshape(-1, 16), np.repeat(intrinsics, len(poses), axis=0)), axis=1).astype(np.float32)


def render(mesh: Mesh, poses: np.ndarray, size: int, samples: int = 2, scale: float = HALF) -> Views:
    """Pictures of a mesh that lies in [-1, 1]^3, on white, lit by two lights beside the camera.

    Args:
        poses: (views, 4, 4). size: side in pixels.
        samples: colours and outlines are means of ``samples`` x ``samples`` rays; depth and normals are those of the
            pixel's middle.
        scale: of the mesh before it is looked at: cameras and depth have the units of the scaled one.
    """
    import open3d as o3d

    tensor: Any = o3d.core.Tensor
    scene = o3d.t.geometry.RaycastingScene()
    vertices = np.ascontiguousarray(mesh.vertices * scale, np.float32)
    scene.add_triangles(tensor(vertices), tensor(np.ascontiguousarray(mesh.faces, np.uint32)))
    colours = mesh.colours if mesh.colours is not None else np.full((len(mesh.faces), 3), _GREY, np.uint8)
    fine, middle = _pixels(size * samples), _pixels(size)
    pictures: dict[str, list[np.ndarray]] = {"colours": [], "alpha": [], "depth": [], "normals": []}
    for pose in poses:
        hit, _, normal, face = _cast(scene, tensor, fine, pose)
        shown = np.ones((len(fine), 3))
        shown[hit] = colours[face[hit]] / 255 * _light(normal[hit], pose)[:, None]
        pictures["colours"].append(_bytes(shown, size, samples))
        pictures["alpha"].append(_bytes(hit[:, None].astype(float), size, samples)[..., 0])
        # A ray's length is the depth, as rays advance by 1 along the view.
        hit, depth, normal, _ = _cast(scene, tensor, middle, pose)
        pictures["depth"].append(np.where(hit, depth, 0).reshape(size, size).astype(np.float32))
        pictures["normals"].append((normal * hit[:, None]).reshape(size, size, 3).astype(np.float32))
    stacked = {name: np.stack(values) for name, values in pictures.items()}
    return Views(cameras=packed_cameras(poses), **stacked)


def _pixels(side: int) -> np.ndarray:
    """Directions through the pixels' middles in the camera's axes (side^2, 3), of depth 1."""
    ticks = ((np.arange(side) + 0.5) / side - 0.5) / FOCAL
    x, y = np.meshgrid(ticks, ticks)
    return np.stack((x, y, np.ones_like(x)), axis=-1).reshape(-1, 3)


def _cast(scene: Any, tensor: Any, local: np.ndarray, pose: np.ndarray) -> tuple[np.ndarray, ...]:
    """Which rays meet the mesh, how far away, the normal there (turned to the camera), and the face."""
    rays = np.concatenate((np.broadcast_to(pose[:3, 3], local.shape), local @ pose[:3, :3].T), axis=1)
    found = scene.cast_rays(tensor(np.ascontiguousarray(rays, np.float32)))
    depth = found["t_hit"].numpy()
    normal = found["primitive_normals"].numpy().astype(np.float64)
    normal *= -np.where(np.einsum("ij,ij->i", normal, rays[:, 3:]) > 0, 1, -1)[:, None]
    return np.isfinite(depth), depth, normal, found["primitive_ids"].numpy()


def _light(normals: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """How bright surfaces are, in [0, 1]."""
    local = normals @ pose[:3, :3]
    total = np.full(len(normals), _AMBIENT)
    for towards, strength in ((_KEY, 0.65), (_FILL, 0.25)):
        total += strength * np.maximum(local @ (towards / np.linalg.norm(towards)), 0)
    return total.clip(0, 1)


def _bytes(values: np.ndarray, size: int, samples: int) -> np.ndarray:
    """(rays, channels) in [0, 1] -> uint8 (size, size, channels), means over the samples of a pixel."""
    tiled = values.reshape(size, samples, size, samples, -1).mean((1, 3))
    return np.round(tiled * 255).astype(np.uint8)
