"""G3PT in the middle of sampling: conditions are read once, the cache begins with the picture's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.schedule import ScaleSchedule, Segment
from nextscale.tasks.shapes.g3pt_conditions import ShapeConditions
from nextscale.tasks.shapes.g3pt_quantizer import CrossScaleQuantizer

if TYPE_CHECKING:
    from nextscale.tasks.shapes.g3pt import G3PT


def behind(prefix: int, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Visibility where other tokens stand before the scales: those see each other, the scales see them all."""
    moved = tuple(Segment(s.start + prefix, s.stop + prefix, s.visible + prefix) for s in segments)
    return (Segment(0, prefix, prefix), *moved) if prefix else moved


@dataclass(frozen=True)
class NumberedPyramid:
    """The quantiser's pyramid to emitters that draw token numbers: every number has a code of its own."""

    quantizer: CrossScaleQuantizer

    @property
    def vectors(self) -> Float[Tensor, "vocabulary bits"]:
        return self.quantizer.codebook

    def begin(self, batch: int, schedule: ScaleSchedule) -> Tensor:
        return self.quantizer.begin(batch, schedule)

    def advance(self, total: Tensor, codes: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        return self.quantizer.advance(total, codes, schedule, index)

    def next_input(self, total: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        return self.quantizer.next_input(total, schedule, index)


class ConditionedNetwork:
    """G3PT with the conditions it is to follow; the loop's conditions are their numbers.

    What depends on the conditions alone is computed here, once, however many shapes and scales it serves.
    """

    def __init__(self, model: G3PT, conditions: ShapeConditions) -> None:
        self.model = model
        with torch.inference_mode():
            self.pooled, self.prefix = model.read(conditions)
            self.modulations = model.transformer.modulate(self.pooled)
            self.head_modulation = model.head.modulate(self.pooled)

    def start(self, conditions: Int[Tensor, " rows"], schedule: ScaleSchedule) -> G3PTSession:
        """See :class:`nextscale.core.sampling.ScaleNetwork`."""
        return G3PTSession(self, conditions, schedule)


class G3PTSession:
    """See :class:`nextscale.core.sampling.Session`."""

    def __init__(self, network: ConditionedNetwork, rows: Tensor, schedule: ScaleSchedule) -> None:
        self._network, self._schedule = network, schedule
        model = network.model
        self._pooled = network.pooled[rows]
        self._prefix = None if network.prefix is None else network.prefix[rows]
        self._modulations = [modulation[rows] for modulation in network.modulations]
        self._head_modulation = network.head_modulation[rows]
        length = schedule.length + model.config.prefix
        self._cache = model.transformer.allocate_cache(len(rows), length, model.dtype)

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        model, schedule, count = self._network.model, self._schedule, self._network.model.config.prefix
        begin, (_, stop) = index if first is None else first, schedule.ranges[index]
        x = model.embed(self._pooled, inputs, schedule.ranges[begin][0], stop)
        segments = schedule.causal(begin, index)
        if begin > 0 or self._prefix is None:
            moved = tuple(Segment(s.start, s.stop, s.visible + count) for s in segments)
            return model.transformer(x, self._modulations, moved, self._cache)
        x = torch.cat((self._prefix, x), dim=1)
        return model.transformer(x, self._modulations, behind(count, segments), self._cache)[:, count:]

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        return self._network.model.head(hidden[rows], self._head_modulation[rows])
