"""Synthetic rooms and streets: a picture, its exact depth and its camera, in any number, from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .scenes_layout import Scene
from .scenes_render import Renderer
from .scenes_rooms import room
from .scenes_streets import street

LAYOUTS: dict[str, Callable[[np.random.Generator], Scene]] = {"room": room, "street": street}
"""Kinds of scenes: a generator of random numbers -> a scene."""


@dataclass(frozen=True)
class SceneSettings:
    """What scenes are made.

    Attributes:
        height, width: pixels.
        seed: scene i of a seed is always the same, however many there are and wherever it is made.
        streets: share of streets in [0, 1]; the others are rooms.
    """

    height: int = 96
    width: int = 128
    seed: int = 0
    streets: float = 0.3

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 8 or self.seed < 0 or not 0 <= self.streets <= 1:
            raise ValueError(
                f"scenes of {self.width} x {self.height} pixels, seed {self.seed}, {self.streets} of them streets; "
                "expected at least 8 x 8, a seed of 0 or more and a share from 0 to 1"
            )


@dataclass(frozen=True)
class SceneSample:
    """One scene.

    Attributes:
        image: uint8 (height, width, 3) RGB.
        depth: float32 (height, width), metres along the camera's axis at the pixels' centres; 0 where there is sky.
        intrinsics: float32 (3, 3), pixel centres at whole numbers.
        kind: "room" or "street".
    """

    image: np.ndarray
    depth: np.ndarray
    intrinsics: np.ndarray
    kind: str


def make_scene(settings: SceneSettings, index: int) -> SceneSample:
    """Scene number ``index`` of these settings."""
    draw = np.random.default_rng([settings.seed, index])
    kind = "street" if draw.random() < settings.streets else "room"
    height, width = settings.height, settings.width
    for _ in range(20):
        renderer = Renderer(LAYOUTS[kind](draw))
        depth = renderer.depth(height, width)
        if _worth_looking_at(depth):
            break
    return SceneSample(renderer.picture(height, width, draw), depth, renderer.intrinsics(height, width), kind)


def _worth_looking_at(depth: np.ndarray) -> bool:
    """Not with the camera inside a thing, or before one that fills the picture, or at little but sky."""
    known = depth[depth > 0]
    if known.size < 0.5 * depth.size:
        return False
    near, far = np.quantile(known, [0.1, 0.9])
    return bool(near > 0.4 and far > 1.3 * near)
