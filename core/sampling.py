"""The one loop over scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.heads import Emission
from nextscale.core.random import Draws
from nextscale.core.schedule import ScaleSchedule


@dataclass(frozen=True)
class Branch:
    """One condition under which the network runs, and how much its logits count at each scale.

    Attributes:
        condition: what the network conditions on, one row per image.
        weights: one per scale. Where a weight is 0 the head is skipped for this branch; its keys and values
            are still written.
    """

    condition: Tensor
    weights: tuple[float, ...]


def classifier_free(
    condition: Tensor, unconditional: Tensor, strength: float, schedule: ScaleSchedule
) -> list[Branch]:
    """Guidance that grows with the scale: (1 + t) conditional - t unconditional, t = strength k / (K - 1).

    ``strength`` 0 gives the conditional branch alone, at half the work.
    """
    if strength == 0:
        return [Branch(condition, (1.0,) * len(schedule))]
    grown = [strength * schedule.ratio(index) for index in range(len(schedule))]
    return [
        Branch(condition, tuple(1 + t for t in grown)),
        Branch(unconditional, tuple(-t for t in grown)),
    ]


class Session(Protocol):
    """A network in the middle of sampling: its conditions are folded, its cache allocated.

    Rows are branch by branch: all images of the first branch, then all of the second.
    """

    def step(self, index: int, inputs: Float[Tensor, "batch tokens channels"] | None) -> Tensor:
        """Run scale ``index`` for all rows and write the cache.

        Args:
            inputs: what was accepted so far, on this scale's grid; None at the first scale.

        Returns:
            Hidden states, (rows, tokens, width).
        """
        ...

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        """The head, on some rows of :meth:`step`'s output."""
        ...


class ScaleNetwork(Protocol):
    """What the loop asks of a network."""

    def start(self, conditions: Tensor, schedule: ScaleSchedule) -> Session: ...


class ScalePyramid(Protocol):
    """What the loop asks of a scale quantiser: how accepted codes become the next input."""

    def begin(self, batch: int, schedule: ScaleSchedule) -> Tensor: ...

    def contribution(self, codes: Tensor, schedule: ScaleSchedule, index: int) -> Tensor: ...

    def next_input(self, total: Tensor, schedule: ScaleSchedule, index: int) -> Tensor: ...


class Emitter(Protocol):
    """How logits become symbols and codes."""

    def emit(self, logits: Tensor, codebook: Tensor, draws: Draws, index: int, ratio: float) -> Emission: ...


class Control(Protocol):
    """Changes what a scale contributes, after its draw: tokens held fixed for in-painting, for example."""

    def adjust(self, codes: Tensor, index: int) -> Tensor:
        """The codes to use instead, (batch, tokens, channels)."""
        ...


@dataclass(frozen=True)
class ScaleStep:
    """One finished scale.

    Attributes:
        index: of the scale.
        tokens: drawn symbols.
        logits: after guidance, before filters.
        codes: what entered the sum.
        total: the sum of all scales so far, at the finest grid.
    """

    index: int
    tokens: Int[Tensor, "batch tokens"]
    logits: Float[Tensor, "batch tokens vocabulary"]
    codes: Float[Tensor, "batch tokens channels"]
    total: Float[Tensor, "batch channels height width"]


@torch.inference_mode()
def sample(
    network: ScaleNetwork,
    pyramid: ScalePyramid,
    codebook: Float[Tensor, "vocabulary channels"],
    schedule: ScaleSchedule,
    branches: Sequence[Branch],
    emitter: Emitter,
    draws: Draws,
    controls: Sequence[Control] = (),
) -> Iterator[ScaleStep]:
    """Predict the scales one after another, each in one parallel step.

    A generator: the caller sees each scale as it is finished, and may stop at any.
    """
    batch = len(branches[0].condition)
    session = network.start(torch.cat([branch.condition for branch in branches]), schedule)
    total = pyramid.begin(batch, schedule)
    inputs: Tensor | None = None
    for index in range(len(schedule)):
        hidden = session.step(index, inputs)
        logits = _guided(session, hidden, branches, batch, index)
        emission = emitter.emit(logits, codebook, draws, index, schedule.ratio(index))
        codes = emission.codes
        for control in controls:
            codes = control.adjust(codes, index)
        total = total + pyramid.contribution(codes, schedule, index)
        yield ScaleStep(index, emission.tokens, logits, codes, total)
        if index + 1 < len(schedule):
            inputs = pyramid.next_input(total, schedule, index + 1)


def _guided(session: Session, hidden: Tensor, branches: Sequence[Branch], batch: int, index: int) -> Tensor:
    """The weighted sum of the branches' logits; branches of weight 0 are not computed."""
    active = [i for i, branch in enumerate(branches) if branch.weights[index] != 0]
    if not active:
        raise ValueError(f"every guidance branch has weight 0 at scale {index}: one must count")
    if active == list(range(len(branches))):
        parts = session.logits(hidden, slice(None)).split(batch)
    else:
        parts = tuple(session.logits(hidden, slice(i * batch, (i + 1) * batch)) for i in active)
    weights = [branches[i].weights[index] for i in active]
    if weights == [1.0]:
        return parts[0]
    logits = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        logits = logits.add_(part, alpha=weight)
    return logits
