"""DAR's transformer: tokens of all scales so far, which look at each other and at the image.

Pre-norm blocks of self-attention, cross-attention to the image's features and a feed-forward network, with long skips
from the first half of the blocks to the second (as in U-ViT). Positions are given by nothing but the tokens
themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.attention import Visibility, attend, attend_segments
from nextscale.core.cache import KeyValueCache
from nextscale.core.transformer import StochasticDepth


@dataclass(frozen=True)
class DARTransformerConfig:
    """Attributes:

    width, depth, heads: of the blocks.
    token_width: channels of the tokens that enter and leave.
    memory_width: channels of the image's features.
    long_skips: the outputs of the first blocks are joined to the inputs of the last, outermost to outermost; the depth
        must then be odd.
    drop_path: probability of skipping a branch of the last block in training, rising linearly from 0.
    """

    width: int = 2048
    depth: int = 9
    heads: int = 8
    token_width: int = 1536
    memory_width: int = 1536
    mlp_ratio: float = 4.0
    attention_bias: bool = True
    long_skips: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")
        if self.long_skips and self.depth % 2 == 0:
            raise ValueError(f"{self.depth} blocks cannot be joined in pairs around a middle one: give an odd number")


class SelfAttention(nn.Module):
    """Multi-head attention, scaled by 1 / sqrt(head size)."""

    def __init__(
        self, width: int, heads: int, *, bias: bool = True, dropout: float = 0.0, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, 1 / math.sqrt(width // heads)
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.projection = nn.Linear(width, width)

    def forward(
        self, x: Tensor, segments: Visibility | None = None, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if self.attention_dropout and self.training:
            if segments is not None:
                raise ValueError("attention dropout and segments do not go together: train scale by scale")
            out = _attend_dropping(q, k, v, self.scale, self.attention_dropout)
        elif segments is None:
            out = attend(q, k, v, self.scale)
        else:
            out = attend_segments(q, k, v, self.scale, segments)
        return F.dropout(self.projection(out.flatten(2)), self.dropout, self.training)


class ImageAttention(nn.Module):
    """From tokens to the image's features, whose keys and values serve all scales."""

    def __init__(self, config: DARTransformerConfig) -> None:
        super().__init__()
        self.config, self.scale = config, 1 / math.sqrt(config.width // config.heads)
        self.query = nn.Linear(config.width, config.width, bias=config.attention_bias)
        self.key_value = nn.Linear(config.memory_width, 2 * config.width, bias=config.attention_bias)
        self.projection = nn.Linear(config.width, config.width)

    def remember(self, memory: Float[Tensor, "batch features channels"]) -> tuple[Tensor, Tensor]:
        """Keys and values, (batch, features, heads, head size)."""
        key, value = self.key_value(memory).unflatten(-1, (2, self.config.heads, -1)).unbind(2)
        return key, value

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        config = self.config
        query = self.query(x).unflatten(-1, (config.heads, -1))
        if config.attention_dropout and self.training:
            out = _attend_dropping(query, *memory, self.scale, config.attention_dropout)
        else:
            out = attend(query, *memory, self.scale)
        return F.dropout(self.projection(out.flatten(2)), config.dropout, self.training)


def _attend_dropping(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale).transpose(1, 2)


class FeedForward(nn.Module):
    """Linear, GELU (exact), Linear."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.contract(F.gelu(self.expand(x))), self.dropout, self.training)


class DARBlock(StochasticDepth):
    """x += self-attention, x += attention to the image, x += feed-forward, each behind a layer norm of its own."""

    def __init__(self, config: DARTransformerConfig, joins: bool, drop_probability: float) -> None:
        super().__init__()
        width, self.drop_probability = config.width, drop_probability
        self.join = nn.Linear(2 * width, width) if joins else None
        self.norm_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(
            width,
            config.heads,
            bias=config.attention_bias,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
        )
        self.norm_query, self.image_attention = nn.LayerNorm(width), ImageAttention(config)
        self.norm_memory = nn.LayerNorm(config.memory_width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, int(width * config.mlp_ratio), config.dropout)

    def remember(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        return self.image_attention.remember(self.norm_memory(memory))

    def forward(
        self,
        x: Tensor,
        memory: tuple[Tensor, Tensor],
        joined: Tensor | None,
        segments: Visibility | None,
        cache: KeyValueCache | None,
        layer: int,
    ) -> Tensor:
        if self.join is not None:
            x = self.join(torch.cat((x, cast(Tensor, joined)), dim=-1))
        x = x + self.dropped(self.attention(self.norm_attention(x), segments, cache, layer), 0)
        x = x + self.dropped(self.image_attention(self.norm_query(x), memory), 1)
        return x + self.dropped(self.feed_forward(self.norm_feed_forward(x)), 2)


class DARTransformer(nn.Module):
    """Tokens -> tokens, of ``token_width`` channels."""

    def __init__(self, config: DARTransformerConfig) -> None:
        super().__init__()
        self.config, depth = config, config.depth
        self.enter = nn.Linear(config.token_width, config.width)
        rates = [config.drop_path * i / max(depth - 1, 1) for i in range(depth)]
        modules = nn.ModuleList(
            DARBlock(config, config.long_skips and i > depth // 2, rate) for i, rate in enumerate(rates)
        )
        self.blocks = cast("Sequence[DARBlock]", modules)
        self.leave = nn.Linear(config.width, config.token_width)
        self._draw()

    def _draw(self) -> None:
        """Xavier's uniform distribution, for queries, keys and values each on its own; no biases."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                parts = {"qkv": 3, "key_value": 2}.get(name.rsplit(".", 1)[-1], 1)
                bound = math.sqrt(6 / (module.out_features / parts + module.in_features))
                nn.init.uniform_(module.weight, -bound, bound)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def remember(self, memory: Float[Tensor, "batch features channels"]) -> list[tuple[Tensor, Tensor]]:
        """Every block's keys and values of the image: once per image serves all scales."""
        return [block.remember(memory) for block in self.blocks]

    def forward(
        self,
        tokens: Float[Tensor, "batch positions channels"],
        memory: Sequence[tuple[Tensor, Tensor]],
        segments: Visibility | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch positions channels"]:
        """Run the blocks.

        Args:
            tokens: of all scales so far; or one scale's, with ``cache``.
            memory: from :meth:`remember`.
            segments: what each position sees; None: everything that is given (and cached).
            cache: earlier scales' keys and values; this one's are added.
        """
        x = self.enter(tokens)
        half = self.config.depth // 2 if self.config.long_skips else 0
        stored: list[Tensor] = []
        for layer, (block, image) in enumerate(zip(self.blocks, memory, strict=True)):
            x = block(x, image, stored.pop() if block.join is not None else None, segments, cache, layer)
            if layer < half:
                stored.append(x)
        return self.leave(x)
