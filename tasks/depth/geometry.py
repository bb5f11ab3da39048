"""From a depth map to points in space: coloured point clouds, and the photo as seen from elsewhere.

Space is the camera's: x to the right, y down, z away from it, in the depth's unit. Pixel centres are at whole numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from nextscale.core.checkpoint import write_atomically

FIELD_OF_VIEW = 55.0
"""Degrees along the longer side, of a usual camera: taken where nothing is known about it."""

EDGE = 0.1
"""Neighbouring pixels whose depths differ by more than this share lie on different surfaces."""


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    Attributes:
        fx, fy: focal lengths in pixels.
        cx, cy: principal point in pixels, from the centre of the top left one.
    """

    fx: float
    fy: float
    cx: float
    cy: float

    def __post_init__(self) -> None:
        if not (self.fx > 0 and self.fy > 0 and math.isfinite(self.fx * self.fy)):
            raise ValueError(f"focal lengths are {self.fx} and {self.fy} pixels; expected more than 0")

    @classmethod
    def of_view(cls, height: int, width: int, degrees: float = FIELD_OF_VIEW) -> Camera:
        """A camera with a field of view in degrees along the longer side, looking through the middle.

        Raises:
            ValueError: no plane picture has such a view.
        """
        if not 0 < degrees < 180:
            raise ValueError(f"the field of view is {degrees} degrees; expected more than 0 and less than 180")
        focal = max(height, width) / (2 * math.tan(math.radians(degrees) / 2))
        return cls(focal, focal, (width - 1) / 2, (height - 1) / 2)

    @classmethod
    def of_matrix(cls, matrix: ArrayLike) -> Camera:
        """From the (3, 3) matrix that data sets give.

        Raises:
            ValueError: it is none.
        """
        k = np.asarray(matrix, np.float64)
        if k.shape != (3, 3):
            raise ValueError(f"the camera matrix has shape {k.shape}; expected (3, 3)")
        return cls(float(k[0, 0]), float(k[1, 1]), float(k[0, 2]), float(k[1, 2]))

    @property
    def matrix(self) -> Float[np.ndarray, "3 3"]:
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1]])

    def resized(self, horizontal: float, vertical: float) -> Camera:
        """The camera of the same picture, so many times as wide and as high."""
        return Camera(
            self.fx * horizontal,
            self.fy * vertical,
            (self.cx + 0.5) * horizontal - 0.5,
            (self.cy + 0.5) * vertical - 0.5,
        )


def unproject(depth: Float[Tensor, "height width"], camera: Camera) -> Float[np.ndarray, "height width 3"]:
    """The point in space that each pixel shows, float32."""
    z = depth.detach().cpu().float().numpy()
    rows, columns = np.arange(z.shape[0], dtype=np.float32)[:, None], np.arange(z.shape[1], dtype=np.float32)
    x = (columns - np.float32(camera.cx)) / np.float32(camera.fx)
    y = (rows - np.float32(camera.cy)) / np.float32(camera.fy)
    return np.stack((x * z, y * z, z), axis=-1)


def _known(z: np.ndarray) -> np.ndarray:
    return np.isfinite(z) & (z > 0)


def _check(depth: Tensor, image: Tensor) -> None:
    if depth.ndim != 2 or tuple(image.shape) != (3, *depth.shape):
        raise ValueError(
            f"the depth has shape {tuple(depth.shape)} and the image {tuple(image.shape)}; expected (height, width) "
            "and (3, height, width) of the same size"
        )


def point_cloud(
    depth: Float[Tensor, "height width"],
    image: Float[Tensor, "3 height width"],
    camera: Camera,
    limit: int | None = None,
    edges: bool = False,
) -> Any:
    """Coloured points, an ``open3d.t.geometry.PointCloud``.

    Args:
        depth: pixels that are not positive and finite give no point.
        image: in [0, 1].
        limit: at most so many points: rows and columns are left out evenly.
        edges: keep the points at the rims of surfaces too, which often hang in the air between two of them.

    Raises:
        ValueError: shapes differ, or no pixel has a depth.
    """
    import open3d

    _check(depth, image)
    every = 1 if limit is None else max(1, math.ceil(math.sqrt(depth.numel() / max(limit, 1))))
    kept = _known(depth.numpy())
    if not edges:
        kept &= ~_rims(depth.numpy())
    kept = kept[::every, ::every]
    if not kept.any():
        raise ValueError("the depth map has no positive, finite depth, so it gives no points")
    sampled = unproject(depth, camera)[::every, ::every]
    colours = image[:, ::every, ::every].permute(1, 2, 0).detach().cpu().float().numpy()
    tensor: Any = open3d.core.Tensor
    cloud = open3d.t.geometry.PointCloud(tensor(np.ascontiguousarray(sampled[kept])))
    cloud.point.colors = tensor(np.round(colours[kept] * 255).astype(np.uint8))
    return cloud


def save_ply(cloud: Any, path: str | Path) -> Path:
    """Write a point cloud as binary PLY, whole or not at all."""
    import open3d

    def write(temporary: Path) -> None:
        named = temporary.with_suffix(".ply")  # open3d tells the format by the name
        try:
            if not open3d.t.io.write_point_cloud(named, cloud):
                raise OSError(f"{path} could not be written: is the disk full?")
            named.replace(temporary)
        finally:
            named.unlink(missing_ok=True)

    return write_atomically(path, write)


