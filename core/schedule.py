"""The ordered token grids of a next-scale model.

A next-scale model predicts a pyramid of token maps, coarse to fine, each map in one parallel step.
:class:`ScaleSchedule` is that list of maps. It is immutable and hashable, and an argument at run time,
never a property of a model: position tables, masks and level indices are derived from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scale:
    """One token map: ``streams`` x ``planes`` x ``height`` x ``width`` tokens.

    VAR has one stream and one plane; ControlVAR two streams (control, image); SAR3D three planes; a set
    of unordered tokens (G3PT) has ``width`` 1.
    """

    height: int
    width: int
    planes: int = 1
    streams: int = 1

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.planes, self.streams) < 1:
            raise ValueError(f"a scale needs positive sizes, got {self}")

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width)"""
        return self.height, self.width

    def __str__(self) -> str:
        sizes = [self.height, self.width, self.planes, self.streams]
        while len(sizes) > 2 and sizes[-1] == 1:
            sizes.pop()
        return str(self.height) if sizes == [self.height] * 2 else "x".join(map(str, sizes))

    @property
    def tokens(self) -> int:
        return self.streams * self.planes * self.height * self.width


@dataclass(frozen=True, slots=True)
class Segment:
    """One unmasked attention call: queries ``[start, stop)`` see exactly the keys ``[0, visible)``."""

    start: int
    stop: int
    visible: int


@dataclass(frozen=True)
class ScaleSchedule:
    """An ordered tuple of scales, coarse to fine.

    >>> schedule = ScaleSchedule.squares(1, 2, 3)
    >>> schedule.length, schedule.ranges
    (14, ((0, 1), (1, 5), (5, 14)))
    """

    scales: tuple[Scale, ...]

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("a scale schedule needs at least one scale")

    @classmethod
    def squares(cls, *sides: int, planes: int = 1, streams: int = 1) -> ScaleSchedule:
        """Square maps with the given sides."""
        return cls.grids(((side, side) for side in sides), planes=planes, streams=streams)

    @classmethod
    def grids(cls, grids: Iterable[tuple[int, int]], planes: int = 1, streams: int = 1) -> ScaleSchedule:
        """Maps with the given (height, width) pairs."""
        return cls(tuple(Scale(int(h), int(w), planes, streams) for h, w in grids))

    @classmethod
    def counts(cls, *counts: int) -> ScaleSchedule:
        """Sets of so many unordered tokens."""
        return cls.grids((count, 1) for count in counts)

    @classmethod
    def parse(cls, value: ScaleSchedule | str | Iterable[int | tuple[int, int]]) -> ScaleSchedule:
        """A schedule from ``"1 2 3 4x6"``, ``[1, 2, 3]`` or ``[(1, 1), (4, 6)]``; a schedule is returned as it is.

        Numbers of planes and streams follow the width where they are not 1: ``"4x4x3"``, ``"4x6x1x2"``.

        Raises:
            ValueError: an entry is neither a side nor a height-and-width pair.
        """
        if isinstance(value, ScaleSchedule):
            return value
        items = [part for part in re.split(r"[\s,]+", value.strip()) if part] if isinstance(value, str) else value
        scales: list[Scale] = []
        for item in items:
            try:
                pair = str(item).lower().split("x") if isinstance(item, str | int) else list(item)
                sizes = [int(size) for size in pair]
            except (TypeError, ValueError):
                sizes = []
            if not 1 <= len(sizes) <= 4:
                raise ValueError(f"scale {item!r} is neither a side such as 4 nor height x width such as 4x6")
            scales.append(Scale(sizes[0], *(sizes[1:] or sizes)))
        return cls(tuple(scales))

    def __len__(self) -> int:
        return len(self.scales)

    def __getitem__(self, index: int) -> Scale:
        return self.scales[index]

    def __str__(self) -> str:
        return " ".join(map(str, self.scales))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(scale.tokens for scale in self.scales)

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of each scale in the flat sequence."""
        stops = tuple(accumulate(self.lengths))
        return tuple((stop - length, stop) for stop, length in zip(stops, self.lengths, strict=True))

    @property
    def length(self) -> int:
        """Tokens of all scales."""
        return self.ranges[-1][1]

    @property
    def final(self) -> Scale:
        """The finest scale."""
        return self.scales[-1]

    def ratio(self, index: int) -> float:
        """Position of a scale in the list, 0 for the first to 1 for the last (1 where there is only one)."""
        return index / (len(self) - 1) if len(self) > 1 else 1.0

    def prefix(self, count: int) -> ScaleSchedule:
        """The first ``count`` scales."""
        return ScaleSchedule(self.scales[:count])

    def scaled(self, factor: int) -> tuple[int, int]:
        """(height, width) of the finest map times ``factor``: the image size for a tokenizer of that stride."""
        return self.final.height * factor, self.final.width * factor

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Attention under next-scale visibility: every scale's queries see all scales up to their own."""
        return tuple(Segment(start, stop, stop) for start, stop in self.ranges)

    def causal(self, first: int, last: int) -> tuple[Segment, ...]:
        """The same for the queries of the scales ``first`` to ``last`` alone, the earlier keys being cached."""
        offset = self.ranges[first][0]
        part = self.segments[first : last + 1]
        return tuple(Segment(s.start - offset, s.stop - offset, s.visible) for s in part)

    def levels(self, device: torch.device | str | None = None) -> Tensor:
        """int64 (length,): the scale index of every position."""
        return _levels(self, torch.device(device or "cpu"))

    def mask(self, device: torch.device | str | None = None) -> Tensor:
        """bool (length, length): True where a query (row) may see a key (column).

        The library attends by :attr:`segments` and never needs this; it is for reference computations and
        for kernels that take a mask.
        """
        levels = self.levels(device)
        return levels[:, None] >= levels[None, :]

    def split(self, flat: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """Views of a flat tensor, one per scale.

        Raises:
            ValueError: the axis does not hold exactly this schedule's positions.
        """
        if flat.shape[dim] != self.length:
            raise ValueError(f"axis {dim} has {flat.shape[dim]} positions, the schedule '{self}' has {self.length}")
        return flat.split(self.lengths, dim)


@lru_cache(maxsize=256)
def _levels(schedule: ScaleSchedule, device: torch.device) -> Tensor:
    counts, total = torch.tensor(schedule.lengths), schedule.length
    # Outside inference mode: a cached tensor made inside one could not take part in training later.
    with torch.inference_mode(False):
        return torch.repeat_interleave(torch.arange(len(schedule)), counts, output_size=total).to(device)
