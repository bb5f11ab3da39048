"""Chairs, tables, lamps and beds of random proportions."""

from __future__ import annotations

import math
from typing import Any

from .objects_solids import Assembly, Draw, Point, ball, bar, box, path, rod, tint, tube


def chair(draw: Draw) -> Assembly:
    """Four legs or a column, a seat, a back of a board, slats or bars, sometimes arm-rests."""
    frame, cover = tint(draw, str(draw.choice(["wood", "metal"]))), tint(draw, str(draw.choice(["wood", "any"])))
    width, depth, seat = draw.uniform(0.40, 0.56), draw.uniform(0.40, 0.54), draw.uniform(0.38, 0.5)
    thick, leg, back = draw.uniform(0.04, 0.08), draw.uniform(0.022, 0.036), draw.uniform(0.38, 0.65)
    lean = draw.uniform(0.0, 0.1)
    thing = Assembly()
    square = draw.random() < 0.6
    if draw.random() < 0.2:
        thing.tell("legs", "a column on five feet")
        thing.add(tube(leg * 1.2, seat, (0, 0, 0)), frame)
        for i in range(5):
            angle = 2 * math.pi * i / 5
            foot = (0.27 * math.cos(angle), 0.27 * math.sin(angle), 0.03)
            thing.add(rod((0, 0, 0.08), foot, 0.03, 0.02), frame)
    else:
        splay = draw.uniform(0, 0.05)
        thing.tell("legs", "four legs")
        for x in (-1, 1):
            for y in (-1, 1):
                joint = (x * (width / 2 - leg), y * (depth / 2 - leg), seat)
                foot = (joint[0] + x * splay, joint[1] + y * splay, 0.0)
                thing.add(bar(foot, joint, 2 * leg, 2 * leg) if square else rod(foot, joint, leg * 0.8, leg), frame)
        if draw.random() < 0.4:
            for x in (-1, 1):
                side = x * (width / 2 - leg + splay / 2)
                thing.add(rod((side, -depth / 2 + leg, seat / 2), (side, depth / 2 - leg, seat / 2), leg * 0.7), frame)
    thing.add(box((width, depth, thick), (0, 0, seat)), cover)
    top, rear = seat + thick + back, depth / 2 - leg
    if draw.random() < 0.45:
        thing.tell("back", "a solid back")
        thing.add(_panel(width, rear, rear + lean, seat, top, 2 * leg), cover)
    else:
        for x in (-1, 1):
            post = x * (width / 2 - leg)
            thing.add(rod((post, rear, seat), (post, rear + lean, top), leg), frame)
        if draw.random() < 0.5:
            rows = int(draw.integers(2, 5))
            thing.tell("back", "a back of slats")
            for i in range(rows):
                share = (i + 1) / rows
                high = seat + thick + back * share
                tall = back / rows * draw.uniform(0.45, 0.7)
                behind = rear + lean * share
                thing.add(_panel(width - leg, behind, behind, high - tall, high, 1.4 * leg), cover)
        else:
            columns = int(draw.integers(3, 6))
            thing.tell("back", "a back of bars")
            thing.add(_panel(width, rear + lean * 0.9, rear + lean, top - 0.08, top, 2 * leg), cover)
            for i in range(columns):
                across = (i + 0.5) * (width - 2 * leg) / columns - width / 2 + leg
                thing.add(rod((across, rear, seat), (across, rear + lean, top - 0.02), leg * 0.7), frame)
    thing.tell("arms", "")
    if draw.random() < 0.3:
        thing.tell("arms", "arm-rests")
        high = seat + thick + draw.uniform(0.17, 0.24)
        for x in (-1, 1):
            side = x * (width / 2 - leg * 0.5)
            thing.add(box((2 * leg, depth, 0.03), (side, 0, high)), frame)
            thing.add(
                rod((side, -depth / 2 + 2 * leg, seat), (side, -depth / 2 + 2 * leg, high + 0.01), leg * 0.9), frame
            )
    return thing


def _panel(width: float, low_y: float, high_y: float, low: float, high: float, thickness: float) -> Any:
    """A board across x that leans from (low_y, low) to (high_y, high)."""
    from manifold3d import Manifold

    t = thickness / 2
    corners = [
        (x, y + side, z) for x in (-width / 2, width / 2) for y, z in ((low_y, low), (high_y, high)) for side in (-t, t)
    ]
    return Manifold.hull_points(corners)


