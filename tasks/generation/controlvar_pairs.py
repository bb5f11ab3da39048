"""Two token maps per scale in one sequence: a control picture and an image.

At every scale the tokens of the first half come first, then those of the second; the control is the first half unless
it is said otherwise. A schedule of pairs has two streams per scale; the tokenizer knows each half alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nextscale.core.attention import Visibility
from nextscale.core.schedule import ScaleSchedule, Segment

Halves = Literal["joined", "one-way", "apart"]
"""What the two maps of one scale see of each other: each the other; the second the first; neither the other."""


@lru_cache(maxsize=256)
def paired(schedule: ScaleSchedule) -> ScaleSchedule:
    """The scales with two streams each."""
    return ScaleSchedule(tuple(replace(scale, streams=2) for scale in schedule.scales))


@lru_cache(maxsize=256)
def single(schedule: ScaleSchedule) -> ScaleSchedule:
    """The scales of one half."""
    return ScaleSchedule(tuple(replace(scale, streams=1) for scale in schedule.scales))


def weave(first: Tensor, second: Tensor, lengths: Sequence[int]) -> Tensor:
    """Both halves' positions, (batch, positions, …) each, in sequence order.

    Args:
        lengths: positions of one half at every scale that the tensors hold.
    """
    parts = zip(first.split(list(lengths), 1), second.split(list(lengths), 1), strict=True)
    return torch.cat([part for pair in parts for part in pair], dim=1)


def unweave(sequence: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What :func:`weave` joined."""
    parts = sequence.split([length for length in lengths for _ in range(2)], 1)
    return torch.cat(parts[::2], 1), torch.cat(parts[1::2], 1)


@lru_cache(maxsize=256)
def second_half(schedule: ScaleSchedule, device: torch.device) -> Int[Tensor, " length"]:
    """0 at the positions of every scale's first half, 1 at those of its second."""
    with torch.inference_mode(False):
        counts = torch.tensor([length // 2 for length in schedule.lengths]).repeat_interleave(2)
        return torch.tensor([0, 1]).repeat(len(schedule)).repeat_interleave(counts).to(device)


@lru_cache(maxsize=256)
def visibility(
    schedule: ScaleSchedule, halves: Halves, first: int = 0, last: int | None = None, device: torch.device | None = None
) -> Visibility:
    """What the queries of the scales ``first`` to ``last`` see, the keys of earlier ones being cached: all earlier
    scales, and of their own what ``halves`` says.

    Args:
        last: None: the last of all.
        device: of the mask that halves apart need, since what they see is no prefix of the keys.
    """
    end = len(schedule) - 1 if last is None else last
    if halves == "joined":
        return schedule.causal(first, end)
    begin, stop = schedule.ranges[first][0], schedule.ranges[end][1]
    if halves == "apart":
        with torch.inference_mode(False):
            seen = visibility_mask(schedule, halves)[begin:stop, :stop]
            return torch.where(seen, 0.0, -torch.inf).to(device)
    segments: list[Segment] = []
    for start, after in schedule.ranges[first : end + 1]:
        middle = (start + after) // 2
        segments += [Segment(start - begin, middle - begin, middle), Segment(middle - begin, after - begin, after)]
    return tuple(segments)


def visibility_mask(schedule: ScaleSchedule, halves: Halves) -> Bool[Tensor, "length length"]:
    """True where a query (row) may see a key (column): the form official files hold."""
    level, half = schedule.levels(), second_half(schedule, torch.device("cpu"))
    own = {"joined": half[:, None] > -1, "one-way": half[:, None] >= half, "apart": half[:, None] == half}[halves]
    return (level[:, None] > level) | ((level[:, None] == level) & own)
