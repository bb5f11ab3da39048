"""STAR in the middle of sampling: texts are read once; fine scales are filled step by step by the stable sampler.

Ma et al. 2024 (arXiv 2406.10797, section 3.4); official code Davinci-XLab/STAR-T2I, ``models/var_drop.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nextscale.core.cross_attention import Memory
from nextscale.core.heads import CategoricalEmitter, at_scale, gumbel_weights
from nextscale.core.random import BatchDraws, Draws
from nextscale.core.sampling import Emission, ScaleContext
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.star_config import SampleVersion
from nextscale.tasks.generation.star_head import commit_counts
from nextscale.tasks.generation.text import TextFeatures

if TYPE_CHECKING:
    from nextscale.tasks.generation.star import STAR

RANDOM_STEPS = 5
"""Steps of the stable sampler in which chance says which tokens are kept; in version "1024" the backbone draws them."""
LAST_BACKBONE_SCALE = 12
"""In version "1024" scales behind this place are drawn by the sampling head alone, in more steps."""


class TextNetwork:
    """STAR with the texts it is to draw; conditions are their numbers.

    What depends on a text alone is computed here, once, however many images and scales it serves.

    Args:
        text: the wanted texts.
        other: as many to stay away from; None: without guidance.
        schedule: all scales that will be drawn.
        share_first: where the blocks let the first row read for all: the first image reads for the whole batch, as in
            the official code; else each image is drawn as if it were alone in its batch.
    """

    def __init__(
        self,
        model: STAR,
        text: TextFeatures,
        other: TextFeatures | None,
        schedule: ScaleSchedule,
        share_first: bool = False,
    ) -> None:
        self.model, self.branches = model, 1 if other is None else 2
        self.reading = model.config.transformer.cross_attention
        self.share_first = share_first
        every = text if other is None else TextFeatures.join([text, other])
        with torch.inference_mode():
            every = every.to(model.device, model.dtype)
            pooled = every.vectors()
            self.start_text = model.text_embedding(pooled)
            self.stable_text = None if model.stable is None else model.stable.read(pooled)
            # Texts to stay away from are not read where the first row, or each image's first, reads for all.
            read = every.states if self.reading == "own" else every.states.select(range(len(text)))
            self.memories = model.transformer.remember(read)
            self.modulations = model.modulations(schedule)

    def start(self, conditions: Int[Tensor, " rows"], schedule: ScaleSchedule) -> STARSession:
        """See :class:`nextscale.core.sampling.ScaleNetwork`."""
        return STARSession(self, conditions, schedule)


class STARSession:
    """See :class:`nextscale.core.sampling.Session`."""

    def __init__(self, network: TextNetwork, rows: Tensor, schedule: ScaleSchedule) -> None:
        self._network, self._schedule, self._rows = network, schedule, len(rows)
        model = network.model
        self._start = network.start_text[rows]
        self._stable_text = None if network.stable_text is None else network.stable_text[rows]
        images = 1 if network.share_first else len(rows) // network.branches
        readers = rows if network.reading == "own" else rows[:images]
        self._memories = [Memory(each.key, each.value, each.visible, readers) for each in network.memories]
        self._rotation = model.rotation(schedule)
        self.cache = model.transformer.allocate_cache(self._rows, schedule.length, model.dtype)

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        model, schedule = self._network.model, self._schedule
        begin, stop = index if first is None else first, schedule.ranges[index][1]
        start = schedule.ranges[begin][0]
        modulations = self._network.modulations
        if modulations is not None:
            levels = schedule.levels(model.device)[start:stop] if begin != index else torch.tensor([index])
            modulations = [each[:, levels] for each in modulations]
        return model.transformer(
            model.embed(self._start, inputs, schedule, start, stop),
            modulations,
            schedule.causal(begin, index),
            self.cache,
            rotation=None if self._rotation is None else self._rotation[start:stop],
            memory=self._memories,
        )

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        return self._network.model.scores(hidden[rows])

    def stable_logits(
        self, index: int, hidden: Tensor, rows: slice, codes: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "rows tokens vocabulary"]:
        """The sampling head, on some rows of :meth:`step`'s output.

        Args:
            codes: of the tokens that are known, zeros elsewhere.
        """
        head = self._network.model.stable
        assert head is not None and self._stable_text is not None
        return head(self._stable_text[rows], hidden[rows], codes, self._schedule, index, index, self._rotation)


class ReleasedDraws(BatchDraws):
    """The release's random numbers: symbols from one generator, which tokens are kept from the global one.

    The global generator is seeded alike there, and on a CPU one tensor of it is drawn at every step and not used.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__(torch.Generator(device).manual_seed(seed))
        self._noise = torch.Generator(device).manual_seed(seed)

    def begin_step(self, images: int, tokens: int) -> None:
        """What is drawn and not used; there is a row for each image and one for its empty text."""
        if self._noise.device.type == "cpu":
            torch.rand(2 * images, tokens, generator=self._noise)

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return torch.rand(tuple(shape), device=device, generator=self._noise)


@dataclass
class Filling:
    """A scale that the stable sampler has filled.

    Attributes:
        known_at: the step at which each token became known.
        logits: after guidance, of the last step that was computed.
    """

    tokens: Int[Tensor, "batch tokens"]
    known_at: Int[Tensor, "batch tokens"]
    logits: Float[Tensor, "batch tokens vocabulary"]


