"""SAR3D in the middle of sampling: features are read once, the cache holds exactly what is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.text import TextFeatures

if TYPE_CHECKING:
    from nextscale.tasks.shapes.sar3d import SAR3D


class ConditionedNetwork:
    """SAR3D with the features it is to follow; conditions are their numbers.

    What depends on the features alone is computed here, once, however many shapes and scales it serves.
    """

    def __init__(self, model: SAR3D, features: TextFeatures) -> None:
        self.model = model
        with torch.inference_mode():
            self.pooled, memory = model.read(features)
            self.memories = model.transformer.remember(memory)
            self.modulations = model.transformer.modulate(self.pooled)
            self.head_modulation = model.head.modulate(self.pooled)

    def start(self, conditions: Int[Tensor, " rows"], schedule: ScaleSchedule) -> SAR3DSession:
        """See :class:`nextscale.core.sampling.ScaleNetwork`."""
        return SAR3DSession(self, conditions, schedule)


class SAR3DSession:
    """See :class:`nextscale.core.sampling.Session`."""

    def __init__(self, network: ConditionedNetwork, rows: Tensor, schedule: ScaleSchedule) -> None:
        self._network, self._schedule = network, schedule
        model = network.model
        self._pooled = network.pooled[rows]
        self._modulations = [modulation[rows] for modulation in network.modulations]
        self._head_modulation = network.head_modulation[rows]
        self._memories = [type(memory)(memory.key, memory.value, memory.visible, rows) for memory in network.memories]
        self._cache = model.transformer.allocate_cache(len(rows), schedule.length, model.dtype)

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        model, schedule = self._network.model, self._schedule
        begin, stop = index if first is None else first, schedule.ranges[index][1]
        x = model.embed(self._pooled, inputs, schedule.ranges[begin][0], stop)
        return model.transformer(
            x, self._modulations, schedule.causal(begin, index), self._cache, memory=self._memories
        )

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        return self._network.model.head(hidden[rows], self._head_modulation[rows])
