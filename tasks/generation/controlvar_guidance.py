"""Sampling pairs: guidance by what is forced on the network (ControlVAR, arXiv 2406.09750, section 3.3).

Up to four branches run side by side. The first knows class and control type; the second loses the class, the third
the type as well, and the fourth also the pixels: where cells of a picture are given, all others are forced to them,
and the fourth goes on from cells that it drew itself. With r = k / (K - 1) and strengths s1, s2, s3,

    logits = (1 + s1 r) l1 + (s2 - s1) r l2 + (s3 - s2) r l3 - s3 r l4.

Equal strengths leave two branches. With nothing given the third and the fourth are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nextscale.core.heads import CategoricalEmitter
from nextscale.core.quantizer import ResidualQuantizer
from nextscale.core.random import Draws
from nextscale.core.sampling import Accepted, Branch, Control, Emission, Emitter, ScaleContext, ScaleStep, sample
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.controlvar_pairs import single, visibility, weave
from nextscale.tasks.generation.editing import KeptTokens
from nextscale.tasks.generation.var import VARSession

if TYPE_CHECKING:
    from nextscale.tasks.generation.controlvar import ControlVAR

Strengths = tuple[float, float, float]
"""How much the class, the type and the given pixels count."""

BRANCHES = 4


@dataclass(frozen=True)
class Given:
    """Cells that are decided beforehand.

    Attributes:
        tokens: of both halves in sequence order; those of other cells do not matter.
        kept: which cells of the sequence are decided; the same for all images.
    """

    tokens: Int[Tensor, "batch length"]
    kept: Bool[Tensor, " length"]

    def halves(self, schedule: ScaleSchedule) -> list[int]:
        """Which halves have decided cells, 0 the first and 1 the second."""
        parts = [part.unflatten(0, (2, -1)).any(1) for part in self.kept.split(list(schedule.lengths))]
        return torch.stack(parts).any(0).nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class Cells:
    """Which cells of a picture are held fixed.

    Attributes:
        mask: 1 = keep, at the finest grid; coarser grids follow it, and the coarsest are kept wholly
            (:mod:`nextscale.tasks.generation.editing`).
    """

    mask: Int[Tensor, "height width"]

    def flat(self, schedule: ScaleSchedule) -> Tensor:
        """bool (length,): over the flat positions of one half.

        Raises:
            ValueError: the mask is of another grid.
        """
        if tuple(self.mask.shape) != schedule.final.grid:
            raise ValueError(f"the mask is {tuple(self.mask.shape)}, expected the finest grid, {schedule.final.grid}")
        kept = KeptTokens(torch.empty(0), self.mask, schedule)
        return torch.cat([kept.kept(index) for index in range(len(schedule))])


def given_cells(
    model: ControlVAR, n: int, pictures: Sequence[tuple[Tensor | None, Cells | None]], control_first: bool = True
) -> Given | None:
    """What is decided beforehand; None where no picture is given.

    Args:
        n: number of images.
        pictures: the control and the image, as pictures or tokens (:meth:`ControlVAR.encode`), with the cells that are
            held fixed; None: all of them.
    """
    if all(picture is None for picture, _ in pictures):
        return None
    schedule = single(model.config.schedule)
    tokens, kept = [], []
    for picture, cells in pictures if control_first else reversed(pictures):
        part = torch.zeros(n, schedule.length, dtype=torch.int64) if picture is None else model.encode(picture)
        flags = torch.full((schedule.length,), picture is not None)
        if cells is not None and picture is not None:
            flags = cells.flat(schedule)
        tokens.append(part.to(model.device))
        kept.append(flags.to(model.device)[None])
    lengths = schedule.lengths
    return Given(weave(tokens[0], tokens[1], lengths), weave(kept[0], kept[1], lengths)[0])


@dataclass(frozen=True)
class PairPyramid:
    """What is accepted of several maps side by side: the two halves, and versions of them that a branch has alone.

    The sum is (batch, maps, channels, height, width). Codes are the maps' cells one map after the other, inputs the
    maps' channels side by side.
    """

    quantizer: ResidualQuantizer
    maps: int = 2

    @property
    def vectors(self) -> Tensor:
        return self.quantizer.vectors

    def begin(self, batch: int, schedule: ScaleSchedule) -> Tensor:
        return self.quantizer.begin(batch * self.maps, schedule).unflatten(0, (batch, self.maps))

    def advance(self, total: Tensor, codes: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        cells = codes.unflatten(1, (self.maps, -1)).flatten(0, 1)
        return self.quantizer.advance(total.flatten(0, 1), cells, schedule, index).view_as(total)

    def next_input(self, total: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        inputs = self.quantizer.next_input(total.flatten(0, 1), schedule, index)
        return inputs.unflatten(0, (-1, self.maps)).transpose(1, 2).flatten(2)


class PairSession(VARSession):
    """ControlVAR in the middle of sampling.

    Args:
        conditions: class and type of every row.
        reads: of every branch, which maps of the pyramid are its first and its second half; None: 0 and 1.
    """

    def __init__(
        self,
        model: ControlVAR,
        conditions: Int[Tensor, "rows 2"],
        schedule: ScaleSchedule,
        reads: Sequence[tuple[int, int]] | None = None,
        control_first: bool = True,
    ) -> None:
        super().__init__(model, conditions[:, 0], schedule)
        self._pairs, self._types = model, conditions[:, 1]
        self._reads, self._control_first = reads, control_first

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        model, schedule = self._pairs, self._schedule
        begin, parts = index if first is None else first, list[Tensor]()
        if begin == 0:
            parts.append(model.start_tokens(self._condition, self._types, schedule, self._control_first))
        if inputs is not None:
            reads = self._reads or ((0, 1),) * (len(self._condition) // len(inputs))
            maps = inputs.unflatten(-1, (-1, model.config.code_channels))
            scales = range(max(begin, 1), index + 1)
            for scale, cells in zip(scales, maps.split([schedule.lengths[k] // 2 for k in scales], 1), strict=True):
                rows = torch.cat([torch.cat((cells[:, :, a], cells[:, :, b]), dim=1) for a, b in reads])
                parts.append(model.embed(rows, schedule, *schedule.ranges[scale], self._control_first))
        seen = visibility(schedule, model.config.halves, begin, index, model.device)
        return model.transformer(torch.cat(parts, dim=1), self._modulations, seen, self._cache)


@dataclass(frozen=True)
class _Network:
    """Starts sessions in which the branches read different maps."""

    model: ControlVAR
    reads: Sequence[tuple[int, int]]
    control_first: bool

    def start(self, conditions: Tensor, schedule: ScaleSchedule) -> PairSession:
        return self.model.start(conditions, schedule, self.reads, self.control_first)


@dataclass(frozen=True)
class GivenCells:
    """Draws the cells that are not given, once for all branches.

    The head runs on what is drawn only. The branch that is not forced to the given cells draws them itself, from its
    own logits alone.

    Attributes:
        unforced: that branch's place; None where it does not take part.
        own: the halves of which it has its own maps.
    """

    emitter: CategoricalEmitter
    given: Given
    unforced: int | None
    own: Sequence[int]

    def emit(self, context: ScaleContext) -> Emission:
        start, stop = context.schedule.ranges[context.index]
        tokens, kept = self.given.tokens[:, start:stop].clone(), self.given.kept[start:stop]
        drawn, held = (~kept).nonzero()[:, 0], kept.nonzero()[:, 0]
        codes = context.pyramid.vectors[tokens]
        logits = context.hidden.new_zeros(context.batch, 0, len(context.pyramid.vectors))
        if len(drawn):
            logits = replace(context, hidden=context.hidden[:, drawn]).guided_logits()
            tokens[:, drawn], codes[:, drawn] = self._draw(context, logits)
        parts = [codes]
        if self.unforced is not None:
            codes = codes.clone()
            if len(held):
                rows = slice(self.unforced * context.batch, (self.unforced + 1) * context.batch)
                codes[:, held] = self._draw(context, context.session.logits(context.hidden[:, held], rows))[1]
            parts += [codes.unflatten(1, (2, -1))[:, half] for half in self.own]
        return Emission(tokens, torch.cat(parts, dim=1), logits)

    def _draw(self, context: ScaleContext, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.emitter.draw(logits, context.pyramid.vectors, context.draws, context.index, context.ratio)


@dataclass(frozen=True)
class SeparateBranches:
    """The official form: every branch draws its own tokens from the guided logits, all of them in one draw.

    With the emitter's ``smooth`` the given half is not put back among the soft codes, as officially.
    """

    emitter: CategoricalEmitter
    given: Given

    def emit(self, context: ScaleContext) -> Emission:
        start, stop = context.schedule.ranges[context.index]
        given, kept = self.given.tokens[:, start:stop], self.given.kept[start:stop]
        logits, vectors = context.guided_logits(), context.pyramid.vectors
        rows = logits.repeat(BRANCHES, 1, 1)
        tokens, codes = self.emitter.draw(rows, vectors, context.draws, context.index, context.ratio)
        forced = (BRANCHES - 1) * context.batch
        tokens[:forced] = torch.where(kept, given.repeat(BRANCHES - 1, 1), tokens[:forced])
        if not self.emitter.smooth:
            codes = vectors[tokens]
        side_by_side = codes.unflatten(0, (BRANCHES, -1)).transpose(0, 1).flatten(1, 2)
        return Emission(tokens, side_by_side, logits)


def branch_weights(strengths: Strengths, schedule: ScaleSchedule, forced: bool) -> list[tuple[float, ...]]:
    """How much each branch counts at each scale.

    Args:
        forced: whether anything is given; else three branches do what four would.
    """
    grown = [[strength * schedule.ratio(index) for strength in strengths] for index in range(len(schedule))]
    weights = [(1 + a, b - a, c - b, -c) if forced else (1 + a, b - a, -b) for a, b, c in grown]
    return [tuple(column) for column in zip(*weights, strict=True)]


def sample_pairs(
    model: ControlVAR,
    labels: Int[Tensor, " batch"],
    types: Int[Tensor, " batch"],
    *,
    strengths: Strengths,
    draws: Draws,
    emitter: CategoricalEmitter,
    given: Given | None = None,
    separate: bool = False,
    controls: Sequence[Control] = (),
    control_first: bool = True,
    accepted: Accepted | None = None,
    stop: int | None = None,
) -> Iterator[ScaleStep]:
    """Both halves, scale by scale.

    Args:
        strengths: at the last scale.
        given: cells that are decided.
        separate: let the branches draw each for itself, as officially; with ``given``.

    Returns:
        Steps whose ``total`` is that of a :class:`PairPyramid` of which the first two maps are the halves in sequence
        order; ``tokens`` are in sequence order, with ``separate`` of all branches' rows; ``logits`` of the cells that
        were drawn.
    """
    config, schedule = model.config, model.config.schedule
    null, none = torch.full_like(labels, config.classes), torch.full_like(types, len(config.control_types))
    conditions = [torch.stack(pair, dim=1) for pair in ((labels, types), (null, types), (null, none), (null, none))]
    weights = branch_weights(strengths, schedule, forced=given is not None)
    branches = [Branch(c, w) for c, w in zip(conditions, weights, strict=False) if separate or any(w)]
    reads, chosen = [(0, 1)] * len(branches), emitter
    final: Emitter = chosen
    if given is not None and separate:
        reads = [(2 * i, 2 * i + 1) for i in range(BRANCHES)]
        final = SeparateBranches(emitter, given)
    elif given is not None:
        unforced = len(branches) - 1 if any(weights[-1]) else None
        own = given.halves(schedule) if unforced is not None else []
        if unforced is not None:
            place = {half: 2 + i for i, half in enumerate(own)}
            reads[unforced] = (place.get(0, 0), place.get(1, 1))
        final = GivenCells(emitter, given, unforced, own)
    pyramid = PairPyramid(model.tokenizer.quantizer, 1 + max(max(pair) for pair in reads))
    network = _Network(model, reads, control_first)
    return sample(network, pyramid, schedule, branches, final, draws, controls, accepted, stop)
