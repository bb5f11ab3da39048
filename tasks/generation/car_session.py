"""CAR in the sampling loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from nextscale.core.cache import KeyValueCache
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.car_parts import ControlFeatures

if TYPE_CHECKING:
    from nextscale.tasks.generation.car import CAR


@dataclass(frozen=True)
class Controlled:
    """A CAR with its controls given: what the sampling loop runs."""

    model: CAR
    features: ControlFeatures
    strength: float

    def start(self, conditions: Int[Tensor, " rows"], schedule: ScaleSchedule) -> CARSession:
        """Fold the class labels of all rows into a session."""
        return CARSession(self, conditions, schedule)


class CARSession:
    """CAR in the middle of sampling, with a cache for either stack."""

    def __init__(self, network: Controlled, labels: Tensor, schedule: ScaleSchedule) -> None:
        self._network, self._schedule = network, schedule
        model, base = network.model, network.model.base
        self._condition = base.class_embedding(labels)
        self._modulations = model.modulate(self._condition)
        self._head_modulation = base.head.modulate(self._condition)
        config, dtype = base.config.transformer, self._modulations[0].dtype
        sizes = (len(self._modulations), len(labels), schedule.length, config.heads, config.head_size)
        self._cache = KeyValueCache(*sizes, dtype=dtype, device=model.device)

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        network, schedule = self._network, self._schedule
        begin = index if first is None else first
        x, y = network.model.streams(inputs, self._condition, network.features, schedule, begin, index)
        segments = schedule.segments[begin : index + 1] if begin < index else None
        return network.model.run(x, y, self._modulations, network.strength, segments, self._cache)

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        return self._network.model.base.head(hidden[rows], self._head_modulation[rows])
