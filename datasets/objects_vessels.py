"""Cups, bottles, vases and teapots of random outlines."""

from __future__ import annotations

import math

from .objects_solids import Assembly, Draw, Point, ball, hollow, path, smooth, tint, tube, turned


def cup(draw: Draw) -> Assembly:
    """A vessel about as high as wide, with a handle."""
    glaze = tint(draw, str(draw.choice(["ceramic", "any"])))
    height, top = draw.uniform(0.75, 1.15), draw.uniform(0.4, 0.55)
    foot, middle = top * draw.uniform(0.6, 1.0), top * draw.uniform(0.85, 1.08)
    wall = draw.uniform(0.05, 0.08)
    outer = smooth((0, height / 2, height), (foot, middle, top))
    body = hollow(outer, wall, wall * 1.3)
    reach, thick = draw.uniform(0.2, 0.32), draw.uniform(0.05, 0.07)
    low, high = height * draw.uniform(0.18, 0.3), height * draw.uniform(0.68, 0.85)
    points: list[Point] = []
    for i in range(10):
        angle = math.pi * (i / 9 - 0.5)
        z = (low + high) / 2 + (high - low) / 2 * math.sin(angle)
        side = float(_radius(outer, z)) - wall / 2
        points.append((side + reach * math.cos(angle), 0, z))
    handle = path(points, thick) - turned([(0, 0.02), *((r, z) for r, z in outer), (0, height)])
    thing = Assembly().add(body, glaze).add(handle, tint(draw, "any") if draw.random() < 0.3 else glaze)
    thing.tell("saucer", "")
    if draw.random() < 0.35:
        thing.tell("saucer", "a saucer")
        saucer = smooth((0, 0.04, 0.11), (top * 0.8, top * 1.2, top * 1.55), 10)
        thing.add(hollow([(r, z - 0.07) for r, z in saucer], 0.12, 0.09), glaze)
    return thing


def _radius(outline: list[tuple[float, float]], height: float) -> float:
    import numpy as np

    return float(np.interp(height, [z for _, z in outline], [r for r, _ in outline]))


def bottle(draw: Draw) -> Assembly:
    """A body, a shoulder and a slender neck with a lip or a cap, sometimes a label."""
    glass = tint(draw, str(draw.choice(["glass", "any"])))
    body, neck = draw.uniform(0.2, 0.3), draw.uniform(0.07, 0.1)
    shoulder, narrow, height = draw.uniform(0.75, 1.05), draw.uniform(1.15, 1.3), draw.uniform(1.55, 1.85)
    waist = body * draw.uniform(0.85, 1.0)
    outline = [(0.0, 0.0), (body * 0.9, 0.0), (body, 0.05)]
    outline += smooth((0.06, shoulder * 0.5, shoulder), (body, waist, body), 14)
    outline += smooth((shoulder + 0.01, (shoulder + narrow) / 2, narrow), (body, (body + neck) / 2, neck), 14)
    outline += [(neck, height), (0.0, height)]
    thing = Assembly().add(turned(outline), glass)
    thing.tell("cap", "an open neck").tell("label", "")
    if draw.random() < 0.6:
        thing.tell("cap", "a cap")
        cap = draw.uniform(0.09, 0.16)
        thing.add(tube(neck + 0.025, cap, (0, 0, height - cap * 0.6)), tint(draw, "any"))
    else:
        thing.add(tube(neck + 0.03, 0.06, (0, 0, height - 0.08)), glass)
        thing.parts[0] = (thing.parts[0][0] - tube(neck * 0.6, 0.2, (0, 0, height - 0.15)), glass)
        thing.parts[1] = (thing.parts[1][0] - tube(neck * 0.6, 0.2, (0, 0, height - 0.15)), glass)
    if draw.random() < 0.6:
        low, high = shoulder * 0.2, shoulder * 0.8
        thing.tell("label", "a label")
        thing.add(tube(body + 0.012, high - low, (0, 0, low)), tint(draw, "ceramic"))
    return thing


def vase(draw: Draw) -> Assembly:
    """A tall vessel with a belly, a narrower neck and a flared lip, sometimes with two handles or ribs."""
    glaze = tint(draw, str(draw.choice(["ceramic", "any"])))
    height, foot = draw.uniform(1.2, 1.7), draw.uniform(0.18, 0.28)
    belly, neck = draw.uniform(0.38, 0.58), draw.uniform(0.15, 0.26)
    middle, top = height * draw.uniform(0.35, 0.5), height * draw.uniform(0.74, 0.86)
    lip = neck * draw.uniform(1.25, 1.8)
    outer = smooth((0, middle, top, height), (foot, belly, neck, lip), 32)
    body = hollow(outer, 0.06, 0.09)
    thing = Assembly()
    kind = draw.random()
    thing.tell("side", "ribs" if kind < 0.25 else "two handles" if kind > 0.65 else "a smooth side")
    if kind < 0.25:
        ribs = int(draw.integers(8, 15))
        whole = turned([(0, 0), *outer, (0, height)])
        for i in range(ribs):
            angle = 2 * math.pi * i / ribs
            turned_by = [(r * math.cos(angle), r * math.sin(angle), z) for r, z in outer[2:-8:3]]
            body = body + (path(turned_by, 0.035, 8) - whole)
    thing.add(body, glaze)
    if kind > 0.65:
        for side in (-1, 1):
            start, low = _radius(outer, top), _radius(outer, middle * 1.25)
            out = belly * draw.uniform(0.95, 1.1)
            points: list[Point] = [
                (side * (start + 0.02), 0, top),
                (side * out * 0.8, 0, top + 0.08),
                (side * out, 0, (top * 2 + middle) / 3),
                (side * (low - 0.02), 0, middle * 1.25),
            ]
            thing.add(path(points, 0.045) - turned([(0, 0), *((r - 0.02, z) for r, z in outer), (0, height)]), glaze)
    return thing


def teapot(draw: Draw) -> Assembly:
    """A round body with a lid and its knob, a spout and a handle."""
    glaze = tint(draw, str(draw.choice(["ceramic", "any"])))
    wide, tall = draw.uniform(0.5, 0.62), draw.uniform(0.42, 0.58)
    thing = Assembly().add(ball(1, (0, 0, tall), (wide, wide, tall)), glaze)
    thing.add(tube(wide * 0.6, tall * 0.3, (0, 0, 0)), glaze)
    lid, second = 2 * tall - 0.06, tint(draw, "any") if draw.random() < 0.5 else glaze
    thing.add(ball(1, (0, 0, lid), (wide * 0.55, wide * 0.55, 0.12)), second).add(
        ball(0.08, (0, 0, lid + 0.16)), second
    )
    rise = draw.uniform(0.85, 1.1)
    spout: list[Point] = [
        (wide * 0.7, 0, tall * 0.7),
        (wide * 1.15, 0, tall * 0.95),
        (wide * 1.3, 0, tall * 1.3),
        (wide * 1.3 + 0.16, 0, tall * 1.6 * rise),
    ]
    thing.add(path(spout, [0.16, 0.12, 0.085, 0.07]), glaze)
    high, reach = draw.uniform(1.3, 1.5), draw.uniform(0.32, 0.45)
    handle: list[Point] = []
    for i in range(9):
        angle = math.pi * (0.5 + i / 8)
        z = tall + tall * 0.55 * math.sin(angle) * high / 1.4
        handle.append((-wide * 0.8 + (reach + 0.1) * math.cos(angle), 0, z))
    thing.tell("body", "a tall body" if tall > 0.95 * wide else "a flat body" if tall < 0.8 * wide else "a round body")
    return thing.add(path(handle, 0.06), second)
