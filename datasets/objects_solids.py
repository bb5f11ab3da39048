"""Solids of one colour each that are put together to objects: a thin layer over manifold3d.

Coordinates: z is up; an object's own units are free, as it is normalised when it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from .shapes_files import Mesh

Point = tuple[float, float, float]
Draw = np.random.Generator
SEGMENTS = 32
"""Edges of a circle."""


def box(size: Point, at: Point = (0, 0, 0)) -> Any:
    """A box whose bottom's middle stands at ``at``."""
    from manifold3d import Manifold

    return Manifold.cube(size, True).translate((at[0], at[1], at[2] + size[2] / 2))


def tube(radius: float, height: float, at: Point = (0, 0, 0), top: float | None = None, sides: int = SEGMENTS) -> Any:
    """An upright cylinder, or a cone cut off at the radius ``top``, whose bottom's middle stands at ``at``."""
    from manifold3d import Manifold

    return Manifold.cylinder(height, radius, radius if top is None else top, sides).translate(at)


def ball(radius: float, at: Point = (0, 0, 0), stretch: Point = (1, 1, 1)) -> Any:
    """A ball around ``at``, or an ellipsoid with the half axes ``radius`` times ``stretch``."""
    from manifold3d import Manifold

    return Manifold.sphere(radius, SEGMENTS).scale(stretch).translate(at)


def rod(start: Point, end: Point, radius: float, thin: float | None = None, sides: int = 16) -> Any:
    """A straight rod between two points, of the radius ``thin`` at its end."""
    from manifold3d import Manifold

    a, b = np.array(start, float), np.array(end, float)
    length = float(np.linalg.norm(b - a))
    x, y, z = (b - a) / length
    tilt, turn = np.degrees(np.arccos(np.clip(z, -1, 1))), np.degrees(np.arctan2(y, x))
    straight = Manifold.cylinder(length, radius, radius if thin is None else thin, sides)
    return straight.rotate((0, tilt, turn)).translate(start)


def bar(start: Point, end: Point, width: float, thickness: float) -> Any:
    """A straight bar of rectangular section between two points of one x-z plane or vertical."""
    from manifold3d import Manifold

    a, b = np.array(start, float), np.array(end, float)
    length = float(np.linalg.norm(b - a))
    x, y, z = (b - a) / length
    tilt, turn = np.degrees(np.arccos(np.clip(z, -1, 1))), np.degrees(np.arctan2(y, x))
    straight = Manifold.cube((thickness, width, length), True).translate((0, 0, length / 2))
    return straight.rotate((0, tilt, turn)).translate(start)


def turned(profile: Sequence[tuple[float, float]], sides: int = 48) -> Any:
    """A solid of revolution about z.

    Args:
        profile: (radius, height) of the outline, beginning and ending at the axis or closed by itself.
    """
    from manifold3d import CrossSection, FillRule

    return CrossSection([np.array(profile, float)], FillRule.NonZero).revolve(sides)


def extruded(outline: Sequence[tuple[float, float]], height: float, top: float = 1.0) -> Any:
    """An outline in the x-y plane drawn up to ``height``, scaled by ``top`` there."""
    from manifold3d import CrossSection, FillRule

    return CrossSection([np.array(outline, float)], FillRule.NonZero).extrude(height, scale_top=(top, top))


def path(points: Sequence[Point], radii: Sequence[float] | float, sides: int = 14) -> Any:
    """A bent rod through points: hulls of balls, one after the other."""
    from manifold3d import Manifold, OpType

    sizes = [radii] * len(points) if isinstance(radii, int | float) else list(radii)
    balls = [Manifold.sphere(size, sides).translate(point) for point, size in zip(points, sizes, strict=True)]
    links = [Manifold.batch_hull(pair) for pair in pairwise(balls)]
    return Manifold.batch_boolean(links, OpType.Add)


def smooth(heights: Sequence[float], radii: Sequence[float], count: int = 24) -> list[tuple[float, float]]:
    """(radius, height) along a smooth curve that keeps between neighbouring radii (PCHIP)."""
    from scipy.interpolate import PchipInterpolator

    z = np.linspace(heights[0], heights[-1], count)
    return [(max(float(r), 1e-3), float(h)) for r, h in zip(PchipInterpolator(heights, radii)(z), z, strict=True)]


def hollow(outer: Sequence[tuple[float, float]], wall: float, floor: float) -> Any:
    """A vessel open at the top: an outline (radius, height) from bottom to top, with walls and a floor of thickness."""
    inner = [(max(radius - wall, 1e-3), height) for radius, height in outer if height > outer[0][1] + floor]
    bottom = outer[0][1] + floor
    start = float(np.interp(bottom, [h for _, h in outer], [r for r, _ in outer])) - wall
    profile = [(0.0, outer[0][1]), *outer, *reversed(inner), (max(start, 1e-3), bottom), (0.0, bottom)]
    return turned(profile)


@dataclass
class Assembly:
    """Solids of different colours; the later ones take the place of earlier ones where they overlap.

    Attributes:
        told: what an object has, by the name of the feature: "a back of slats"; empty: it has none.
    """

    parts: list[tuple[Any, tuple[int, int, int]]] = field(default_factory=list)
    told: dict[str, str] = field(default_factory=dict)

    def add(self, solid: Any, colour: tuple[int, int, int]) -> Assembly:
        self.parts.append((solid, colour))
        return self

    def tell(self, feature: str, phrase: str) -> Assembly:
        self.told[feature] = phrase
        return self

    def mesh(self) -> Mesh:
        """The union as one closed mesh with the parts' colours.

        Raises:
            ValueError: a part is no solid.
        """
        from manifold3d import Error, Manifold, OpType

        marked = [solid.as_original() for solid, _ in self.parts]
        if wrong := [solid.status() for solid in marked if solid.status() != Error.NoError or solid.is_empty()]:
            raise ValueError(f"a part is no solid: {wrong[0]}")
        colour_of = {solid.original_id(): colour for solid, (_, colour) in zip(marked, self.parts, strict=True)}
        made = Manifold.batch_boolean(marked, OpType.Add).to_mesh()
        runs = np.asarray(made.run_index) // 3
        colours = np.zeros((len(made.tri_verts), 3), np.uint8)
        for owner, (first, last) in zip(made.run_original_id, pairwise(runs), strict=True):
            colours[first:last] = colour_of[int(owner)]
        vertices = np.asarray(made.vert_properties, np.float64)[:, :3]
        faces = np.asarray(made.tri_verts, np.int64)
        # Where runs meet, vertices are there for both.
        same = np.arange(len(vertices))
        same[np.asarray(made.merge_from_vert, np.int64)] = np.asarray(made.merge_to_vert, np.int64)
        merged = Mesh(vertices, same[faces], colours)
        return merged.select(np.arange(len(faces)))


def tint(draw: Draw, kind: str = "any") -> tuple[int, int, int]:
    """A colour: of wood, metal, glass, ceramic, or any."""
    from colorsys import hsv_to_rgb

    low, high = {
        "wood": ((0.05, 0.35, 0.35), (0.10, 0.7, 0.75)),
        "metal": ((0.55, 0.0, 0.35), (0.65, 0.12, 0.8)),
        "glass": ((0.25, 0.15, 0.5), (0.6, 0.5, 0.9)),
        "ceramic": ((0.0, 0.0, 0.75), (1.0, 0.25, 1.0)),
        "any": ((0.0, 0.3, 0.45), (1.0, 0.85, 0.95)),
    }[kind]
    red, green, blue = (round(255 * float(value)) for value in hsv_to_rgb(*draw.uniform(low, high)))
    return red, green, blue
