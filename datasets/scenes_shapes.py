"""Furniture-like and building-like meshes of random proportions, put together from simple solids.

Coordinates are metres: x to the right, y ahead, z up. Every maker returns a thing that stands on z = 0 around the
    origin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from .scenes_textures import Material


@dataclass(frozen=True)
class Part:
    """A solid with one material.

    Attributes:
        vertices: float64 (n, 3). faces: (m, 3).
        rotation, origin: (3, 3) and (3,), from the part's own frame (in which patterns lie) to the scene.
        extents: (3,) in its own frame.
    """

    vertices: np.ndarray
    faces: np.ndarray
    material: Material
    rotation: np.ndarray
    origin: np.ndarray
    extents: np.ndarray

    def moved(self, turn: float, shift: tuple[float, float, float]) -> Part:
        """Turned about the vertical axis of the scene (radians), then shifted."""
        rotation = _about_z(turn)
        offset = np.array(shift)
        return replace(
            self,
            vertices=self.vertices @ rotation.T + offset,
            rotation=rotation @ self.rotation,
            origin=rotation @ self.origin + offset,
        )


@dataclass
class Thing:
    """Parts that belong together."""

    parts: list[Part] = field(default_factory=list)

    def add(
        self,
        mesh: Any,
        material: Material,
        at: tuple[float, float, float] = (0, 0, 0),
        lean: np.ndarray | None = None,
        size: tuple[float, float, float] = (1, 1, 1),
    ) -> Thing:
        """A trimesh, stretched by ``size`` along its axes, turned by ``lean`` (3, 3), with its middle at ``at``."""
        rotation = np.eye(3) if lean is None else lean
        vertices = np.asarray(mesh.vertices, np.float64) * np.array(size)
        extents = vertices.max(0) - vertices.min(0)
        part = Part(
            vertices @ rotation.T + np.array(at),
            np.asarray(mesh.faces),
            material,
            rotation,
            np.array(at, float),
            extents,
        )
        self.parts.append(part)
        return self

    def box(self, size: tuple[float, float, float], at: tuple[float, float, float], material: Material) -> Thing:
        """A box (width, depth, height) whose bottom stands at ``at``."""
        return self.add(_solid("box"), material, (at[0], at[1], at[2] + size[2] / 2), size=size)

    def tube(self, radius: float, height: float, at: tuple[float, float, float], material: Material) -> Thing:
        """An upright cylinder whose bottom stands at ``at``."""
        middle = (at[0], at[1], at[2] + height / 2)
        return self.add(_solid("tube"), material, middle, size=(radius, radius, height))

    def moved(self, turn: float, shift: tuple[float, float, float]) -> Thing:
        return Thing([part.moved(turn, shift) for part in self.parts])

    @property
    def radius(self) -> float:
        """Of a circle about the origin that holds it, seen from above."""
        return max(float(np.hypot(part.vertices[:, 0], part.vertices[:, 1]).max()) for part in self.parts)

    @property
    def height(self) -> float:
        return max(float(part.vertices[:, 2].max()) for part in self.parts)


@cache
def _solid(kind: str) -> Any:
    """A cube of side 1, or a cylinder of radius and height 1."""
    from trimesh.creation import box, cylinder

    return box((1, 1, 1)) if kind == "box" else cylinder(1, 1, sections=20)


@cache
def ball(fineness: int) -> Any:
    """A ball of radius 1."""
    from trimesh.creation import icosphere

    return icosphere(fineness, 1.0)


def _about_z(turn: float) -> np.ndarray:
    c, s = np.cos(turn), np.sin(turn)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


Draw = np.random.Generator
Surface = Callable[[Draw], Material]


def colour(draw: Draw, vivid: float = 0.5) -> tuple[float, float, float]:
    """Linear RGB: mostly muted, now and then strong."""
    grey = draw.uniform(0.03, 0.8)
    mixed = grey + vivid * draw.uniform(0, 1.4) * (draw.choice([0.05, 0.9], 3) * draw.uniform(0.3, 1, 3) - grey)
    red, green, blue = (float(v) for v in np.clip(mixed, 0.02, 0.95))
    return red, green, blue


def any_surface(draw: Draw, *patterns: str, size: tuple[float, float] = (0.2, 1.0), vivid: float = 0.5) -> Material:
    """A material with one of the patterns."""
    return Material(
        str(draw.choice(patterns or ("plain", "mottled", "wood", "stripes"))),
        colour(draw, vivid),
        colour(draw, vivid),
        float(draw.uniform(*size)),
        gloss=float(max(0, draw.uniform(-0.4, 0.5))),
        image=int(draw.integers(100)),
        offset=(float(draw.uniform(0, 5)), float(draw.uniform(0, 5))),
    )


def table(draw: Draw) -> Thing:
    top, legs = any_surface(draw, "wood", "plain", "mottled"), any_surface(draw, "wood", "plain")
    width, depth, height = draw.uniform(0.5, 1.9), draw.uniform(0.5, 1.0), draw.uniform(0.4, 0.85)
    thing = Thing().box((width, depth, 0.04), (0, 0, height), top)
    if draw.random() < 0.25:
        return thing.tube(0.06, height, (0, 0, 0), legs).tube(0.3, 0.03, (0, 0, 0), legs)
    for x in (-1, 1):
        for y in (-1, 1):
            thing.box((0.06, 0.06, height), (x * (width / 2 - 0.06), y * (depth / 2 - 0.06), 0), legs)
    for _ in range(draw.integers(0, 4)):
        spot = (draw.uniform(-0.4, 0.4) * width, draw.uniform(-0.35, 0.35) * depth, height + 0.04)
        _small_thing(thing, draw, spot)
    return thing


def _small_thing(thing: Thing, draw: Draw, at: tuple[float, float, float]) -> None:
    material = any_surface(draw, "plain", "stripes", "mottled", "picture", size=(0.03, 0.15), vivid=0.9)
    kind = draw.integers(3)
    if kind == 0:
        thing.box((draw.uniform(0.08, 0.3), draw.uniform(0.08, 0.3), draw.uniform(0.03, 0.35)), at, material)
    elif kind == 1:
        thing.tube(draw.uniform(0.03, 0.1), draw.uniform(0.08, 0.3), at, material)
    else:
        radius = draw.uniform(0.05, 0.15)
        thing.add(ball(2), material, (at[0], at[1], at[2] + radius), size=(radius, radius, radius))


def chair(draw: Draw) -> Thing:
    seat, frame = any_surface(draw), any_surface(draw, "plain", "wood")
    side, height, back = draw.uniform(0.38, 0.5), draw.uniform(0.4, 0.5), draw.uniform(0.35, 0.6)
    thing = Thing().box((side, side, 0.05), (0, 0, height), seat)
    thing.box((side, 0.04, back), (0, side / 2, height + 0.05), seat)
    for x in (-1, 1):
        for y in (-1, 1):
            thing.box((0.04, 0.04, height), (x * (side / 2 - 0.03), y * (side / 2 - 0.03), 0), frame)
    return thing


def sofa(draw: Draw) -> Thing:
    cloth = any_surface(draw, "plain", "mottled", "stripes", size=(0.05, 0.4))
    width, depth, seat = draw.uniform(0.8, 2.3), draw.uniform(0.75, 1.0), draw.uniform(0.35, 0.48)
    thing = Thing().box((width, depth, seat), (0, 0, 0), cloth)
    thing.box((width, 0.2, draw.uniform(0.7, 0.95)), (0, depth / 2 - 0.1, 0), cloth)
    for x in (-1, 1):
        thing.box((0.16, depth, seat + 0.18), (x * (width / 2 - 0.08), 0, 0), cloth)
    for _ in range(draw.integers(0, 3)):
        pillow = any_surface(draw, "plain", "stripes", "tiles", size=(0.05, 0.2), vivid=0.9)
        thing.box((0.4, 0.15, 0.35), (draw.uniform(-0.35, 0.35) * width, depth / 2 - 0.28, seat), pillow)
    return thing


def shelf(draw: Draw) -> Thing:
    wood = any_surface(draw, "wood", "plain")
    width, depth, height = draw.uniform(0.6, 1.6), draw.uniform(0.25, 0.45), draw.uniform(0.9, 2.2)
    thing = Thing().box((width, 0.02, height), (0, depth / 2, 0), wood)
    for x in (-1, 1):
        thing.box((0.03, depth, height), (x * width / 2, 0, 0), wood)
    levels = int(draw.integers(2, 6))
    for level in range(levels + 1):
        bottom = level * (height - 0.03) / levels
        thing.box((width, depth, 0.03), (0, 0, bottom), wood)
        place, room = -width / 2 + 0.05, height / levels - 0.08
        while level < levels and place < width / 2 - 0.1 and draw.random() < 0.85:
            thick, tall = draw.uniform(0.02, 0.2), room * draw.uniform(0.4, 0.95)
            book = any_surface(draw, "plain", "stripes", "mottled", size=(0.02, 0.2), vivid=0.9)
            thing.box((thick, depth * 0.8, tall), (place + thick / 2, 0, bottom + 0.03), book)
            place += thick + draw.choice([0.005, 0.05, 0.25])
    return thing


def cabinet(draw: Draw) -> Thing:
    body = any_surface(draw, "wood", "plain", "mottled")
    width, depth, height = draw.uniform(0.4, 1.6), draw.uniform(0.35, 0.65), draw.uniform(0.4, 2.1)
    thing = Thing().box((width, depth, height), (0, 0, 0), body)
    front, knob = replace(body, colour=colour(draw)), any_surface(draw, "plain")
    columns, rows = int(draw.integers(1, 4)), int(draw.integers(1, 4))
    for i in range(columns):
        for j in range(rows):
            x, z = (i + 0.5) * width / columns - width / 2, j * height / rows
            thing.box((width / columns - 0.04, 0.02, height / rows - 0.04), (x, -depth / 2 - 0.01, z + 0.02), front)
            thing.box((0.05, 0.03, 0.03), (x, -depth / 2 - 0.03, z + height / rows / 2), knob)
    if height < 1.2 and draw.random() < 0.7:
        _small_thing(thing, draw, (draw.uniform(-0.3, 0.3) * width, 0, height))
    return thing


def bed(draw: Draw) -> Thing:
    frame, cover = any_surface(draw, "wood", "plain"), any_surface(draw, size=(0.05, 0.5))
    width, length, height = draw.uniform(0.9, 1.8), draw.uniform(1.9, 2.1), draw.uniform(0.25, 0.5)
    thing = Thing().box((width, length, height), (0, 0, 0), frame)
    thing.box((width, length * 0.75, 0.18), (0, -length * 0.12, height), cover)
    thing.box((width, 0.06, height + draw.uniform(0.3, 0.7)), (0, length / 2, 0), frame)
    thing.box((width * 0.7, 0.4, 0.14), (0, length / 2 - 0.3, height), any_surface(draw, "plain", vivid=0.2))
    return thing


def lamp(draw: Draw) -> Thing:
    from trimesh.creation import cone

    height = draw.uniform(1.1, 1.7)
    shade = replace(any_surface(draw, "plain"), colour=(0.9, 0.8, 0.6), glow=float(draw.uniform(0, 0.8)))
    thing = Thing().tube(0.15, 0.03, (0, 0, 0), any_surface(draw, "plain"))
    thing.tube(0.015, height, (0, 0, 0), any_surface(draw, "plain"))
    return thing.add(cone(draw.uniform(0.15, 0.25), 0.3, sections=20), shade, (0, 0, height))


def plant(draw: Draw) -> Thing:
    thing = Thing().tube(draw.uniform(0.12, 0.22), draw.uniform(0.2, 0.4), (0, 0, 0), any_surface(draw))
    leaves = Material("mottled", (0.05, 0.2, 0.04), (0.2, 0.4, 0.1), 0.15, image=int(draw.integers(100)))
    for _ in range(draw.integers(2, 6)):
        blob = crumpled(draw, draw.uniform(0.12, 0.28), 2)
        thing.add(blob, leaves, (draw.uniform(-0.15, 0.15), draw.uniform(-0.15, 0.15), draw.uniform(0.4, 1.0)))
    return thing


def crumpled(draw: Draw, radius: float, fineness: int = 2) -> Any:
    """A ball with an uneven surface."""
    lump = ball(fineness).copy()
    waves = draw.standard_normal((6, 3)) * 2.5
    bumps = np.sin(lump.vertices @ waves.T + draw.uniform(0, 6, 6)).mean(axis=1)
    lump.vertices = lump.vertices * (radius * (1 + 0.5 * bumps))[:, None] * draw.uniform(0.7, 1.2, 3)
    return lump


def crate(draw: Draw) -> Thing:
    """A box, a barrel or a ball."""
    material = any_surface(draw, "plain", "wood", "stripes", "mottled", "picture", vivid=0.8)
    kind, size = draw.integers(3), draw.uniform(0.2, 0.7)
    if kind == 0:
        return Thing().box((size, draw.uniform(0.2, 0.7), draw.uniform(0.2, 0.9)), (0, 0, 0), material)
    if kind == 1:
        return Thing().tube(size / 2, draw.uniform(0.3, 1.0), (0, 0, 0), material)
    return Thing().add(crumpled(draw, size / 2, 3), material, (0, 0, size / 2))


FURNITURE: tuple[Callable[[Draw], Thing], ...] = (table, chair, chair, sofa, shelf, cabinet, bed, lamp, plant, crate)
