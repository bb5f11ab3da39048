"""G3PT's one building block, cross-scale querying: learned queries attend to a set, of points or of latents.

Zhang et al. 2024, "G3PT" (arXiv 2409.06322); the form of encodings and blocks is that of 3DShape2VecSet (Zhang et al.
2023, arXiv 2301.11445).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.cross_attention import CrossAttention, Memory, Packed
from nextscale.core.transformer import FeedForward, NextScaleTransformer, TransformerConfig


class PointEncoding(nn.Module):
    """Points in [-1, 1]^3 as vectors: a linear map of sines and cosines at octaves, the coordinates, and ``more``.

    Args:
        octaves: frequencies pi, 2 pi, 4 pi, …
        more: numbers of each point beside its place, such as a normal.
    """

    def __init__(self, width: int, octaves: int, more: int = 0) -> None:
        super().__init__()
        self.octaves, self.more = octaves, more
        self.linear = nn.Linear(3 * (2 * octaves + 1) + more, width)

    def forward(
        self, points: Float[Tensor, "*batch 3"], more: Float[Tensor, "*batch more"] | None = None
    ) -> Float[Tensor, "*batch width"]:
        """Sines and cosines are taken in float32; ``more`` None: zeros."""
        angles = points.float()[..., None] * (math.pi * 2.0 ** torch.arange(self.octaves, device=points.device))
        waves = torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2)
        parts = [waves, points.float()]
        if self.more:
            parts.append(points.new_zeros(*points.shape[:-1], self.more) if more is None else more.float())
        return self.linear(torch.cat(parts, dim=-1).to(self.linear.weight.dtype))


class QueryAttention(nn.Module):
    """Attn(Q; K): x = Q + attention(LN(Q); LN(K)), then x + feed-forward(LN(x)).

    The keys carry no order: whatever tells them apart must be in them.
    """

    def __init__(self, width: int, heads: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = CrossAttention(width, heads, width)
        self.feed_forward = FeedForward(width, round(width * ratio))

    def remember(self, keys: Float[Tensor, "batch keys width"]) -> Memory:
        """What depends on the keys alone: serves any number of queries."""
        normed = self.norm(keys)
        return self.attention.remember(Packed(normed.flatten(0, 1), (normed.shape[1],) * len(normed)))

    def forward(
        self, queries: Float[Tensor, "batch queries width"], keys: Float[Tensor, "batch keys width"] | Memory
    ) -> Float[Tensor, "batch queries width"]:
        memory = keys if isinstance(keys, Memory) else self.remember(keys)
        x = queries + self.attention(self.norm(queries), memory)
        return x + self.feed_forward(self.norm(x))


def latent_blocks(width: int, heads: int, depth: int) -> NextScaleTransformer:
    """Self-attention layers over a set of latents."""
    config = TransformerConfig(
        width, depth, heads, conditioning="none", attention="dot", attention_scale=1 / math.sqrt(width // heads)
    )
    return NextScaleTransformer(config)
