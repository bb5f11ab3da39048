"""Lists of scales: those FlexVAR is evaluated with, lists to any size in any number of steps, random ones to train on.

Jiao et al. 2025 (arXiv 2502.20313, section 3.3 and appendix); official code jiaosiyu1999/FlexVAR.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from nextscale.core.schedule import Scale, ScaleSchedule

PUBLISHED: dict[str, ScaleSchedule] = {
    name: ScaleSchedule.squares(*sides)
    for name, sides in {
        "6": (1, 2, 4, 6, 10, 16),
        "8": (1, 2, 3, 5, 7, 10, 13, 16),
        "9": (1, 2, 3, 4, 5, 7, 10, 13, 16),
        "10": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        "11": (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 16),
        "12": (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16),
        "13": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16),
        "14": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16),
        "512": (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 23, 32),
    }.items()
}
"""The lists of the paper's figures: by the number of steps to 256 px, and the one to 512 px."""

GROWTH = 1.5
"""Power by which sides grow over the steps of a list: the published lists lie between 1.3 and 1.7."""


def list_for(grid: tuple[int, int], steps: int) -> ScaleSchedule:
    """A list that grows from one token to a grid.

    Grids of the final one's shape are taken as long as there are enough, then some in between as well, one side a cell
    ahead of the other. Where a published list leads to the grid in so many steps, it is that one.

    Args:
        grid: (height, width) of the finest map.

    Raises:
        ValueError: so many different grids do not lie between one token and ``grid``.
    """
    height, width = grid
    if min(grid) < 1 or steps < 1:
        raise ValueError(f"{steps} steps to {height} x {width} cells were asked for; expected 1 or more of each")
    known = PUBLISHED.get(str(steps))
    if known is not None and known.final.grid == grid:
        return known
    longer = max(grid)
    grids = list(
        dict.fromkeys((_part(height, side, longer), _part(width, side, longer)) for side in range(1, longer + 1))
    )
    if steps > len(grids):
        return ScaleSchedule.grids(_filled(grids, steps))
    if steps == 1 and longer > 1:
        raise ValueError(f"1 step to {height} x {width} cells is not possible: lists begin with one cell; expected 2")
    return ScaleSchedule.grids(_spread(grids, steps))


def _part(side: int, share: int, whole: int) -> int:
    return max(math.floor(side * share / whole + 0.5), 1)


def _spread(grids: list[tuple[int, int]], steps: int) -> list[tuple[int, int]]:
    """``steps`` of the grids, the first and the last among them, their sides growing as published."""
    sides = [math.sqrt(height * width) for height, width in grids]
    chosen: list[int] = []
    for step in range(steps):
        wanted = 1 + (sides[-1] - 1) * (step / max(steps - 1, 1)) ** GROWTH
        nearest = min(range(len(grids)), key=lambda i: abs(sides[i] - wanted))
        low, high = chosen[-1] + 1 if chosen else 0, len(grids) - (steps - step)
        chosen.append(min(max(nearest, low), high))
    return [grids[index] for index in chosen]


def _filled(grids: list[tuple[int, int]], steps: int) -> list[tuple[int, int]]:
    """All the grids, and some between two whose sides both grow: first where the growth is largest."""
    gaps = [
        (after[0] * after[1] / (before[0] * before[1]), (before[0], after[1]))
        for before, after in pairwise(grids)
        if before[0] < after[0] and before[1] < after[1]
    ]
    missing = steps - len(grids)
    if missing > len(gaps):
        height, width = grids[-1]
        raise ValueError(
            f"{steps} steps to {height} x {width} cells are not possible; expected at most {len(grids) + len(gaps)}"
        )
    between = [grid for _, grid in sorted(gaps, reverse=True)[:missing]]
    return sorted([*grids, *between], key=lambda grid: grid[0] * grid[1])


@dataclass(frozen=True)
class RandomLists:
    """The lists of training steps; the defaults are the official rule.

    With probability ``standard_share`` the standard list; else ``first``, so many of ``middle``, so many of ``late``,
    and ``final``. Then some lists lose scales, at random places after the second scale; and while a list has more
    tokens than ``budget``, it loses a random one of its last four scales.

    Attributes:
        first, middle, late, final: grids such as "1 2 3x4"; ``final`` is one.
        middle_count, late_count: how many are taken, from the first number to the second, equally likely.
        removals: a uniform number above each of these removes a scale.
        keep_final: the budget is met without giving up the final scale. The official rule may give it up.
    """

    standard: str = "1 2 3 4 5 6 8 10 13 16"
    standard_share: float = 0.05
    first: str = "1 2"
    middle: str = "3 4 5 6 7 8 9 10"
    middle_count: tuple[int, int] = (5, 5)
    late: str = "11 12 13 14 15"
    late_count: tuple[int, int] = (2, 2)
    final: str = "16"
    removals: tuple[float, ...] = (0.9, 0.95, 0.98, 0.99)
    budget: int = 680
    keep_final: bool = False

    def __post_init__(self) -> None:
        for name in ("middle", "late"):
            low, high = getattr(self, f"{name}_count")
            there = len(self._grids(getattr(self, name)))
            if not 0 <= low <= high <= there:
                raise ValueError(
                    f"{name}_count is {low} to {high}; expected 0 <= first <= second <= {there}, the grids of {name}"
                )
        if len(self._grids(self.final)) != 1:
            raise ValueError(f"final is {self.final!r}; expected one grid")
        least = sum(scale.tokens for scale in (*self._grids(self.first), *self._grids(self.final)))
        if self.budget < least:
            raise ValueError(f"budget is {self.budget} tokens; the first scales and the final one have {least} already")

    @property
    def everything(self) -> ScaleSchedule:
        """All grids that a list may have, by their number of tokens: what token shards must hold."""
        parts = (self.standard, self.first, self.middle, self.late, self.final)
        return _ordered({scale for part in parts for scale in self._grids(part)})

    def draw(self, rng: random.Random) -> ScaleSchedule:
        """The next list; ``rng`` is consumed in the official order."""
        if rng.random() < self.standard_share:
            scales = list(self._grids(self.standard))
        else:
            chosen = [*self._grids(self.first), *self._grids(self.final)]
            for part, (low, high) in ((self.middle, self.middle_count), (self.late, self.late_count)):
                count = low if low == high else rng.randint(low, high)
                chosen += rng.sample(self._grids(part), count)
            scales = list(_ordered(chosen).scales)
        chance = rng.random()
        for threshold in self.removals:
            if chance > threshold and len(scales) > 3:
                del scales[rng.choice(range(2, len(scales) - 1))]
        while sum(scale.tokens for scale in scales) > self.budget:
            kept = len(scales) - self.keep_final
            del scales[rng.choice(range(max(kept - 4, 1), kept))]
        return ScaleSchedule(tuple(scales))

    def at(self, seed: int, step: int) -> ScaleSchedule:
        """The list of a training step: the same on all processes and after an interruption."""
        return self.draw(random.Random(f"{seed} {step}"))

    @staticmethod
    def _grids(text: str) -> tuple[Scale, ...]:
        return ScaleSchedule.parse(text).scales if text.strip() else ()


def _ordered(scales: Iterable[Scale]) -> ScaleSchedule:
    return ScaleSchedule(tuple(sorted(scales, key=lambda scale: (scale.tokens, scale.grid))))
