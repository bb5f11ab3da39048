"""Streets between buildings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .scenes_layout import Light, Scene, looking
from .scenes_shapes import Draw, Part, Thing, any_surface, ball, colour, crumpled
from .scenes_textures import Material


def street(draw: Draw) -> Scene:
    """A street between buildings with vehicles, trees, poles and people, under the sky."""
    road, walk = draw.uniform(5, 11), draw.uniform(1.5, 4)
    thing = Thing().box((300, 400, 1), (0, 150, -1), any_surface(draw, "grain", "mottled", size=(0.5, 3), vivid=0.15))
    asphalt = replace(any_surface(draw, "grain", size=(0.5, 2)), colour=(0.12, 0.12, 0.13))
    thing.box((road, 400, 0.02), (0, 150, 0), asphalt)
    paint = Material("plain", (0.7, 0.7, 0.65))
    for step in range(40):
        thing.box((0.15, 2, 0.01), (0, -10 + 5.0 * step, 0.02), paint)
    paving = any_surface(draw, "tiles", "grain", "bricks", size=(0.4, 1.5), vivid=0.1)
    parts = list(thing.parts)
    for side in (-1, 1):
        pavement = Thing().box((walk, 400, 0.15), (side * (road + walk) / 2, 150, 0), paving)
        parts += pavement.parts
        parts += _row_of_buildings(draw, side, road / 2 + walk)
        parts += _along_the_street(draw, side, road, walk)
    if draw.random() < 0.6:  # the street ends
        wide, tall = draw.uniform(15, 40), draw.uniform(8, 30)
        parts += building(draw, wide, 12, tall).moved(0, (0, draw.uniform(50, 110), 0)).parts
    eye = np.array([draw.uniform(-0.45, 0.45) * (road + walk), draw.uniform(-3, 3), draw.uniform(1.3, 2.2)])
    heading, height = draw.uniform(-1.4, 1.4), draw.uniform(0.25, 1.3)
    toward = np.array([np.sin(heading) * np.cos(height), np.cos(heading) * np.cos(height), np.sin(height)])
    sun = Light(toward, np.array([1.0, 0.95, 0.85]) * draw.uniform(0.2, 3), 0.02, True)
    ambient = np.array([0.8, 0.92, 1.1]) * draw.uniform(0.4, 0.9)
    look = looking(draw.normal(0, 0.22), draw.normal(0.02, 0.06), draw.normal(0, 0.02))
    return Scene(parts, [sun], ambient, eye, look, np.radians(draw.uniform(50, 90)), True, 3.0, draw.uniform(0, 0.008))


def building(draw: Draw, width: float, depth: float, height: float) -> Thing:
    """A block with a facade, a base, a cornice and perhaps a roof; its front faces negative y."""
    from trimesh.creation import cone

    front = any_surface(draw, "facade", "facade", "facade", "bricks", size=(1.8, 3.6), vivid=0.4)
    front = replace(front, other=(0.06, 0.08, 0.11))
    thing = Thing().box((width, depth, height), (0, 0, 0), front)
    base = any_surface(draw, "plain", "bricks", "grain")
    thing.box((width + 0.2, depth + 0.2, draw.uniform(0.4, 3.2)), (0, 0, 0), base)
    trim = any_surface(draw, "plain", vivid=0.2)
    thing.box((width + 0.5, depth + 0.5, 0.4), (0, 0, height), trim)
    for step in range(int(width // 3)):
        if draw.random() < 0.4:
            spot = ((step + 0.5) * 3 - width / 2, -depth / 2 - 0.5, draw.uniform(3, max(height - 2, 3.1)))
            thing.box((2.0, 1.0, 0.9), spot, trim)
    if draw.random() < 0.3:
        roof = cone(0.72 * max(width, depth), draw.uniform(2, 5), sections=4)
        thing.add(roof, any_surface(draw, "bricks", "stripes"), (0, 0, height + 0.3), _quarter())
    return thing


def _quarter() -> np.ndarray:
    c = np.sqrt(0.5)
    return np.array([[c, -c, 0], [c, c, 0], [0, 0, 1]])


def _row_of_buildings(draw: Draw, side: int, away: float) -> list[Part]:
    parts: list[Part] = []
    place = draw.uniform(-15, -8)
    while place < 90:
        width, depth, height = draw.uniform(6, 20), draw.uniform(8, 15), draw.uniform(4, 25)
        if draw.random() < 0.85:
            middle = side * (away + depth / 2 + draw.uniform(0, 2))
            block = building(draw, width, depth, height)
            parts += block.moved(-side * np.pi / 2, (middle, place + width / 2, 0)).parts
        place += width + draw.choice([0.0, 0.0, 2.0, 8.0])
    return parts


def _along_the_street(draw: Draw, side: int, road: float, walk: float) -> list[Part]:
    parts: list[Part] = []
    place = draw.uniform(3, 8)
    while place < 75:
        kind = draw.random()
        kerb = side * (road / 2 + draw.uniform(0.3, 0.6))
        if kind < 0.5:
            lane = side * (road / 2 - draw.uniform(1.0, 1.3))
            parts += vehicle(draw).moved(draw.normal(0, 0.03), (lane, place, 0.02)).parts
            place += 3
        elif kind < 0.7:
            parts += tree(draw).moved(draw.uniform(0, 6), (kerb, place, 0.1)).parts
        elif kind < 0.85:
            parts += Thing().tube(0.07, draw.uniform(3, 7), (kerb, place, 0), any_surface(draw, "plain")).parts
        else:
            parts += person(draw).moved(draw.uniform(0, 6), (side * (road / 2 + walk * 0.6), place, 0.15)).parts
        place += draw.exponential(4) + 1
    return parts


def vehicle(draw: Draw) -> Thing:
    """A car or a van, along y."""
    paint = Material("plain", colour(draw, 0.9), gloss=0.8)
    glass, black = Material("plain", (0.03, 0.04, 0.05), gloss=1.0), Material("plain", (0.02, 0.02, 0.02))
    length, width = draw.uniform(3.6, 5.5), draw.uniform(1.6, 2.0)
    body, cabin = draw.uniform(0.5, 0.8), draw.uniform(0.45, 1.3)
    share = draw.uniform(0.5, 0.95)
    thing = Thing().box((width, length, body), (0, 0, 0.3), paint)
    thing.box((width * 0.88, length * share, cabin * 0.75), (0, -0.03 * length, 0.3 + body), glass)
    roof = 0.3 + body + cabin * 0.75
    thing.box((width * 0.86, length * share * 0.85, cabin * 0.25), (0, -0.03 * length, roof), paint)
    for x in (-1, 1):
        for y in (-0.32, 0.32):
            _wheel(thing, (x * width / 2 * 0.95, y * length, 0.33), black)
    return thing


def _wheel(thing: Thing, at: tuple[float, float, float], material: Material) -> None:
    from trimesh.creation import cylinder

    lying = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    thing.add(cylinder(0.33, 0.22, sections=18), material, at, lying)


def tree(draw: Draw) -> Thing:
    trunk = draw.uniform(1.5, 3)
    bark = Material("wood", (0.12, 0.08, 0.05), (0.2, 0.15, 0.1), 0.3)
    leaves = Material("mottled", (0.04, 0.13, 0.03), (0.2, 0.35, 0.08), 0.4, image=int(draw.integers(100)))
    thing = Thing().tube(draw.uniform(0.1, 0.25), trunk, (0, 0, 0), bark)
    for _ in range(draw.integers(2, 6)):
        spot = (draw.uniform(-0.8, 0.8), draw.uniform(-0.8, 0.8), trunk + draw.uniform(0, 2))
        thing.add(crumpled(draw, draw.uniform(0.6, 1.5), 3), leaves, spot)
    return thing


def person(draw: Draw) -> Thing:
    tall = draw.uniform(0.9, 1.1)
    skin = Material("plain", (0.5 * tall, 0.33, 0.25))
    thing = Thing().tube(0.11, 0.85 * tall, (-0.1, 0, 0), trousers := any_surface(draw, "plain"))
    thing.tube(0.11, 0.85 * tall, (0.1, 0, 0), trousers)
    thing.box((0.46, 0.26, 0.62 * tall), (0, 0, 0.83 * tall), any_surface(draw, "plain", "stripes", size=(0.05, 0.2)))
    return thing.add(ball(2), skin, (0, 0, 1.6 * tall), size=(0.12, 0.12, 0.12))
