"""STAR's sampling head: tokens of a scale, given some of them (causal-driven stable sampling).

Ma et al. 2024 (arXiv 2406.10797, section 3.4); official code Davinci-XLab/STAR-T2I.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.attention import Visibility, attend
from nextscale.core.cache import KeyValueCache
from nextscale.core.fused import linear
from nextscale.core.rotary import Rotation, rotate
from nextscale.core.schedule import ScaleSchedule, Segment
from nextscale.core.transformer import NextScaleTransformer, SelfAttention
from nextscale.tasks.generation.star_transformer import STARBlocksConfig

BLOCKS = 3


@lru_cache(maxsize=256)
def commit_counts(tokens: int, steps: int) -> tuple[int, ...]:
    """How many of a scale's tokens become known at each step.

    In proportion to arccos(r) with r falling evenly from 1 to 0, at least one; the last step takes what is left, which
    is less than nothing where there are more steps than tokens.
    """
    weights = torch.linspace(1, 0, steps).arccos() / (torch.pi / 2)
    counts = (weights / weights.sum() * tokens).round().int().clamp(min=1)
    counts[-1] += tokens - counts.sum()
    return tuple(counts.tolist())


class GroupAttention(SelfAttention):
    """Self attention in which the first position sees all and the others see it and their own segment."""

    def forward(
        self,
        x: Tensor,
        segments: Visibility | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Attend; ``segments`` None: all see all. There is no cache to use."""
        if segments is None or isinstance(segments, Tensor):
            return super().forward(x, segments, cache, layer, rotation)
        q, k, v = self.project(x)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        outputs = [attend(q[:, :1], k, v, self.scale)]
        for s in segments:
            own, keys, values = q[:, s.start : s.stop], k[:, s.start : s.stop], v[:, s.start : s.stop]
            keys, values = torch.cat((k[:, :1], keys), dim=1), torch.cat((v[:, :1], values), dim=1)
            outputs.append(attend(own, keys, values, self.scale))
        return linear(self.projection, torch.cat(outputs, dim=1).flatten(2))


class StableHead(nn.Module):
    """Features of a scale, and the codes that are known in it, to scores of all its tokens.

    A small transformer of its own, over one position that holds the text and the positions of the scale.
    """

    def __init__(self, blocks: STARBlocksConfig, levels: int, code_channels: int, vocabulary: int) -> None:
        super().__init__()
        width = blocks.width
        self.start_position = nn.Parameter(torch.empty(1, 1, width))
        self.text_embedding = nn.Linear(blocks.text_width, width)
        self.word_embedding = nn.Linear(code_channels, width)
        self.level_embedding = nn.Embedding(levels, width)
        self.join = nn.Linear(2 * width, width)
        # Stochastic depth as in the first blocks of the backbone.
        rate = blocks.drop_path * (BLOCKS - 1) / max(blocks.depth - 1, 1)
        config = replace(blocks, depth=BLOCKS, conditioning="none", cross_attention="none", drop_path=min(rate, 0.99))
        self.transformer = NextScaleTransformer(config)
        for block in self.transformer.blocks:
            block.attention = GroupAttention(config)
        self.norm = nn.LayerNorm(width, eps=blocks.norm_eps, elementwise_affine=False)
        self.head = nn.Linear(width, vocabulary)

    def read(self, pooled: Float[Tensor, "rows text"]) -> Float[Tensor, "rows 1 width"]:
        """The position that holds the text: depends on it alone, so once per call serves all steps."""
        return self.text_embedding(pooled)[:, None] + self.start_position

    def forward(
        self,
        text: Float[Tensor, "rows 1 width"],
        features: Float[Tensor, "rows tokens width"],
        codes: Float[Tensor, "batch tokens channels"],
        schedule: ScaleSchedule,
        first: int,
        last: int,
        rotation: Rotation | None,
    ) -> Float[Tensor, "rows tokens vocabulary"]:
        """Scores of the scales ``first`` to ``last``, float32.

        Of one scale, the text sees that scale; of several, it sees all of them, which is how the head is trained.

        Args:
            text: from :meth:`read`.
            features: the backbone's last ones.
            codes: of known tokens, zeros elsewhere; alike for all rows of an image.
            rotation: of the whole schedule.
        """
        start, stop = schedule.ranges[first][0], schedule.ranges[last][1]
        levels = self.level_embedding(schedule.levels(features.device)[start:stop])
        tokens = self.word_embedding(codes.to(self.word_embedding.weight.dtype)) + levels
        tokens = tokens.repeat(len(features) // len(tokens), 1, 1)
        x = torch.cat((torch.cat((text, tokens), dim=1), torch.cat((text, features), dim=1)), dim=-1)
        turned = None
        if rotation is not None:
            begun, own = rotation[0:1], rotation[start:stop]
            turned = Rotation(torch.cat((begun.cos, own.cos)), torch.cat((begun.sin, own.sin)))
        segments = None if first == last else groups(schedule, first, last)
        x = self.transformer(linear(self.join, x), None, segments, rotation=turned)[:, 1:]
        return linear(self.head, self.norm(x.float()).to(self.head.weight.dtype)).float()


def groups(schedule: ScaleSchedule, first: int, last: int) -> Sequence[Segment]:
    """The scales ``first`` to ``last`` behind one position."""
    shift = 1 - schedule.ranges[first][0]
    return [Segment(start + shift, stop + shift, stop + shift) for start, stop in schedule.ranges[first : last + 1]]
