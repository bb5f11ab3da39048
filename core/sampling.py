"""The one loop over scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

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
    condition: Tensor, unconditional: Tensor, strength: float | Sequence[float], schedule: ScaleSchedule
) -> list[Branch]:
    """Guidance that grows with the scale: (1 + t) conditional - t unconditional, t = strength k / (K - 1).

    Args:
        strength: one number, or one per scale. 0 gives the conditional branch alone, at half the work.

    Raises:
        ValueError: there is not one strength for each scale.
    """
    strengths = strength_of_each(strength, schedule)
    return weighed(condition, unconditional, [each * schedule.ratio(index) for index, each in enumerate(strengths)])


def weighed(condition: Tensor, unconditional: Tensor, strengths: Sequence[float]) -> list[Branch]:
    """(1 + t) conditional - t unconditional, t given for each scale; the conditional branch alone where all are 0."""
    wanted = Branch(condition, tuple(1 + t for t in strengths))
    return [wanted, Branch(unconditional, tuple(-t for t in strengths))] if any(strengths) else [wanted]


def strength_of_each(strength: float | Sequence[float], schedule: ScaleSchedule) -> list[float]:
    """Guidance strengths, one per scale.

    Raises:
        ValueError: there is not one for each scale.
    """
    strengths = list(strength) if isinstance(strength, Sequence) else [strength] * len(schedule)
    if len(strengths) != len(schedule):
        raise ValueError(
            f"{len(strengths)} guidance strengths were given for {len(schedule)} scales: give one for each"
        )
    return strengths


class Session(Protocol):
    """A network in the middle of sampling: its conditions are folded, its cache allocated.

    Rows are branch by branch: all images of the first branch, then all of the second.
    """

    def step(
        self, index: int, inputs: Float[Tensor, "batch tokens channels"] | None, first: int | None = None
    ) -> Tensor:
        """Run scale ``index`` for all rows and write the cache.

        Args:
            inputs: what was accepted so far, on this scale's grid; None at the first scale.
            first: run the scales ``first`` to ``index`` in one causal pass; ``inputs`` are then theirs, joined in
                order (the first scale of all has none). None: ``index`` alone.

        Returns:
            Hidden states of every position that was run, (rows, tokens, width).
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

    @property
    def vectors(self) -> Tensor:
        """The code vectors that symbols stand for, (vocabulary, channels), float32."""
        ...

    def begin(self, batch: int, schedule: ScaleSchedule) -> Tensor:
        """What is accepted before the first scale."""
        ...

    def advance(self, total: Tensor, codes: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        """What is accepted after scale ``index``, given its codes."""
        ...

    def next_input(self, total: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        """What enters the network at scale ``index``, (batch, tokens, channels)."""
        ...


@dataclass(frozen=True)
class ScaleContext:
    """What an emitter may use at one scale.

    Attributes:
        hidden: the network's output for all rows, branch by branch, (rows, tokens, width).
        batch: images, so rows = batch x branches.
    """

    index: int
    schedule: ScaleSchedule
    hidden: Tensor
    session: Session
    branches: Sequence[Branch]
    batch: int
    pyramid: ScalePyramid
    draws: Draws

    @property
    def ratio(self) -> float:
        """The scale's place in the list, 0 to 1."""
        return self.schedule.ratio(self.index)

    def guided_logits(self) -> Tensor:
        """The weighted sum of the branches' logits, (batch, tokens, …); branches of weight 0 are not computed."""
        weights = [branch.weights[self.index] for branch in self.branches]
        active = [i for i, weight in enumerate(weights) if weight != 0]
        if not active:
            raise ValueError(f"every guidance branch has weight 0 at scale {self.index}: one must count")
        if len(active) == len(weights):
            parts = self.session.logits(self.hidden, slice(None)).split(self.batch)
        else:
            rows = [slice(i * self.batch, (i + 1) * self.batch) for i in active]
            parts = tuple(self.session.logits(self.hidden, part) for part in rows)
        logits = parts[0] if weights[active[0]] == 1 else parts[0] * weights[active[0]]
        for part, i in zip(parts[1:], active[1:], strict=True):
            logits = torch.add(logits, part, alpha=weights[i])
        return logits


@dataclass(frozen=True)
class Emission:
    """What one scale's draw gave.

    Attributes:
        tokens: the drawn symbols.
        codes: what is accepted: the symbols' code vectors, soft mixtures of codes, or continuous latents.
        logits: after guidance, before filters.
    """

    tokens: Tensor
    codes: Float[Tensor, "batch tokens channels"]
    logits: Tensor


class Emitter(Protocol):
    """How hidden states become a scale's symbols."""

    def emit(self, context: ScaleContext) -> Emission: ...


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
        codes: what was accepted.
        total: what all scales so far amount to; for residual pyramids their sum, (batch, channels, height,
            width) at the finest grid.
    """

    index: int
    tokens: Tensor
    logits: Tensor
    codes: Float[Tensor, "batch tokens channels"]
    total: Tensor


@dataclass(frozen=True)
class Accepted:
    """Where sampling goes on: everything before a scale is decided already, by another network or by an image.

    Attributes:
        scales: how many scales are decided; the next to draw has this index.
        total: what they amount to, as :attr:`ScaleStep.total` after the last of them.
        inputs: what enters the network at the scales 1 to ``scales``, joined in order.
    """

    scales: int
    total: Tensor
    inputs: Float[Tensor, "batch positions channels"]


@torch.inference_mode()
def sample(
    network: ScaleNetwork,
    pyramid: ScalePyramid,
    schedule: ScaleSchedule,
    branches: Sequence[Branch],
    emitter: Emitter,
    draws: Draws,
    controls: Sequence[Control] = (),
    accepted: Accepted | None = None,
    stop: int | None = None,
) -> Iterator[ScaleStep]:
    """:func:`roll_out` without gradients."""
    yield from roll_out(network, pyramid, schedule, branches, emitter, draws, controls, accepted, stop)


def roll_out(
    network: ScaleNetwork,
    pyramid: ScalePyramid,
    schedule: ScaleSchedule,
    branches: Sequence[Branch],
    emitter: Emitter,
    draws: Draws,
    controls: Sequence[Control] = (),
    accepted: Accepted | None = None,
    stop: int | None = None,
) -> Iterator[ScaleStep]:
    """Predict the scales one after another, each in one parallel step.

    A generator: the caller sees each scale as it is finished, and may stop at any.

    Args:
        accepted: go on from here instead of from nothing.
        stop: draw no scale from this index on, and hold no cache for them.

    Raises:
        ValueError: no scale is left to draw.
    """
    batch, end = len(branches[0].condition), len(schedule) if stop is None else stop
    begin = 0 if accepted is None else accepted.scales
    if not begin < end <= len(schedule):
        raise ValueError(f"there is nothing to draw from scale {begin} to {end} of {len(schedule)}")
    session = network.start(torch.cat([branch.condition for branch in branches]), schedule.prefix(end))
    inputs: Tensor | None = None
    if accepted is None:
        total = pyramid.begin(batch, schedule)
    else:
        total, inputs = accepted.total, accepted.inputs
    for index in range(begin, end):
        if index == begin and begin > 0:
            # The network has not seen the scales before: one pass over them all fills the cache.
            hidden = session.step(index, inputs, first=0)[:, -schedule.lengths[index] :]
        else:
            hidden = session.step(index, inputs)
        emission = emitter.emit(ScaleContext(index, schedule, hidden, session, branches, batch, pyramid, draws))
        codes = emission.codes
        for control in controls:
            codes = control.adjust(codes, index)
        total = pyramid.advance(total, codes, schedule, index)
        yield ScaleStep(index, emission.tokens, emission.logits, codes, total)
        if index + 1 < end:
            inputs = pyramid.next_input(total, schedule, index + 1)
