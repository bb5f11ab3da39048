"""How DepthART turns logits into codes: several draws per position, averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.heads import filter_logits
from nextscale.core.random import Draws
from nextscale.core.sampling import Emission, ScaleContext

Pick = Literal["drawn", "likeliest", "expected"]
"""Drawn at random with replacement; the likeliest, in falling order; or what infinitely many draws would average to."""


@dataclass(frozen=True)
class AveragedEmitter:
    """Mean of several codes at every position: it lies between codes, unlike what any tokens decode to.

    Attributes:
        samples: codes per position.
        pick: which; ``"expected"`` takes no number of them.
        top_k, top_p: filters of what is drawn or expected; 0 turns them off.
    """

    samples: int = 5
    pick: Pick = "drawn"
    top_k: int = 900
    top_p: float = 0.9

    def __post_init__(self) -> None:
        if self.pick not in get_args(Pick):
            raise ValueError(f"pick is {self.pick!r}; expected one of {', '.join(get_args(Pick))}")
        if self.samples < 1:
            raise ValueError(f"{self.samples} samples were asked for; expected 1 or more")

    def emit(self, context: ScaleContext) -> Emission:
        """One scale: the tokens are (batch, tokens, samples), of which ``codes`` is the mean vector."""
        logits, vectors = context.guided_logits(), context.pyramid.vectors
        if self.pick == "expected":
            probabilities = filter_logits(logits, self.top_k, self.top_p).softmax(-1)
            return Emission(logits.argmax(-1, keepdim=True), probabilities @ vectors, logits)
        tokens = self.tokens(logits, context.draws)
        return Emission(tokens, F.embedding(tokens, vectors).mean(-2), logits)

    def tokens(
        self, logits: Float[Tensor, "batch tokens vocabulary"], draws: Draws
    ) -> Int[Tensor, "batch tokens samples"]:
        """The codes that are averaged.

        Raises:
            ValueError: more of the likeliest are asked for than there are codes.
        """
        if self.pick == "likeliest":
            if self.samples > logits.shape[-1]:
                raise ValueError(f"{self.samples} codes were asked for, the vocabulary has {logits.shape[-1]}")
            # One of them is the argmax, whichever of equal logits a sort would put first.
            return logits.argmax(-1, keepdim=True) if self.samples == 1 else logits.topk(self.samples, -1).indices
        return draws.several(filter_logits(logits, self.top_k, self.top_p).softmax(-1), self.samples)


GREEDY = AveragedEmitter(samples=1, pick="likeliest")
"""The likeliest code alone: DepthVAR's inference, and the predictions that DepthART is trained on."""
