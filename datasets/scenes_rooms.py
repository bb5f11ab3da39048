"""Rooms full of furniture."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .scenes_layout import Light, Scene, looking
from .scenes_shapes import FURNITURE, Draw, Part, Thing, any_surface, colour
from .scenes_textures import Material


def room(draw: Draw) -> Scene:
    """A room with furniture along its walls and in the middle, seen from inside."""
    width, depth, height = draw.uniform(2.6, 7), draw.uniform(3, 10), draw.uniform(2.3, 3.4)
    shell = _shell(draw, width, depth, height)
    eye = np.array([draw.uniform(-0.35, 0.35) * width, -depth / 2 + draw.uniform(0.15, 0.8), draw.uniform(0.7, 1.9)])
    heading = -np.arctan2(eye[0], depth) * draw.uniform(0, 1.5) + draw.normal(0, 0.25)
    placed: list[tuple[float, float, float]] = [(eye[0], eye[1], 0.7)]
    parts = list(shell.parts)
    for _ in range(draw.integers(4, 16)):
        thing = FURNITURE[draw.integers(len(FURNITURE))](draw)
        if thing.height < height:
            parts += _stand(draw, thing, width, depth, placed)
    lights = [_lamp(draw, width, depth, height) for _ in range(draw.integers(1, 4))]
    for light in lights:
        bulb = Material("plain", (1, 0.95, 0.85), glow=2.0)
        x, y, z = (float(v) for v in light.place)
        parts += Thing().tube(0.14, 0.05, (x, y, z + 0.2), bulb).parts
    ambient = draw.uniform(0.15, 0.6) * _tint(draw, 0.08)
    look = looking(heading, draw.normal(0.12, 0.13), draw.normal(0, 0.03))
    fov = np.radians(draw.uniform(48, 85))
    return Scene(parts, lights, ambient, eye, look, fov, False, 1.2, 0.0)


def _tint(draw: Draw, spread: float) -> np.ndarray:
    tint: np.ndarray = 1 + draw.uniform(-spread, spread, 3)
    return tint


def _lamp(draw: Draw, width: float, depth: float, height: float) -> Light:
    place = np.array([draw.uniform(-0.4, 0.4) * width, draw.uniform(-0.4, 0.45) * depth, height - 0.25])
    warm = np.array([1.0, 0.85, 0.65]) if draw.random() < 0.5 else np.array([0.95, 1.0, 1.05])
    return Light(place, warm * draw.uniform(1, 5), draw.uniform(0.01, 0.12))


@dataclass(frozen=True)
class _Wall:
    """A wall's middle and outward direction, seen from above; it runs along x, or along y."""

    x: float
    y: float
    outward: tuple[float, float]
    length: float

    def put(
        self, shell: Thing, material: Material, place: float, bottom: float, size: tuple[float, float, float]
    ) -> None:
        """A panel of (width, height, thickness) ``place`` metres along the wall; what is thicker stands out further."""
        wide, tall, thick = size
        across = self.outward[0] == 0
        x, y = (self.x + place, self.y) if across else (self.x, self.y + place)
        inward = thick / 2 - 0.001
        at = (x - self.outward[0] * inward, y - self.outward[1] * inward, bottom)
        shell.box((wide, thick, tall) if across else (thick, wide, tall), at, material)