def table(draw: Draw) -> Assembly:
    """A round or rectangular top on four legs, a column, two boards or crossed legs."""
    wood, legs = (
        tint(draw, str(draw.choice(["wood", "any", "ceramic"]))),
        tint(draw, str(draw.choice(["wood", "metal"]))),
    )
    height, thick = draw.uniform(0.55, 0.8), draw.uniform(0.04, 0.07)
    thing = Assembly()
    if draw.random() < 0.4:
        radius = draw.uniform(0.38, 0.6)
        thing.tell("top", "a round top")
        thing.add(tube(radius, thick, (0, 0, height)), wood)
        width = depth = radius * 1.3
        single = draw.random() < 0.6
    else:
        width, depth = draw.uniform(0.9, 1.5), draw.uniform(0.6, 0.85)
        thing.tell("top", "a rectangular top")
        thing.add(box((width, depth, thick), (0, 0, height)), wood)
        single = False
    leg = draw.uniform(0.028, 0.045)
    if single:
        thing.tell("legs", "a column")
        thing.add(tube(leg * 1.5, height, (0, 0, 0)), legs)
        base = draw.uniform(0.22, 0.32)
        if draw.random() < 0.5:
            thing.add(tube(base, 0.05, (0, 0, 0), base * 0.8), legs)
        else:
            for i in range(4):
                angle = math.pi * (0.25 + i / 2)
                thing.add(rod((0, 0, 0.15), (base * math.cos(angle), base * math.sin(angle), 0.03), 0.04, 0.03), legs)
        return thing
    kind = draw.random()
    thing.tell("legs", "two boards as legs" if kind < 0.2 else "crossed legs" if kind > 0.85 else "four legs")
    for x in (-1, 1):
        end = x * (width / 2 - 2 * leg)
        if kind < 0.2:
            thing.add(box((2 * leg, depth * 0.8, height), (end, 0, 0)), legs)
            continue
        for y in (-1, 1):
            top: Point = (end, y * (depth / 2 - 2 * leg), height)
            foot = (top[0], -top[1], 0.0) if kind > 0.85 else (top[0], top[1], 0.0)
            thing.add(bar(foot, top, 2 * leg, 2 * leg) if kind < 0.6 else rod(foot, top, leg * 0.8, leg * 1.1), legs)
    if kind > 0.85 or draw.random() < 0.3:
        low = height * draw.uniform(0.2, 0.5) if kind <= 0.85 else height / 2
        thing.add(box((width - 4 * leg, depth * (0.7 if kind <= 0.85 else 0.06), 0.04), (0, 0, low - 0.02)), legs)
    elif draw.random() < 0.4:
        thing.add(box((width - 3 * leg, depth - 3 * leg, 0.09), (0, 0, height - 0.09)), legs)
    return thing


def lamp(draw: Draw) -> Assembly:
    """A shade above a stem on a foot, or at the end of a bent arm."""
    metal, shade = (
        tint(draw, str(draw.choice(["metal", "wood", "any"]))),
        tint(draw, str(draw.choice(["ceramic", "any"]))),
    )
    thing = Assembly()
    foot, stem = draw.uniform(0.12, 0.2), draw.uniform(0.02, 0.032)
    thing.add(tube(foot, 0.045, (0, 0, 0), foot * draw.uniform(0.75, 1.0)), metal)
    thing.tell("stem", "an upright stem")
    if draw.random() < 0.3:
        thing.tell("stem", "a bent arm")
        elbow: Point = (-draw.uniform(0.12, 0.25), 0, draw.uniform(0.35, 0.5))
        end: Point = (draw.uniform(0.15, 0.3), 0, elbow[2] + draw.uniform(0.08, 0.25))
        thing.add(path([(0, 0, 0.02), elbow, end], stem), metal).add(ball(stem * 1.5, elbow), metal)
        head = tube(draw.uniform(0.12, 0.17), draw.uniform(0.15, 0.22), (0, 0, -0.15), 0.04)
        hole = tube(0.09, 0.06, (0, 0, -0.16), 0.05)
        return thing.add((head - hole).rotate((0, draw.uniform(-40, -5), 0)).translate(end), shade)
    height = draw.uniform(0.35, 0.9)
    if draw.random() < 0.5 and height < 0.6:
        belly = draw.uniform(0.09, 0.15)
        thing.add(ball(1, (0, 0, 0.04 + height * 0.35), (belly, belly, height * 0.36)), metal)
    thing.add(tube(stem, height, (0, 0, 0)), metal)
    wide, tall = draw.uniform(0.2, 0.32), draw.uniform(0.22, 0.34)
    narrow = wide * draw.uniform(0.45, 0.95)
    outer = tube(wide, tall, (0, 0, height), narrow)
    inner = tube(wide - 0.035, tall - 0.035, (0, 0, height - 0.001), narrow - 0.035)
    return thing.add(outer - inner, shade).add(tube(stem, tall, (0, 0, height)), metal)


def bed(draw: Draw) -> Assembly:
    """A mattress on a frame with a head-board, pillows and a blanket."""
    wood, cloth = tint(draw, str(draw.choice(["wood", "any"]))), tint(draw, "any")
    width, length, high = draw.uniform(0.9, 1.6), draw.uniform(1.9, 2.1), draw.uniform(0.2, 0.38)
    thing = Assembly()
    for x in (-1, 1):
        for y in (-1, 1):
            thing.add(box((0.1, 0.1, high), (x * (width / 2 - 0.05), y * (length / 2 - 0.05), 0)), wood)
    thing.add(box((width, length, 0.14), (0, 0, high - 0.12)), wood)
    thing.add(box((width * 0.95, length * 0.96, 0.2), (0, 0, high)), tint(draw, "ceramic"))
    thing.add(box((width * 0.99, length * draw.uniform(0.5, 0.68), 0.2), (0, -length * 0.16, high + 0.03)), cloth)
    head = high + draw.uniform(0.5, 0.85)
    thing.add(box((width, 0.08, head), (0, length / 2, 0)), wood)
    thing.tell("foot", "")
    if draw.random() < 0.6:
        thing.tell("foot", "a foot-board")
        thing.add(box((width, 0.08, high + draw.uniform(0.2, 0.4)), (0, -length / 2, 0)), wood)
    pillows = 1 if width < 1.1 else 2
    thing.tell("pillows", "one pillow" if pillows == 1 else "two pillows")
    for i in range(pillows):
        across = (i + 0.5) * width / pillows - width / 2
        soft = ball(1, (across, length * 0.36, high + 0.22), (width / pillows * 0.42, 0.2, 0.11))
        thing.add(soft, tint(draw, "ceramic"))
    return thing
