"""Two token maps per scale in one sequence: a control picture and an image.

At every scale the tokens of the first half come first, then those of the second; the control is the first half unless
it is said otherwise. A schedule of pairs has two streams per scale; the tokenizer knows each half alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from nextscale.core.attention import attend
from nextscale.core.cache import KeyValueCache
from nextscale.core.fused import linear
from nextscale.core.schedule import ScaleSchedule, Segment
from nextscale.core.transformer import Block, SelfAttention, TransformerConfig

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


@lru_cache(maxsize=256)
def second_half(schedule: ScaleSchedule, device: torch.device) -> Int[Tensor, " length"]:
    """0 at the positions of every scale's first half, 1 at those of its second."""
    with torch.inference_mode(False):
        counts = torch.tensor([length // 2 for length in schedule.lengths]).repeat_interleave(2)
        return torch.tensor([0, 1]).repeat(len(schedule)).repeat_interleave(counts).to(device)


@dataclass(frozen=True, slots=True)
class GappedSegment(Segment):
    """Queries that see the keys ``[0, visible)`` but for ``[start of the scale, gap)``: the first half's, which a query
    of the second does not see. The gap ends where the queries' own keys begin."""

    gap: tuple[int, int] = (0, 0)


@lru_cache(maxsize=256)
def visibility(schedule: ScaleSchedule, halves: Halves) -> tuple[Segment, ...]:
    """What every query sees: all earlier scales, and of its own what ``halves`` says."""
    if halves == "joined":
        return schedule.segments
    segments: list[Segment] = []
    for start, stop in schedule.ranges:
        middle = (start + stop) // 2
        segments.append(Segment(start, middle, middle))
        if halves == "one-way":
            segments.append(Segment(middle, stop, stop))
        else:
            segments.append(GappedSegment(middle, stop, stop, (start, middle)))
    return tuple(segments)


def causal(schedule: ScaleSchedule, halves: Halves, first: int, last: int) -> list[Segment]:
    """The same for the queries of the scales ``first`` to ``last`` alone, the earlier keys being cached."""
    begin, end = schedule.ranges[first][0], schedule.ranges[last][1]
    return [
        replace(segment, start=segment.start - begin, stop=segment.stop - begin)
        for segment in visibility(schedule, halves)
        if begin <= segment.start < end
    ]


def visibility_mask(schedule: ScaleSchedule, halves: Halves) -> Bool[Tensor, "length length"]:
    """True where a query (row) may see a key (column): the form official files hold."""
    mask = torch.zeros(schedule.length, schedule.length, dtype=torch.bool)
    for segment in visibility(schedule, halves):
        mask[segment.start : segment.stop, : segment.visible] = True
        if isinstance(segment, GappedSegment):
            mask[segment.start : segment.stop, slice(*segment.gap)] = False
    return mask


class GappedAttention(SelfAttention):
    """Self-attention over segments whose keys are no prefix."""

    def forward(
        self, x: Tensor, segments: Sequence[Segment] | None = None, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        if segments is None:
            raise ValueError("attention with gaps needs the segments that say what each query sees")
        q, k, v = self.project(x)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        parts = []
        for segment in segments:
            keys, values = k[:, : segment.visible], v[:, : segment.visible]
            if isinstance(segment, GappedSegment):
                begin, end = segment.gap
                keys, values = (torch.cat((t[:, :begin], t[:, end:]), dim=1) for t in (keys, values))
            parts.append(attend(q[:, segment.start : segment.stop], keys, values, self.scale))
        out = linear(self.projection, torch.cat(parts, dim=1).flatten(2))
        return F.dropout(out, self.dropout, self.training)


class GappedBlock(Block):
    """A block whose attention is :class:`GappedAttention`."""

    def __init__(self, config: TransformerConfig, condition_width: int, drop_probability: float) -> None:
        super().__init__(config, condition_width, drop_probability)
        self.attention = GappedAttention(config)
