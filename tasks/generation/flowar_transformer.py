"""FlowAR's blocks around the shared core: root-mean-square norms, gated feed-forward, rotary positions.

Ren et al. 2024 (arXiv 2412.15205, section 3 and appendix); official code OliverRensu/FlowAR, ``models/flowar.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.attention import Visibility, visibility_bias
from nextscale.core.cache import KeyValueCache
from nextscale.core.fused import linear
from nextscale.core.rotary import Rotation, grid_rotation, rotate
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import Block, FeedForward, SelfAttention, TransformerConfig

NORM_EPS = 1e-6
SPAN = 16
"""Positions a scale is spread over along each side: index i of s stands at 16 i / s, whatever the finest grid."""


def gated_ratio(width: int, ratio: float = 4.0) -> float:
    """``mlp_ratio`` of a gated network with about as many weights as a plain one of ``ratio``: two thirds of it.

    The hidden width is rounded down, as published.
    """
    return int(width * ratio * 2 / 3.0) / width


@dataclass(frozen=True)
class FlowARBlocksConfig(TransformerConfig):
    """Attributes:

    attention: as published, a dot product over the root of the head size.
    key_query_bias: biases on queries, keys and values; the flow network has none.
    attention_dropout: of attention's weights; ``dropout`` of the branches' outcomes.
    """

    attention: Literal["cosine", "dot"] = "dot"
    key_query_bias: bool = True
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention != "dot" or self.attention_scale is not None:
            raise ValueError("FlowAR's attention is a dot product over the root of the head size")
        if self.head_size % 4:
            raise ValueError(f"heads have {self.head_size} channels; rotary positions need a multiple of 4")


class RootMeanSquareNorm(nn.Module):
    """x / sqrt(mean x^2 + 1e-6) in float32, given back in the precision it came in, times a weight per channel."""

    def __init__(self, width: int, weighted: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS).to(x.dtype)
        return normed if self.weight is None else normed * self.weight


class RotaryAttention(SelfAttention):
    """:class:`nextscale.core.transformer.SelfAttention` with biases on all of queries, keys and values, or on none."""

    def __init__(self, config: FlowARBlocksConfig) -> None:
        super().__init__(config)
        del self.query_bias, self.value_bias
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.key_query_bias)
        self.scale = config.head_size**-0.5
        self.attention_dropout = config.attention_dropout

    def project(self, x: Float[Tensor, "batch positions width"]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = linear(self.qkv, x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        segments: Visibility | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        rotation: Rotation | None = None,
    ) -> Tensor:
        if not (self.training and self.attention_dropout and segments is not None):
            return super().forward(x, segments, cache, layer, rotation)
        assert rotation is not None
        bias = segments if isinstance(segments, Tensor) else visibility_bias(segments)
        q, k, v = self.project(x)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, rotation), rotate(k, rotation), v))
        out = F.scaled_dot_product_attention(
            q, k, v, bias.to(q.device, q.dtype), dropout_p=self.attention_dropout, scale=self.scale
        )
        return F.dropout(linear(self.projection, out.transpose(1, 2).flatten(2)), self.dropout, self.training)


class GatedFeedForward(FeedForward):
    """contract(GELU(gate x) * expand x), with the exact GELU."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__(width, hidden, dropout)
        self.gate = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(linear(self.gate, x)) * linear(self.expand, x)
        out = linear(self.contract, F.dropout(hidden, self.dropout, self.training))
        return F.dropout(out, self.dropout, self.training)


class FlowARBlock(Block):
    """:class:`nextscale.core.transformer.Block` of FlowAR's parts."""

    def __init__(self, config: FlowARBlocksConfig, condition_width: int, drop_probability: float) -> None:
        super().__init__(config, condition_width, drop_probability)
        self.attention = RotaryAttention(config)
        self.feed_forward = GatedFeedForward(config.width, round(config.width * config.mlp_ratio), config.dropout)
        self.norm = cast("nn.LayerNorm", RootMeanSquareNorm(config.width, weighted=False))


@lru_cache(maxsize=16)
def rotation_of(schedule: ScaleSchedule, head_size: int, device: torch.device) -> Rotation:
    """The rotation of every token of a schedule, rows turning the first half of the channels."""
    # Outside inference mode: a cached tensor made inside one could not take part in training later.
    with torch.inference_mode(False):
        rows, columns = [], []
        for scale in schedule.scales:
            row, column = (torch.arange(side) / side * SPAN for side in scale.grid)
            rows.append(row.repeat_interleave(scale.width))
            columns.append(column.repeat(scale.height))
        return grid_rotation(torch.cat(rows), torch.cat(columns), head_size).to(device)
