"""What a scene consists of: parts, lights, and a camera in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scenes_shapes import Part


@dataclass(frozen=True)
class Light:
    """A lamp at a place, or (``sun``) from a direction; ``size`` in metres softens its shadows."""

    place: np.ndarray
    colour: np.ndarray
    size: float = 0.1
    sun: bool = False


@dataclass(frozen=True)
class Scene:
    """Everything a picture is made from.

    Attributes:
        eye: where the camera is. look: (3, 3), rows are its right, down and forward axes.
        fov_x: horizontal angle of view, radians.
        ambient: linear RGB of the light that comes from everywhere.
        sky: whether rays that meet nothing see a sky.
        shade_reach: metres within which surfaces keep ambient light off each other.
        haze: share of light lost per metre.
    """

    parts: list[Part]
    lights: list[Light]
    ambient: np.ndarray
    eye: np.ndarray
    look: np.ndarray
    fov_x: float
    sky: bool
    shade_reach: float
    haze: float


def looking(heading: float, pitch: float, roll: float) -> np.ndarray:
    """Rows right, down, forward; heading 0 looks along y, positive pitch looks down."""
    forward = np.array(
        [np.sin(heading) * np.cos(pitch), np.cos(heading) * np.cos(pitch), -np.sin(pitch)],
    )
    right = np.array([np.cos(heading), -np.sin(heading), 0.0])
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    return np.stack([c * right + s * down, c * down - s * right, forward])
