"""Hammers, spoons, screwdrivers and wrenches of random proportions, standing on their handles."""

from __future__ import annotations

import math
from typing import Any

from .objects_solids import Assembly, Draw, ball, box, extruded, path, smooth, tint, tube, turned


def hammer(draw: Draw) -> Assembly:
    """A handle, and a head with a face at one end and a claw, a wedge or another face at the other."""
    wood, steel = tint(draw, str(draw.choice(["wood", "any"]))), tint(draw, "metal")
    length, grip = draw.uniform(1.5, 1.9), draw.uniform(0.065, 0.09)
    handle = turned([(0, 0), *smooth((0, 0.3, 0.9, length), (grip, grip * 1.1, grip * 0.75, grip * 0.85)), (0, length)])
    thing = Assembly().add(handle.scale((1, 0.8, 1)), wood)
    top, high = length - 0.12, draw.uniform(0.1, 0.14)
    thing.add(box((0.3, 2 * high * 0.9, 2 * high), (0, 0, top - high)), steel)
    face, reach = draw.uniform(0.12, 0.17), draw.uniform(0.3, 0.42)
    neck = tube(high * 0.8, reach, (0, 0, 0)) + tube(face, 0.13, (0, 0, reach - 0.08))
    thing.add(neck.rotate((0, 90, 0)).translate((0.05, 0, top)), steel)
    kind = draw.random()
    thing.tell("back", "a claw" if kind < 0.5 else "a wedge" if kind < 0.75 else "two faces")
    if kind < 0.5:
        curve = draw.uniform(0.15, 0.28)
        for side in (-1, 1):
            points = [
                (-0.1 - 0.5 * share, side * (0.03 + 0.07 * share), top - curve * share**2)
                for share in (0.0, 0.25, 0.5, 0.75, 1.0)
            ]
            thing.add(path(points, [0.1, 0.085, 0.07, 0.055, 0.04]), steel)
    elif kind < 0.75:
        wedge = extruded([(-0.12, -high), (0.12, -high), (0.12, high), (-0.12, high)], draw.uniform(0.4, 0.55), 0.25)
        thing.add(wedge.rotate((0, -90, 0)).translate((-0.05, 0, top)), steel)
    else:
        thing.add(neck.rotate((0, -90, 0)).translate((-0.05, 0, top)), steel)
    return thing


def spoon(draw: Draw) -> Assembly:
    """A hollow bowl at the end of a handle that widens."""
    material = tint(draw, str(draw.choice(["metal", "wood", "any"])))
    length = draw.uniform(1.3, 1.7)
    wide, long, deep = draw.uniform(0.24, 0.34), draw.uniform(0.36, 0.46), draw.uniform(0.13, 0.2)
    middle = length + long * 0.9
    bowl = ball(1, (0, 0, middle), (wide, deep, long)) - ball(1, (0, -0.055, middle), (wide * 0.86, deep, long * 0.88))
    bowl = bowl - box((2, 2, 3), (0, -1 + deep * 0.05, middle - 1.5))
    thick = draw.uniform(0.045, 0.065)
    bend = draw.uniform(0.02, 0.1)
    points = [
        (0.0, deep * 0.45 + bend * math.sin(math.pi * share) - 0.01, 0.05 + (length - 0.02) * share)
        for share in (0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    end = thick * draw.uniform(1.2, 2.0)
    handle = path([(x / 1.0, y, z) for x, y, z in points], [end, end * 0.9, thick, thick * 0.9, thick * 0.9, thick])
    length_told = "a long handle" if length > 1.5 else "a short handle"
    return Assembly().add(bowl + handle, material).tell("handle", length_told)


def screwdriver(draw: Draw) -> Assembly:
    """A fluted handle, a shaft, and a flat or pointed tip."""
    grip, steel = tint(draw, "any"), tint(draw, "metal")
    wide, handle = draw.uniform(0.15, 0.21), draw.uniform(0.65, 0.85)
    outline = smooth(
        (0, 0.12, handle * 0.6, handle * 0.85, handle), (wide * 0.75, wide, wide * 0.9, wide * 0.6, wide * 0.75)
    )
    body = turned([(0, 0), *outline, (0, handle)])
    flutes = int(draw.integers(5, 9))
    for i in range(flutes):
        angle = 2 * math.pi * i / flutes
        place = (wide * 1.12 * math.cos(angle), wide * 1.12 * math.sin(angle), 0.14)
        body = body - tube(wide * 0.28, handle * 0.55, place, sides=12)
    shaft, end = draw.uniform(0.05, 0.07), handle + draw.uniform(0.7, 1.0)
    thing = Assembly().add(body, grip).add(tube(shaft, end - handle, (0, 0, handle - 0.02)), steel)
    thing.tell("tip", "a pointed tip")
    if draw.random() < 0.6:
        thing.tell("tip", "a flat tip")
        flat = box((0.24, 2 * shaft, 0.22), (0, 0, end - 0.05)) ^ tube(0.12, 0.3, (0, 0, end - 0.06), 0.05)
        return thing.add(flat.scale((1.2, 0.7, 1)), steel)
    return thing.add(tube(shaft * 1.3, 0.2, (0, 0, end - 0.03), 0.025, 8), steel)


def wrench(draw: Draw) -> Assembly:
    """A flat bar with an open jaw at one end and a ring or another jaw at the other."""
    steel = tint(draw, str(draw.choice(["metal", "any"])))
    length, thick = draw.uniform(1.2, 1.6), draw.uniform(0.12, 0.16)
    head, bar = draw.uniform(0.26, 0.34), draw.uniform(0.1, 0.14)
    made = box((2 * bar, thick * 0.8, length), (0, 0, 0))
    tilt = draw.uniform(-20, 20)

    def disc(radius: float, at: float, sides: int = 32) -> Any:
        return tube(radius, thick, (0, 0, -thick / 2), sides=sides).rotate((90, 0, 0)).translate((0, 0, at))

    def jaw(size: float) -> Any:
        slot = box((size * 0.95, 2, size * 2), (0, 0, 0))
        return slot + tube(size * 0.475, 2, (0, 0, -1)).rotate((90, 0, 0))

    made = made + disc(head, length) - jaw(head).rotate((0, tilt, 0)).translate((0, 0, length))
    small = head * draw.uniform(0.7, 0.95)
    end = "two jaws"
    if draw.random() < 0.6:
        end = "a ring"
        made = made + disc(small, 0.0) - disc(small * 0.55, 0.0, 6).scale((1, 3, 1))
    else:
        made = made + disc(small, 0.0) - jaw(small).rotate((0, 180 + tilt, 0))
    return Assembly().add(made, steel).tell("end", end)