@dataclass(frozen=True)
class STAREmitter:
    """Draws each scale at once, fine ones by the stable sampler.

    Stable sampling of a scale: in each of several steps all tokens are drawn, and some of those not yet known become
    known, at first by chance, later the surest. In version ``"new"`` the sampling head gives all the scores, from what
    is known; in ``"1024"``, up to the thirteenth scale, the backbone's serve for the first five steps, where the surest
    tokens are kept besides. ``"old"`` is ``"new"`` with filters of its own for scales drawn at once: top-p 0.8, and
    top-k 300 from the tenth scale, 100 from the thirteenth; scales behind them keep the last of these filters.

    Attributes:
        strengths: of guidance, per scale; in the sampling head it does not grow with the scale.
        stable_from: first scale that the stable sampler fills; None: none.
        top_k, top_p, temperature: see :class:`nextscale.core.heads.CategoricalEmitter`.
        smooth: scales drawn at once mix codes, unfiltered, instead of taking the drawn ones.
    """

    strengths: Sequence[float]
    stable_from: int | None = None
    version: SampleVersion = "1024"
    top_k: int | Sequence[int] = 600
    top_p: float | Sequence[float] = 0.8
    temperature: float | Sequence[float] = 1.0
    smooth: bool = False

    def __post_init__(self) -> None:
        self._filters(0)  # says what is wrong with them

    def emit(self, context: ScaleContext) -> Emission:
        """See :class:`nextscale.core.sampling.Emitter`."""
        vectors, draws = context.pyramid.vectors, context.draws
        if self.stable_from is not None and context.index >= self.stable_from:
            filling = self.fill(context)
            return Emission(filling.tokens, F.embedding(filling.tokens, vectors), filling.logits)
        logits = context.guided_logits()
        if self.smooth:
            weights = gumbel_weights(logits, draws, context.ratio)
            return Emission(weights.argmax(-1), weights @ vectors, logits)
        tokens = draws.categorical(self._probabilities(logits, context.index))
        return Emission(tokens, F.embedding(tokens, vectors), logits)

    def _filters(self, index: int) -> CategoricalEmitter:
        top_k, top_p = int(at_scale(self.top_k, index)), at_scale(self.top_p, index)
        if self.version == "old" and not self.smooth:
            drawn = index if self.stable_from is None else min(index, self.stable_from - 1)
            if drawn >= 0:
                top_p = 0.8
            if drawn >= 9:
                top_k = 300 if drawn < 12 else 100
        return CategoricalEmitter(top_k, top_p, at_scale(self.temperature, index))

    def _probabilities(self, logits: Tensor, index: int) -> Tensor:
        return self._filters(index).probabilities(logits, index)

    # --- the stable sampler ------------------------------------------------------------------------------

    def steps(self, index: int) -> tuple[int, int]:
        """How many steps a scale takes, and in how many of them the backbone's scores serve."""
        if self.version != "1024":
            return 8, 0
        return (8, RANDOM_STEPS) if index <= LAST_BACKBONE_SCALE else (15, 0)

    def fill(self, context: ScaleContext) -> Filling:
        """Fill one scale. What is known stays; once all is, the network is not asked again."""
        index, draws, device = context.index, context.draws, context.hidden.device
        shape = (context.batch, context.schedule.lengths[index])
        steps, of_backbone = self.steps(index)
        known = torch.zeros(shape, dtype=torch.bool, device=device)
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
        known_at = torch.zeros_like(tokens)
        logits = probabilities = torch.empty(0)
        if of_backbone:
            logits = context.guided_logits()
            probabilities = self._probabilities(logits, index)
        for step, count in enumerate(commit_counts(shape[1], steps)):
            if isinstance(draws, ReleasedDraws):
                draws.begin_step(*shape)
            if known.all():
                # An image's later draws must not depend on when the others of its batch were done.
                _pass(draws, (*shape, len(context.pyramid.vectors)), step, device)
                continue
            if step >= of_backbone:
                codes = F.embedding(tokens, context.pyramid.vectors) * known[..., None]
                logits = self.head_logits(context, codes)
                probabilities = self._probabilities(logits, index)
            drawn = draws.categorical(probabilities)
            sureness = probabilities.gather(-1, drawn[..., None])[..., 0]
            kept = surest(sureness, count) if step < of_backbone else torch.zeros_like(known)
            # Left to chance are those that sureness has not just decided.
            confidence = draws.uniform(shape, device) if step < RANDOM_STEPS else sureness
            kept = (kept | surest(confidence * ~(known | kept), count)) & ~known
            tokens, known_at = torch.where(kept, drawn, tokens), torch.where(kept, step, known_at)
            known = known | kept
        return Filling(tokens, known_at, logits)

    def head_logits(
        self, context: ScaleContext, codes: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        """The sampling head's scores, after guidance; branches of weight 0 are not computed."""
        strength = self.strengths[context.index] if len(context.branches) > 1 else 0.0
        session = cast(STARSession, context.session)
        rows = slice(None) if strength else slice(context.batch)
        parts = session.stable_logits(context.index, context.hidden, rows, codes).split(context.batch)
        return torch.add(parts[0] * (1 + strength), parts[1], alpha=-strength) if strength else parts[0]


def surest(confidence: Float[Tensor, "batch tokens"], count: int) -> Bool[Tensor, "batch tokens"]:
    """Where the ``count`` largest values of each row are."""
    chosen = confidence.topk(min(max(count, 0), confidence.shape[1]), dim=-1).indices
    return torch.zeros_like(confidence, dtype=torch.bool).scatter(1, chosen, True)


def _pass(draws: Draws, shape: tuple[int, int, int], step: int, device: torch.device) -> None:
    """Draw what a step would have drawn."""
    draws.categorical(torch.full(shape, 1 / shape[2], device=device))
    if step < RANDOM_STEPS:
        draws.uniform(shape[:2], device)
