"""Emitters: from hidden states to a scale's symbols, with their loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.fused import linear
from nextscale.core.random import Draws
from nextscale.core.sampling import Emission, ScaleContext
from nextscale.core.transformer import Modulation


class CategoricalHead(nn.Module):
    """One of ``vocabulary`` symbols per token: logits = Linear(LN(x) (1 + scale) + shift)."""

    def __init__(self, width: int, vocabulary: int, norm_eps: float = 1e-6, condition_width: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=False)
        self.modulation = Modulation(condition_width or width, width, 2)
        self.linear = nn.Linear(width, vocabulary)

    def modulate(self, condition: Float[Tensor, "batch condition"]) -> Float[Tensor, "batch 1 2 width"]:
        """Scale and shift: depend on the condition alone, so once per call serves all scales."""
        return self.modulation(condition)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], modulation: Float[Tensor, "batch 1 2 width"]
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        """Logits, float32."""
        scale, shift = modulation.unbind(2)
        normed = torch.addcmul(shift, self.norm(x.to(shift.dtype)), 1 + scale)
        return linear(self.linear, normed.to(self.linear.weight.dtype)).float()


SPARE = 64
"""How many choices as likely as the k-th are looked for beside it; half precision has that many."""


def filter_logits(logits: Float[Tensor, "... choices"], top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Drop unlikely choices (set to -inf): first top-k, then nucleus; 0 turns either off.

    Everything strictly below the k-th largest goes, so ties stay. Of what is left, choices go from the least
    likely up while their probabilities sum to at most 1 - ``top_p``; the likeliest always stays.

    Raises:
        ValueError: ``top_k`` is negative or ``top_p`` outside [0, 1].
    """
    if top_k < 0 or not 0 <= top_p <= 1:
        raise ValueError(f"top_k is {top_k} and top_p {top_p}; expected top_k >= 0 and 0 <= top_p <= 1")
    likeliest: Tensor | None = None
    if top_k and top_k < logits.shape[-1]:
        likeliest = logits.topk(min(top_k + SPARE, logits.shape[-1]), dim=-1).values
        least = likeliest[..., top_k - 1 : top_k]
        logits, likeliest = (torch.where(choices < least, -torch.inf, choices) for choices in (logits, likeliest))
    if not top_p:
        return logits
    if likeliest is not None and logits.device.type == "cpu":
        return _nucleus_of_few(logits, likeliest, top_p)
    return _nucleus(logits, top_p)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    ordered, order = logits.sort(dim=-1)
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[..., -1] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def _nucleus_of_few(
    logits: Float[Tensor, "... choices"], likeliest: Float[Tensor, "... few"], top_p: float
) -> Float[Tensor, "... choices"]:
    """The same, without the slow sort of all choices.

    Args:
        likeliest: what top-k left, and more that it dropped, in falling order.
    """
    few = likeliest.shape[-1]
    drop = likeliest.flip(-1).softmax(-1).cumsum(-1) <= 1 - top_p
    dropped = drop[..., :-1].sum(-1)
    least = likeliest.gather(-1, few - 1 - dropped[..., None])
    filtered = torch.where(logits < least, -torch.inf, logits)
    # Where equal choices lie across an edge, it is the order within the sort that tells which of them stay.
    undecided = (logits > -torch.inf).sum(-1) != (likeliest > -torch.inf).sum(-1)
    undecided |= (filtered > -torch.inf).sum(-1) != few - dropped
    if undecided.any():
        filtered[undecided] = _nucleus(logits[undecided], top_p)
    return filtered


@dataclass(frozen=True)
class CategoricalEmitter:
    """Draws symbols from guided logits.

    Attributes:
        top_k, top_p: filters, one number or one per scale; 0 turns them off.
        temperature: divides the filtered logits that symbols are drawn from; one number or one per scale.
        smooth: mix codes by a Gumbel-softmax that hardens towards the last scale instead of taking the drawn
            code: softer pictures (VAR's ``more_smooth``), for looking at, not for measuring. The mixture has that
            hardness of its own; ``temperature`` does not enter it.
    """

    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 0.0
    temperature: float | Sequence[float] = 1.0
    smooth: bool = False

    def __post_init__(self) -> None:
        temperatures = self.temperature if isinstance(self.temperature, Sequence) else (self.temperature,)
        if not all(temperature > 0 for temperature in temperatures):
            raise ValueError(
                f"temperature is {self.temperature}, it must be above 0; top_k=1 always takes the likeliest"
            )

    def probabilities(self, logits: Tensor, index: int) -> Tensor:
        """Softmax of the filtered logits of scale ``index``."""
        return self._softmax(self._filtered(logits, index), index)

    def _filtered(self, logits: Tensor, index: int) -> Tensor:
        return filter_logits(logits, int(at_scale(self.top_k, index)), at_scale(self.top_p, index))

    def _softmax(self, filtered: Tensor, index: int) -> Tensor:
        temperature = at_scale(self.temperature, index)
        return (filtered if temperature == 1 else filtered / temperature).softmax(-1)

    def emit(self, context: ScaleContext) -> Emission:
        """Draw one scale from the guided logits."""
        logits = context.guided_logits()
        tokens, codes = self.draw(logits, context.pyramid.vectors, context.draws, context.index, context.ratio)
        return Emission(tokens, codes, logits)

    def draw(
        self,
        logits: Float[Tensor, "batch tokens vocabulary"],
        vectors: Float[Tensor, "vocabulary channels"],
        draws: Draws,
        index: int,
        ratio: float,
    ) -> tuple[Int[Tensor, "batch tokens"], Float[Tensor, "batch tokens channels"]]:
        """Symbols and their code vectors, or mixtures of codes.

        Args:
            index: the scale's place in the list; ``ratio`` its place as 0 to 1.
        """
        filtered = self._filtered(logits, index)
        tokens = draws.categorical(self._softmax(filtered, index))
        if not self.smooth:
            return tokens, F.embedding(tokens, vectors)
        return tokens, gumbel_weights(filtered, draws, ratio) @ vectors


def gumbel_weights(
    logits: Float[Tensor, "batch tokens vocabulary"], draws: Draws, ratio: float
) -> Float[Tensor, "batch tokens vocabulary"]:
    """How much each code counts in a mixture that hardens towards the last scale: a Gumbel-softmax.

    Args:
        ratio: the scale's place in the list, 0 to 1.
    """
    tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
    gumbel = -draws.exponential(logits.shape, logits.device).log()
    return ((logits * (1 + ratio) + gumbel) / tau).softmax(-1)


def at_scale(value: float | Sequence[float], index: int) -> float:
    """An option's value at scale ``index``: one number for all, or one for each.

    Raises:
        ValueError: there are too few.
    """
    if not isinstance(value, Sequence):
        return value
    if index >= len(value):
        raise ValueError(
            f"{list(value)} has {len(value)} entries, one is needed for each scale: give more, or one number"
        )
    return value[index]