def _rims(z: np.ndarray) -> np.ndarray:
    """Pixels beside a jump in depth."""
    found = np.zeros(z.shape, bool)
    with np.errstate(invalid="ignore", over="ignore"):
        down = np.abs(z[1:] - z[:-1]) > EDGE * np.minimum(z[1:], z[:-1])
        across = np.abs(z[:, 1:] - z[:, :-1]) > EDGE * np.minimum(z[:, 1:], z[:, :-1])
    found[1:] |= down
    found[:-1] |= down
    found[:, 1:] |= across
    found[:, :-1] |= across
    return found


def turned(
    depth: Float[Tensor, "height width"],
    image: Float[Tensor, "3 height width"],
    camera: Camera,
    right: float = 0.0,
    up: float = 0.0,
    background: float = 1.0,
    longest: int = 640,
) -> Float[Tensor, "3 tall wide"]:
    """The photo from a new viewpoint: the camera moves around the middle of what it sees, still looking at it.

    Neighbouring pixels are joined to a surface, cut where the depth jumps; what the photo did not see is left blank.

    Args:
        right, up: how far the camera moves around, in degrees.
        background: grey value of what is left blank.
        longest: the longer side of what is drawn, and of what it is drawn from, in pixels.

    Raises:
        ValueError: shapes differ, or no pixel has a depth.
    """
    import open3d

    _check(depth, image)
    small, colours, camera = _reduced(depth, image, camera, longest)
    height, width = small.shape
    z, points = small.numpy(), unproject(small, camera)
    known = _known(z)
    if not known.any():
        raise ValueError("the depth map has no positive, finite depth, so there is nothing to look at")
    faces = _faces(z, known)
    tensor: Any = open3d.core.Tensor
    caster = open3d.t.geometry.RaycastingScene()
    caster.add_triangles(tensor(np.where(known[..., None], points, 0).reshape(-1, 3)), tensor(faces))
    centre = np.array([0, 0, float(np.median(z[known]))])
    rotation = _rotation(right, up)
    # Camera coordinates p of the new view lie at centre + rotation (p - centre) in the old one's.
    origin = centre - rotation @ centre
    rows, columns = np.indices((height, width), dtype=np.float64)
    away = np.stack(((columns - camera.cx) / camera.fx, (rows - camera.cy) / camera.fy, np.ones_like(rows)), axis=-1)
    rays = np.concatenate((np.broadcast_to(origin, away.shape), away @ rotation.T), axis=-1).astype(np.float32)
    met = caster.cast_rays(tensor(rays))
    seen = np.isfinite(met["t_hit"].numpy())
    corners = faces[met["primitive_ids"].numpy()[seen]]
    weights = met["primitive_uvs"].numpy()[seen]
    weights = np.concatenate((1 - weights.sum(1, keepdims=True), weights), axis=1)
    flat = colours.permute(1, 2, 0).reshape(-1, 3).numpy()
    picture = np.full((height, width, 3), background, np.float32)
    picture[seen] = (flat[corners] * weights[..., None]).sum(1)
    return torch.from_numpy(picture).permute(2, 0, 1).clamp(0, 1)


def _reduced(depth: Tensor, image: Tensor, camera: Camera, longest: int) -> tuple[Tensor, Tensor, Camera]:
    """Depth and image with the longer side at most ``longest``, and their camera."""
    depth, image = depth.detach().cpu().float(), image.detach().cpu().float()
    height, width = depth.shape
    if max(height, width) <= longest:
        return depth, image, camera
    size = (max(2, round(height * longest / max(height, width))), max(2, round(width * longest / max(height, width))))
    # Depths are picked, not mixed: a mean over a rim lies on neither surface.
    small = torch.nn.functional.interpolate(depth[None, None], size=size, mode="nearest-exact")[0, 0]
    colours = torch.nn.functional.interpolate(image[None], size=size, mode="area")[0]
    return small, colours, camera.resized(size[1] / width, size[0] / height)


def _faces(z: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Two triangles for each square of four pixels that lie on one surface, uint32 (faces, 3)."""
    numbers = np.arange(z.size, dtype=np.uint32).reshape(z.shape)
    corners = [part[rows, columns] for part in (z,) for rows in _HALVES for columns in _HALVES]
    low, high = np.minimum.reduce(corners), np.maximum.reduce(corners)
    whole = np.logical_and.reduce([known[rows, columns] for rows in _HALVES for columns in _HALVES])
    with np.errstate(invalid="ignore"):
        whole &= high - low <= 2 * EDGE * low
    a, b, c, d = (numbers[rows, columns][whole] for rows in _HALVES for columns in _HALVES)
    return np.concatenate((np.stack((a, c, b), axis=1), np.stack((b, c, d), axis=1)))


_HALVES = (slice(None, -1), slice(1, None))


def _rotation(right: float, up: float) -> np.ndarray:
    """Of a camera that has moved so many degrees around what it looks at."""
    yaw, pitch = math.radians(-right), math.radians(-up)
    about_y = np.array([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
    about_x = np.array([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]])
    return np.asarray(about_y @ about_x)
