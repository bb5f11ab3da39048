"""The bitwise emitter: every bit of a token has two scores of its own, so the 2^bits symbols are never enumerated.

Han et al. 2024, "Infinity" (arXiv 2412.04431, section 3.3). The head is a
:class:`nextscale.core.heads.CategoricalHead` of 2 x bits outputs: channel 2 k + v is the score that bit k is v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nextscale.core.heads import at_scale
from nextscale.core.random import Draws
from nextscale.core.sampling import Emission, ScaleContext


def margins(logits: Float[Tensor, "*batch twice_bits"]) -> Float[Tensor, "*batch bits"]:
    """By how much the score of 1 exceeds that of 0."""
    pairs = logits.unflatten(-1, (-1, 2))
    return pairs[..., 1] - pairs[..., 0]


def bit_cross_entropy(
    logits: Float[Tensor, "*batch twice_bits"], bits: Bool[Tensor, "*batch bits"]
) -> Float[Tensor, "*batch bits"]:
    """Two-way cross-entropy of each bit."""
    return F.binary_cross_entropy_with_logits(margins(logits).float(), bits.float(), reduction="none")


@dataclass(frozen=True)
class BitwiseEmitter:
    """Draws the bits of a scale from guided scores.

    Attributes:
        top_k: 1 takes each bit's likelier value; more (or 0) filters nothing. One number or one per scale.
        top_p: a bit whose less likely value has a probability of at most 1 - top_p is decided; 0: off. One number or
            one per scale.
        temperature: divides the scores; one number or one per scale.
        given: bits that replace the drawn ones of the first scales, those of whole scales in one sequence.

    Raises:
        ValueError: an option is out of its range.
    """

    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 0.0
    temperature: float | Sequence[float] = 1.0
    given: Bool[Tensor, "batch tokens bits"] | None = None

    def __post_init__(self) -> None:
        for name, values, fits, wanted in (
            ("top_k", self.top_k, lambda k: k >= 0, "0 or more"),
            ("top_p", self.top_p, lambda p: 0 <= p <= 1, "0 to 1"),
            ("temperature", self.temperature, lambda t: t > 0, "more than 0; top_k=1 always takes the likelier bit"),
        ):
            if not all(fits(value) for value in (values if isinstance(values, Sequence) else (values,))):
                raise ValueError(f"{name} is {values}; expected {wanted}")

    def emit(self, context: ScaleContext) -> Emission:
        """Draw one scale from the guided scores; the emission's logits are divided by the temperature."""
        logits = context.guided_logits()
        temperature = at_scale(self.temperature, context.index)
        if temperature != 1:
            logits = logits / temperature
        bits = self.draw(logits, context.draws, context.index)
        bits = self._given(bits, *context.schedule.ranges[context.index])
        zero, one = context.pyramid.vectors[:, 0]
        return Emission(bits, torch.where(bits, one, zero), logits)

    def probabilities(self, logits: Tensor, index: int) -> Float[Tensor, "batch tokens bits"]:
        """That each bit is 1, after the filters of scale ``index``."""
        margin = margins(logits)
        ones = margin.sigmoid()
        decided = torch.zeros_like(margin, dtype=torch.bool)
        if at_scale(self.top_k, index) == 1:
            decided = margin != 0
        top_p = at_scale(self.top_p, index)
        if top_p:
            decided = decided | (torch.minimum(ones, 1 - ones) <= 1 - top_p)
        return torch.where(decided, (margin >= 0).to(ones.dtype), ones)

    def draw(self, logits: Tensor, draws: Draws, index: int) -> Bool[Tensor, "batch tokens bits"]:
        """The bits of scale ``index``, one draw each."""
        ones = self.probabilities(logits, index)
        return draws.bits(ones.flatten(1)).view(ones.shape)

    def _given(self, bits: Tensor, start: int, stop: int) -> Tensor:
        """The given bits of the flat positions [start, stop) where there are any, else the drawn ones.

        They replace what was drawn: so the random numbers of later scales do not depend on them.
        """
        if self.given is None or stop > self.given.shape[1]:
            return bits
        return self.given[:, start:stop].to(device=bits.device, dtype=torch.bool)
