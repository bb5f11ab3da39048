"""How much of their room the bits of bitwise tokens use, where codes are too many to be counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextscale.evaluation.reconstruction import ScaleUsage


class BitUsage:
    """Running counts of the ones of every bit at every scale."""

    def __init__(self, bits: int, scales: int) -> None:
        if bits < 1 or scales < 1:
            raise ValueError(f"tokens of {bits} bits and {scales} scales; expected 1 or more of each")
        self.ones = torch.zeros(scales, bits, dtype=torch.int64)
        self.tokens = torch.zeros(scales, dtype=torch.int64)

    def update(self, tokens: Sequence[Tensor]) -> None:
        """Take in one batch of pyramids: per scale, bits (..., bits)."""
        scales, bits = self.ones.shape
        if len(tokens) != scales or any(scale.shape[-1] != bits for scale in tokens):
            raise ValueError(f"tokens of {len(tokens)} scales were given; expected {scales} of {bits} bits")
        for number, scale in enumerate(tokens):
            flat = scale.detach().reshape(-1, bits).cpu()
            self.ones[number] += flat.long().sum(0)
            self.tokens[number] += len(flat)

    def per_scale(self) -> list[ScaleUsage]:
        """One entry per scale, coarse to fine.

        used: share of the bits that were both 0 and 1. entropy: of all bits, each by itself, in bits: an upper bound of
        the codes' entropy. perplexity: 2 to the entropy.
        """
        return [_usage(ones, int(count)) for ones, count in zip(self.ones, self.tokens, strict=True)]

    def overall(self) -> ScaleUsage:
        """Over the tokens of all scales together."""
        return _usage(self.ones.sum(0), int(self.tokens.sum()))


def _usage(ones: Tensor, count: int) -> ScaleUsage:
    share = ones.double() / max(count, 1)
    both = torch.stack([share, 1 - share])
    entropy = float(torch.special.entr(both).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64)))
    used = float(((ones > 0) & (ones < count)).double().mean())
    return ScaleUsage(count, used, entropy, 2**entropy if count else 0.0)
