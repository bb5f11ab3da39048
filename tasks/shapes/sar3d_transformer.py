"""SAR3D's network around the shared core: blocks that look at the features of a picture or of a text.

Chen et al. 2024, "SAR3D" (arXiv 2411.16856, section 3.3); official code cyw-3d/SAR3D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.attention import Visibility
from nextscale.core.cache import KeyValueCache
from nextscale.core.cross_attention import CrossAttention, Memory, Packed
from nextscale.core.transformer import Block, NextScaleTransformer, TransformerConfig


@dataclass(frozen=True)
class SAR3DBlocksConfig(TransformerConfig):
    """Attributes:

    memory_width: channels of the features that blocks attend to.
    look: whether a block looks at them ``"before"`` its self-attention, as for pictures, or ``"after"`` it, for texts.
    """

    memory_width: int = 1024
    look: Literal["before", "after"] = "before"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.look not in ("before", "after"):
            raise ValueError(f"look is {self.look!r}, expected 'before' or 'after'")
        if self.attention == "dot" and self.memory_width % self.heads:
            raise ValueError(f"features of {self.memory_width} channels do not divide into {self.heads} heads")


class RootMeanSquare(nn.Module):
    """x / max(|x| / sqrt(width), 1e-5) times a gain per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length * x.shape[-1] ** -0.5).clamp_min(1e-5)
        return (x / scale * self.gain).to(x.dtype)


class SAR3DBlock(Block):
    """:class:`nextscale.core.transformer.Block` with a look at features, neither modulated nor gated."""

    def __init__(self, config: SAR3DBlocksConfig, condition_width: int, drop_probability: float) -> None:
        super().__init__(config, condition_width, drop_probability)
        # Without unit queries the published scale is that of the features' width, not of the queries'.
        scale = 0.25 / math.sqrt(config.memory_width // config.heads)
        cosine = config.attention == "cosine"
        self.cross_norm = RootMeanSquare(config.width)
        self.cross_attention = CrossAttention(
            config.width, config.heads, config.memory_width, cosine=cosine, scale=scale
        )
        self.look_first = config.look == "before"

    def look(self, x: Tensor, memory: Memory | Packed) -> Tensor:
        branch = self.cross_attention(self.cross_norm(x), memory)
        return x + self.dropped(branch, 2)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch positions width"],
        modulation: Float[Tensor, "batch 1 6 width"],
        segments: Visibility | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        *,
        memory: Memory | Packed,
    ) -> Float[Tensor, "batch positions width"]:
        """Run the block; ``memory``: the features' keys and values, or the features."""
        if self.look_first:
            return super().forward(self.look(x, memory), modulation, segments, cache, layer)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        branch = self.attention(torch.addcmul(shift1, self.norm(x), 1 + scale1), segments, cache, layer)
        x = torch.addcmul(x, self.dropped(branch, 0), gamma1)
        x = self.look(x, memory)
        branch = self.feed_forward(torch.addcmul(shift2, self.norm(x), 1 + scale2))
        return torch.addcmul(x, self.dropped(branch, 1), gamma2)


class SAR3DTransformer(NextScaleTransformer):
    """A stack of :class:`SAR3DBlock`."""

    def __init__(self, config: SAR3DBlocksConfig) -> None:
        super().__init__(config, block=cast("type[Block]", SAR3DBlock))

    def remember(self, features: Packed) -> list[Memory]:
        """Every block's keys and values of the features: once per call, for all scales."""
        return [cast(SAR3DBlock, block).cross_attention.remember(features) for block in self.blocks]

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch positions width"],
        modulations: Sequence[Tensor],
        segments: Visibility | None = None,
        cache: KeyValueCache | None = None,
        *,
        memory: Packed | Sequence[Memory],
    ) -> Float[Tensor, "batch positions width"]:
        """Run the blocks; the first four arguments as in the core.

        Args:
            memory: the features, which each block projects, or what :meth:`remember` made of them.
        """
        for layer, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True)):
            seen = memory if isinstance(memory, Packed) else memory[layer]
            x = self.run_block(block, x, modulation, segments, cache, layer, memory=seen)
        return x
