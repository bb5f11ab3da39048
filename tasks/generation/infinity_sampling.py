"""Infinity in the middle of sampling: texts are read once, the cache holds exactly what is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from nextscale.core.cross_attention import Packed
from nextscale.core.sampling import Branch
from nextscale.core.schedule import ScaleSchedule

if TYPE_CHECKING:
    from nextscale.tasks.generation.infinity import Infinity


@dataclass(frozen=True)
class Guidance:
    """How much more the wanted text counts than the other, and where.

    Attributes:
        strengths: w per scale: w wanted + (1 - w) other; 1: the wanted text alone.
        layers: 0: on the scores; -k: on the output of the block that is k-th from the end, of which both then go on.
            Without 0 the scores are those of the wanted text.

    Raises:
        ValueError: a layer is above 0.
    """

    strengths: tuple[float, ...]
    layers: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not self.layers or max(self.layers) > 0:
            raise ValueError(
                f"guidance layers are {list(self.layers)}; expected 0 (scores) or numbers below 0 (blocks)"
            )

    @classmethod
    def of(cls, strength: float | Sequence[float], schedule: ScaleSchedule, layers: Sequence[int] = (0,)) -> Guidance:
        """Of one number, or one per scale.

        Raises:
            ValueError: there is not one for each scale.
        """
        strengths = tuple(strength) if isinstance(strength, Sequence) else (strength,) * len(schedule)
        if len(strengths) != len(schedule):
            raise ValueError(
                f"{len(strengths)} guidance strengths were given for {len(schedule)} scales: give one for each"
            )
        return cls(strengths, tuple(layers))

    @property
    def needs_other(self) -> bool:
        """Whether the other text takes part at all."""
        return any(strength != 1 for strength in self.strengths)

    def branches(self, wanted: Tensor, other: Tensor) -> list[Branch]:
        """For the loop over scales."""
        if not self.needs_other:
            return [Branch(wanted, self.strengths)]
        on_scores = self.strengths if 0 in self.layers else (1.0,) * len(self.strengths)
        return [Branch(wanted, on_scores), Branch(other, tuple(1 - weight for weight in on_scores))]


class TextNetwork:
    """Infinity with the texts it is to draw; conditions are their numbers.

    What depends on a text alone is computed here, once, however many images and scales it serves.

    Args:
        text: the different texts, wanted and other.
        grid: see :func:`nextscale.tasks.generation.infinity_transformer.rotation_of`.
    """

    def __init__(self, model: Infinity, text: Packed, grid: tuple[int, int], guidance: Guidance) -> None:
        self.model, self.grid, self.guidance = model, grid, guidance
        with torch.inference_mode():
            self.pooled, memory = model.read(text)
            self.memories = model.transformer.remember(memory)
            self.modulations = model.transformer.modulate(self.pooled)
            self.head_modulation = model.head.modulate(self.pooled)

    def start(self, conditions: Int[Tensor, " rows"], schedule: ScaleSchedule) -> InfinitySession:
        """See :class:`nextscale.core.sampling.ScaleNetwork`."""
        return InfinitySession(self, conditions, schedule)


class InfinitySession:
    """See :class:`nextscale.core.sampling.Session`."""

    def __init__(self, network: TextNetwork, rows: Tensor, schedule: ScaleSchedule) -> None:
        self._network, self._schedule, self._rows = network, schedule, len(rows)
        model = network.model
        self._pooled = network.pooled[rows]
        self._modulations = [modulation[rows] for modulation in network.modulations]
        self._head_modulation = network.head_modulation[rows]
        self._memories = [type(memory)(memory.key, memory.value, memory.visible, rows) for memory in network.memories]
        self._rotation = model.rotation(schedule, network.grid)
        self._levels = model.levels(schedule)
        self.cache = model.transformer.allocate_cache(self._rows, schedule.length, model.dtype)
        depth = model.config.transformer.depth
        self._guided_blocks = {depth + layer for layer in network.guidance.layers if layer < 0}

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        model, schedule = self._network.model, self._schedule
        begin, stop = index if first is None else first, schedule.ranges[index][1]
        start = schedule.ranges[begin][0]
        x = model.embed(self._pooled, inputs, schedule.lengths[0] if begin == 0 else 0)
        rotation = self._rotation[: stop - start] if model.config.restart_positions else self._rotation[start:stop]
        strength = self._network.guidance.strengths[index]
        guided = self._guided_blocks if strength != 1 else set()

        def blend(x: Tensor, layer: int) -> Tensor:
            if layer not in guided:
                return x
            wanted, other = x.chunk(2)
            return torch.lerp(other, wanted, strength).repeat(2, 1, 1)

        return model.transformer(
            x,
            self._modulations,
            schedule.causal(begin, index),
            self.cache,
            levels=self._levels[start:stop],
            rotation=rotation,
            memory=self._memories,
            after=blend if guided else None,
        )

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        return self._network.model.head(hidden[rows], self._head_modulation[rows])
