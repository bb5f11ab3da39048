"""VarFormer's prior: a frozen VAR rolled out on a degraded image, steered by that image's own tokens.

Official code siywang541/Varformer, ``varformer_arch.py`` and ``var_modules.py`` (``CrossAttentionAR``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.cache import GradientCache, KeyValueCache
from nextscale.core.cross_attention import CrossAttention, Packed
from nextscale.core.random import ImageDraws
from nextscale.core.sampling import Branch, Emission, Emitter, ScaleContext, roll_out
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.restoration.varformer_network import EncoderMaps


@dataclass(frozen=True)
class Degraded:
    """What the frozen tokenizer tells of a degraded image.

    Attributes:
        maps: of its encoder's levels; the latent there is before the last convolution.
        enhanced: the latent, enhanced, with its gradient.
        tokens: of the enhanced latent.
        latent: what the tokens stand for; its gradient is the enhanced latent's (straight-through).
    """

    maps: EncoderMaps
    enhanced: Float[Tensor, "batch codes h w"]
    tokens: Int[Tensor, "batch length"]
    latent: Float[Tensor, "batch codes h w"]


class SteeringAttention(CrossAttention):
    """Attention whose queries are the degraded image's tokens and whose memory is the prior's hidden states.

    What comes out takes the hidden states' place: nothing is added, nothing normalised.

    Args:
        scrambled: re-read the heads' outputs, (head, row, token, channel), as (row, token, head, channel), as
            published: every row then gets a mixture of rows and tokens, and depends on the batch it is in.
    """

    def __init__(self, width: int, heads: int, scrambled: bool = False) -> None:
        super().__init__(width, heads, width, scale=0.25 / math.sqrt(width // heads))
        self.scrambled = scrambled

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        out = super().attend(query, key, value, visible)
        return out.permute(2, 0, 1, 3).reshape(out.shape) if self.scrambled else out


def packed(x: Float[Tensor, "batch positions width"]) -> Packed:
    """Hidden states as a memory."""
    return Packed(x.flatten(0, 1), (x.shape[1],) * len(x))


class Steered(Protocol):
    """What a roll-out asks of a model: the prior, and the attentions after its first blocks."""

    prior: VAR
    steering: nn.ModuleList


class SteeredPrior:
    """A :class:`nextscale.core.sampling.ScaleNetwork`: the prior under a degraded image's tokens.

    Args:
        inputs: the quantiser's ``teacher_inputs`` of those tokens, one row per image.
    """

    def __init__(self, model: Steered, inputs: Float[Tensor, "batch rest codes"]) -> None:
        self._model, self._inputs = model, inputs

    def start(self, conditions: Int[Tensor, " rows"], schedule: ScaleSchedule) -> SteeredSession:
        return SteeredSession(self._model, self._inputs, len(conditions), schedule)


class SteeredSession:
    """The prior in the middle of a roll-out; all rows are of no class."""

    def __init__(self, model: Steered, inputs: Tensor, rows: int, schedule: ScaleSchedule) -> None:
        self._prior, self._steering, self._rows, self._schedule = model.prior, model.steering, rows, schedule
        prior = self._prior
        null = torch.tensor([prior.config.classes], device=prior.device)
        self._condition = prior.class_embedding(null)  # one row stands for all
        self._modulations = prior.transformer.modulate(self._condition)
        self._head_modulation = prior.head.modulate(self._condition)
        self._inputs = inputs.split(schedule.lengths[1:], dim=1)
        if torch.is_grad_enabled():
            self._cache: KeyValueCache = GradientCache(prior.config.transformer.depth)
        else:
            self._cache = prior.transformer.allocate_cache(rows, schedule.length, self._condition.dtype)

    def _embed(self, inputs: Tensor | None, index: int) -> Tensor:
        start, stop = self._schedule.ranges[index]
        x = self._prior.embed(inputs, self._schedule, start, stop)
        if inputs is None:
            x = x + self._condition[:, None]
        return x.repeat(self._rows // len(x), 1, 1)

    def step(self, index: int, inputs: Tensor | None, first: int | None = None) -> Tensor:
        stack = self._prior.transformer
        x = self._embed(inputs, index)
        queries = x if index == 0 else self._embed(self._inputs[index - 1], index)
        for layer, (block, modulation) in enumerate(zip(stack.blocks, self._modulations, strict=True)):
            x = stack.run_block(block, x, modulation, cache=self._cache, layer=layer)
            if layer < len(self._steering):
                x = self._steering[layer](queries, packed(x))
        return x

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        return self._prior.head(hidden[rows], self._head_modulation)


class Greedy:
    """Takes the likeliest symbol of every token, the first on ties."""

    def emit(self, context: ScaleContext) -> Emission:
        logits = context.guided_logits()
        tokens = logits.argmax(-1)
        return Emission(tokens, F.embedding(tokens, context.pyramid.vectors), logits)


@dataclass(frozen=True)
class RollOut:
    """What the prior makes of a degraded image.

    Attributes:
        tokens: the likeliest of every scale; logits: after guidance.
        total: what the tokens amount to, at the finest grid.
        prior: what each scale adds to the total.
    """

    tokens: Int[Tensor, "batch length"]
    logits: Float[Tensor, "batch length vocabulary"]
    total: Float[Tensor, "batch codes h w"]
    prior: Float[Tensor, "batch scales codes h w"]


def unroll(
    model: Steered,
    inputs: Float[Tensor, "batch rest codes"],
    guidance: Sequence[float] | None = None,
    emitter: Emitter | None = None,
) -> RollOut:
    """Roll the prior out greedily on degraded images; gradients flow where they are enabled.

    Args:
        inputs: the quantiser's ``teacher_inputs`` of the images' tokens.
        guidance: t of every scale in (1 + t) first - t second between two rows per image, which are of one condition
            and differ only where the steering is scrambled; None: one row per image.
        emitter: in place of the greedy one.
    """
    schedule, quantizer = model.prior.config.schedule, model.prior.tokenizer.quantizer
    null = torch.full((len(inputs),), model.prior.config.classes, device=inputs.device)
    branches = [Branch(null, (1.0,) * len(schedule))]
    if guidance is not None:
        branches = [Branch(null, tuple(1 + t for t in guidance)), Branch(null, tuple(-t for t in guidance))]
    draws = ImageDraws([0] * len(inputs))  # nothing is drawn
    network = SteeredPrior(model, inputs)
    steps = list(roll_out(network, quantizer, schedule, branches, emitter or Greedy(), draws))
    with torch.no_grad():
        added = [quantizer.contribution(step.codes, schedule, step.index) for step in steps]
    return RollOut(
        torch.cat([step.tokens for step in steps], dim=1),
        torch.cat([step.logits for step in steps], dim=1),
        steps[-1].total,
        torch.stack(added, dim=1),
    )