def _shell(draw: Draw, width: float, depth: float, height: float) -> Thing:
    """Floor, ceiling and four walls with windows, doors, pictures and a rug."""
    floor = any_surface(draw, "wood", "tiles", "mottled", "grain", "stripes", size=(0.15, 0.8))
    ceiling = replace(any_surface(draw, "plain", "mottled"), colour=colour(draw, 0.1))
    paper = any_surface(draw, "plain", "plain", "mottled", "stripes", "bricks", "tiles", "grain", size=(0.15, 0.9))
    shell = Thing().box((width + 2, depth + 2, 0.1), (0, 0, -0.1), floor)
    shell.box((width + 2, depth + 2, 0.1), (0, 0, height), ceiling)
    skirting = any_surface(draw, "plain", "wood", vivid=0.2)
    for wall in (
        _Wall(0, depth / 2, (0, 1), width),
        _Wall(0, -depth / 2, (0, -1), width),
        _Wall(-width / 2, 0, (-1, 0), depth),
        _Wall(width / 2, 0, (1, 0), depth),
    ):
        surface = paper if draw.random() < 0.75 else any_surface(draw, "plain", "bricks", "wood", "mottled")
        wall.put(shell, surface, 0, 0, (wall.length + 0.2, height, 0.1))
        if draw.random() < 0.7:
            wall.put(shell, skirting, 0, 0, (wall.length, 0.1, 0.13))
        for spot in (-0.3, 0.0, 0.3):
            _on_the_wall(draw, shell, wall, spot * wall.length, height)
    if draw.random() < 0.5:
        rug = any_surface(draw, "stripes", "tiles", "mottled", size=(0.1, 0.5), vivid=0.8)
        at = (draw.uniform(-0.2, 0.2) * width, draw.uniform(-0.2, 0.3) * depth, 0)
        shell.box((width * draw.uniform(0.3, 0.7), depth * draw.uniform(0.2, 0.5), 0.015), at, rug)
    return shell


def _on_the_wall(draw: Draw, shell: Thing, wall: _Wall, spot: float, height: float) -> None:
    """A window, a door, a picture or nothing."""
    kind, plain = draw.random(), any_surface(draw, "plain", vivid=0.2)
    if kind < 0.15:
        wide, tall = draw.uniform(0.6, 1.0), draw.uniform(0.8, 1.3)
        daylight = Material("mottled", (0.7, 0.85, 1.0), (1, 1, 1), 2.0, glow=1.5)
        wall.put(shell, plain, spot, 0.75, (wide + 0.16, tall + 0.16, 0.14))
        wall.put(shell, daylight, spot, 0.83, (wide, tall, 0.16))
    elif kind < 0.25:
        wall.put(shell, any_surface(draw, "wood", "plain"), spot, 0, (0.85, min(2.0, height - 0.1), 0.15))
    elif kind < 0.55:
        tall = draw.uniform(0.3, 0.9)
        wide = tall * draw.uniform(0.7, 1.5)
        wall.put(shell, plain, spot, 1.2, (wide + 0.08, tall + 0.08, 0.14))
        wall.put(shell, any_surface(draw, "picture", "picture", "mottled"), spot, 1.24, (wide, tall, 0.15))


def _stand(
    draw: Draw, thing: Thing, width: float, depth: float, placed: list[tuple[float, float, float]]
) -> list[Part]:
    """Stand a thing where it touches nothing, or leave it out."""
    radius = thing.radius
    for _ in range(12):
        against = draw.integers(4) if draw.random() < 0.6 else None
        turn = draw.uniform(0, 2 * np.pi) if against is None else against * np.pi / 2
        moved = thing.moved(turn, (0, 0, 0))
        low = np.min([part.vertices.min(0) for part in moved.parts], axis=0)
        high = np.max([part.vertices.max(0) for part in moved.parts], axis=0)
        room_x, room_y = (-width / 2 - low[0], width / 2 - high[0]), (-depth / 2 - low[1], depth / 2 - high[1])
        if room_x[0] >= room_x[1] or room_y[0] >= room_y[1]:
            return []
        x, y = draw.uniform(*room_x), draw.uniform(*room_y)
        if against is not None:  # makers put the back to positive y
            x, y = [(x, room_y[1]), (room_x[0], y), (x, room_y[0]), (room_x[1], y)][against]
        middle = 0.75 * radius
        if all(np.hypot(x - px, y - py) > middle + pr for px, py, pr in placed):
            placed.append((x, y, middle))
            return moved.moved(0, (x, y, 0)).parts
    return []
