"""From the quantised maps of an object to its planes: a transformer over the cells of all planes, then a decoder.

The decoder of SAR3D's tokenizer (Chen et al. 2024, arXiv 2411.16856; blocks of Peebles and Xie 2023, DiT).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.attention import attend

PLANES = 3


@dataclass(frozen=True)
class PlanesConfig:
    """The transformer over the cells of all planes.

    Attributes:
        depth: blocks; the even ones attend within a plane, the odd ones over all.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")


class PatchEmbedding(nn.Module):
    """Latent planes -> tokens, plane after plane.

    Output channel c of a convolution in three groups is feature c // 3 of plane c mod 3, so that the tokens of every
    plane are made of all three latent planes, in thirds. Published weights rely on it.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(PLANES * channels, PLANES * width, 3, padding=1, groups=PLANES)

    def forward(self, latent: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens width"]:
        maps = self.conv(latent).unflatten(1, (-1, PLANES))
        return maps.flatten(3).permute(0, 2, 3, 1).flatten(1, 2)


class PlaneBlock(nn.Module):
    """Attention and a feed-forward network, shifted, scaled and gated by a condition per token.

    The condition's chunks come in DiT's order: shift, scale, gate of the attention, then of the network, which has no
    biases.
    """

    def __init__(self, config: PlanesConfig) -> None:
        super().__init__()
        width, hidden = config.width, round(config.width * config.mlp_ratio)
        self.heads = config.heads
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], condition: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens width"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + gate1 * self.projection(attend(q, k, v, q.shape[-1] ** -0.5).flatten(2))
        hidden = F.gelu(self.expand(self.norm(x) * (1 + scale2) + shift2))
        return x + gate2 * self.contract(hidden)


class PlaneTransformer(nn.Module):
    """Learned positions, changed block by block under the tokens as condition."""

    def __init__(self, config: PlanesConfig, cells: int) -> None:
        super().__init__()
        self.position_embedding = nn.Parameter(torch.randn(1, PLANES * cells, config.width) * 0.02)
        self.blocks = nn.ModuleList(PlaneBlock(config) for _ in range(config.depth))

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Hidden states of all planes' cells, plane after plane.

        Raises:
            ValueError: there are other numbers of cells than the model has positions.
        """
        if tokens.shape[1] != self.position_embedding.shape[1]:
            raise ValueError(
                f"there are {tokens.shape[1]} tokens, the decoder has {self.position_embedding.shape[1]} positions: "
                "the scales must end at the grid it was made for"
            )
        x = self.position_embedding.expand_as(tokens)
        for number, block in enumerate(self.blocks):
            if number % 2:
                x = block(x, tokens)
            else:
                parts = (part.unflatten(1, (PLANES, -1)).flatten(0, 1) for part in (x, tokens))
                x = block(*parts).unflatten(0, (-1, PLANES)).flatten(1, 2)
        return x
