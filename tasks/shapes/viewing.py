"""Pictures of shapes, turntables, and a page in which a shape can be turned by hand, without a network."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from nextscale.core.checkpoint import write_atomically, write_text
from nextscale.tasks.shapes.objects import Shape
from nextscale.tasks.shapes.viewer_page import PAGE

FIELD_OF_VIEW = 39.6
"""Degrees; a camera of this view sees the whole of a shape of half-diagonal 1 from a distance of about 3."""

LIGHTS = ((0.4, 0.7, 0.6), (-0.7, 0.2, 0.4))
"""Towards the lights, in the camera's axes (right, up, towards the eye)."""
_STRENGTHS, _AMBIENT, _GREY = (0.75, 0.2), 0.25, 0.78
SUFFIXES = (".gif", ".webp", ".png", ".apng")


def camera(azimuth: float, elevation: float, distance: float) -> Float[np.ndarray, "4 4"]:
    """Camera-to-world matrix (x right, y down, z forward) that looks at the origin; z is up, angles in degrees."""
    a, e = math.radians(azimuth), math.radians(elevation)
    backwards = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    right = np.array([-math.sin(a), math.cos(a), 0.0])
    pose = np.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2] = right, np.cross(right, backwards), -backwards
    pose[:3, 1] = np.cross(pose[:3, 2], right)
    pose[:3, 3] = backwards * distance
    return pose


def pictures(
    shape: Shape,
    azimuths: Sequence[float],
    *,
    elevation: float = 20.0,
    size: int = 256,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    samples: int = 2,
) -> UInt8[np.ndarray, "n size size 3"]:
    """A shape from several sides, centred and as large as fits, shaded by two lights.

    Args:
        azimuths, elevation: of the camera, in degrees; 0 looks along the first axis that is not up.
        size: side of a picture in pixels; each is the mean of ``samples`` x ``samples`` rays.
        background: red, green and blue in [0, 1].

    Raises:
        ValueError: the shape has no face.
    """
    import open3d as o3d

    if shape.empty:
        raise ValueError("the shape has no faces to look at; draw it from another seed")
    placed = _placed(shape)
    scene = o3d.t.geometry.RaycastingScene()
    tensor: Any = o3d.core.Tensor
    scene.add_triangles(tensor(placed.vertices), tensor(placed.faces.astype(np.uint32)))
    normals = np.asarray(placed.to_trimesh().vertex_normals, dtype=np.float32)
    colours = placed.colours if placed.colours is not None else np.full_like(placed.vertices, _GREY)
    distance = 1.02 / math.sin(math.radians(FIELD_OF_VIEW / 2))
    side = size * samples
    ticks = ((np.arange(side) + 0.5) / side * 2 - 1) * math.tan(math.radians(FIELD_OF_VIEW / 2))
    local = np.stack([*np.meshgrid(ticks, ticks), np.ones((side, side))], axis=-1).reshape(-1, 3)
    frames = []
    for azimuth in azimuths:
        pose = camera(azimuth, elevation, distance)
        rays = np.concatenate((np.broadcast_to(pose[:3, 3], local.shape), local @ pose[:3, :3].T), axis=1)
        seen = scene.cast_rays(tensor(rays.astype(np.float32)))
        hit = np.isfinite(seen["t_hit"].numpy())
        corners = placed.faces[seen["primitive_ids"].numpy()[hit]]
        u, v = seen["primitive_uvs"].numpy()[hit].T
        weights = np.stack((1 - u - v, u, v), axis=1)[..., None]
        colour, normal = ((values[corners] * weights).sum(1) for values in (colours, normals))
        frame = np.broadcast_to(np.asarray(background, np.float32), local.shape).copy()
        frame[hit] = colour * _shade(normal, pose)[:, None]
        tiled = frame.reshape(size, samples, size, samples, 3).mean((1, 3))
        frames.append(np.round(tiled.clip(0, 1) * 255).astype(np.uint8))
    return np.stack(frames)


def _placed(shape: Shape) -> Shape:
    """Standing upright in the unit ball."""
    upright = shape.turned("z").normalised()
    reach = float(np.linalg.norm(upright.vertices, axis=1).max())
    return upright.normalised(1 / max(reach, 1e-12))


