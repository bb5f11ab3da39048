"""The scale lists of Infinity: fifteen aspect ratios, each at four sizes.

Eight lists are tall or square; the wide ones are the same with sides exchanged, and each smaller size is the beginning
of the largest list, so that what a model has learned of coarse scales holds at every size.
"""

from __future__ import annotations

from functools import cache

from nextscale.core.schedule import ScaleSchedule

SIZES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Scales in use, by the size's name: about how many pixels a square image has."""

PIXELS = {256: "0.06M", 512: "0.25M", 768: "0.60M", 1024: "1M"}
"""The sizes by the side of a square image."""

_TALL = {
    1.0: "1 2 4 6 8 12 16 20 24 32 40 48 64",
    1.25: "1 2 3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1 2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1 2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1 2 3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1 2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1 2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1 2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


@cache
def published() -> dict[float, ScaleSchedule]:
    """The largest list of every aspect ratio, by height / width."""
    lists: dict[float, ScaleSchedule] = {}
    for ratio, text in _TALL.items():
        lists[ratio] = tall = ScaleSchedule.parse(text)
        if ratio > 1:
            lists[int(1000 / ratio) / 1000] = ScaleSchedule.grids((scale.width, scale.height) for scale in tall.scales)
    return lists


def nearest_ratio(height_by_width: float) -> float:
    """The published aspect ratio closest to a wanted one, by the difference of height / width."""
    return min(published(), key=lambda ratio: abs(ratio - height_by_width))


def schedule_of(height_by_width: float, size: str | int = "1M") -> ScaleSchedule:
    """The list of the nearest published aspect ratio at a size.

    Args:
        size: a name in :data:`SIZES`, or the side of a square image in :data:`PIXELS`.

    Raises:
        ValueError: there is no such size.
    """
    name = PIXELS.get(size) if isinstance(size, int) else PIXELS.get(int(size)) if size.isdigit() else size
    if name not in SIZES:
        raise ValueError(f"size is {size!r}; expected {', '.join(SIZES)} or {', '.join(map(str, PIXELS))}")
    return published()[nearest_ratio(height_by_width)].prefix(SIZES[name])


def reference_grid(schedule: ScaleSchedule) -> tuple[int, int]:
    """The finest grid of the largest list of a schedule's aspect ratio: the grid that positions are counted on."""
    return published()[nearest_ratio(schedule.final.height / schedule.final.width)].final.grid


def parse_ratio(ratio: str | float) -> float:
    """Height / width of an aspect ratio written as width:height, such as ``"16:9"``, or given as width / height.

    Raises:
        ValueError: it is neither.
    """
    text = str(ratio)
    try:
        width, _, height = text.partition(":")
        value = float(height or 1) / float(width)
    except (ValueError, ZeroDivisionError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"ratio is {ratio!r}; expected width:height such as 16:9")
    return value


def for_features(height: int, width: int) -> ScaleSchedule | None:
    """The published list that ends at a grid; None where none does."""
    for full in published().values():
        for count in SIZES.values():
            if full[count - 1].grid == (height, width):
                return full.prefix(count)
    return None


def size_of(schedule: ScaleSchedule) -> str | None:
    """The size's name of a published list; None of any other."""
    for full in published().values():
        for name, count in SIZES.items():
            if full.prefix(count) == schedule:
                return name
    return None