def _shade(normals: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """How bright a surface is; both of its sides are lit."""
    normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    in_view = normals @ (pose[:3, :3] * np.array([1, -1, -1]))
    in_view *= np.where(in_view[:, 2:] < 0, -1, 1)
    light = np.full(len(normals), _AMBIENT)
    for direction, strength in zip(LIGHTS, _STRENGTHS, strict=True):
        towards = np.asarray(direction) / np.linalg.norm(direction)
        light = light + strength * np.maximum(in_view @ towards, 0)
    return light


def turntable(
    shape: Shape,
    path: str | Path,
    *,
    frames: int = 36,
    seconds: float = 4.0,
    elevation: float = 20.0,
    size: int = 256,
) -> Path:
    """Write a turn of a shape as an endless animation: GIF, WebP or PNG, as the suffix says.

    Raises:
        ValueError: the suffix is no animation, or the shape has no face.
        OSError: the file cannot be written.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: suffix {path.suffix!r} is no animation; expected one of {', '.join(SUFFIXES)}")
    if frames < 1 or seconds <= 0:
        raise ValueError(f"a turn of {frames} pictures in {seconds} s: expected at least 1, and more than 0 s")
    azimuths = [30 + 360 * frame / frames for frame in range(frames)]
    shown = [Image.fromarray(frame) for frame in pictures(shape, azimuths, elevation=elevation, size=size)]
    kind = {".gif": "GIF", ".webp": "WEBP"}.get(path.suffix.lower(), "PNG")
    buffer = io.BytesIO()
    shown[0].save(
        buffer,
        format=kind,
        save_all=True,
        append_images=shown[1:],
        duration=round(1000 * seconds / frames),
        loop=0,
        **({"quality": 85} if kind == "WEBP" else {}),
    )

    def write(temporary: Path) -> None:
        temporary.write_bytes(buffer.getvalue())

    return write_atomically(path, write)


def viewer(shapes: Shape | Sequence[Shape], path: str | Path, titles: Sequence[str] | None = None) -> Path:
    """Write an HTML page in which shapes are turned and enlarged by hand; it needs no network and no other file.

    Args:
        titles: what is written above each shape; None: numbers.

    Raises:
        ValueError: there is no shape, one has no face, or there are not as many titles.
        OSError: the file cannot be written.
    """
    path, shown = Path(path), [shapes] if isinstance(shapes, Shape) else list(shapes)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{path}: pages are written as .html; name the file so")
    names = [f"Shape {number}" for number in range(1, len(shown) + 1)] if titles is None else list(titles)
    if not shown or len(names) != len(shown):
        raise ValueError(f"{len(names)} titles for {len(shown)} shapes: give a shape, and as many titles as shapes")
    for name, shape in zip(names, shown, strict=True):
        if shape.empty:
            raise ValueError(f"{name} has no faces to show; draw it from another seed")
    packed = [{"title": name, **_packed(shape)} for name, shape in zip(names, shown, strict=True)]
    # In a script element only "</" could end it.
    data = json.dumps(packed).replace("</", "<\\/")
    heading = html.escape(names[0] if len(names) == 1 else f"{len(names)} shapes")
    return write_text(PAGE.replace("%TITLE%", heading).replace("%DATA%", data), path)


def _packed(shape: Shape) -> dict[str, object]:
    """A shape in the unit ball as little-endian numbers: positions in 16 bits, normals and colours in bytes."""
    placed = _placed(shape)
    normals = np.asarray(placed.to_trimesh().vertex_normals)
    colours = placed.colours if placed.colours is not None else np.full_like(placed.vertices, _GREY)
    parts = {
        "positions": np.round(placed.vertices * 32767).clip(-32767, 32767).astype("<i2"),
        "normals": np.round(normals * 127).clip(-127, 127).astype("i1"),
        "colours": np.round(colours * 255).astype("u1"),
        "faces": placed.faces.astype("<u4"),
    }
    encoded = {name: base64.b64encode(part.tobytes()).decode() for name, part in parts.items()}
    return {"vertices": len(placed.vertices), "triangles": len(placed.faces), **encoded}
