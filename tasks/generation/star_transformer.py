"""STAR's network around the shared core: blocks that look at a text without being modulated by it, and positions.

Ma et al. 2024 (arXiv 2406.10797); official code Davinci-XLab/STAR-T2I.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.attention import Visibility
from nextscale.core.cache import KeyValueCache
from nextscale.core.cross_attention import CrossAttention, Memory, Packed
from nextscale.core.rotary import Rotation, grid_rotation
from nextscale.core.schedule import ScaleSchedule, Segment
from nextscale.core.transformer import Block, NextScaleTransformer, TransformerConfig


@dataclass(frozen=True)
class STARBlocksConfig(TransformerConfig):
    """Attributes:

    conditioning: ``"none"``, as in all released models; ``"shared"``: modulated by the level of the scale.
    text_width: channels of the text encoder's features.
    cross_attention: ``"own"``: every row of a batch attends to its own text; ``"first"``: only the first row attends,
        and what it reads is added to all rows, as the official code does; ``"none"``: no row does.
    """

    conditioning: Literal["block", "shared", "none"] = "none"
    text_width: int = 1024
    cross_attention: Literal["own", "first", "none"] = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conditioning == "block":
            raise ValueError("conditioning is 'block', expected 'none' or 'shared': a STAR has no modulation by block")
        if self.cross_attention not in ("own", "first", "none"):
            raise ValueError(f"cross_attention is {self.cross_attention!r}, expected 'own', 'first' or 'none'")


class STARBlock(Block):
    """:class:`nextscale.core.transformer.Block` that looks at the text between its two branches, unmodulated."""

    def __init__(self, config: STARBlocksConfig, condition_width: int, drop_probability: float) -> None:
        super().__init__(config, condition_width, drop_probability)
        self.cross_attention: CrossAttention | None = None
        if config.cross_attention != "none":
            cosine = config.attention == "cosine"
            scale = config.attention_scale or 0.25 / math.sqrt(config.head_size)
            self.cross_attention = CrossAttention(
                config.width, config.heads, config.text_width, cosine=cosine, scale=scale
            )

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch positions width"],
        modulation: Float[Tensor, "_ _ 6 width"] | None,
        segments: Visibility | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        *,
        rotation: Rotation | None = None,
        memory: Memory | Packed | None = None,
    ) -> Float[Tensor, "batch positions width"]:
        """Run the block.

        Args:
            modulation: one for each position, or one for all.
            rotation: of these positions.
            memory: the texts that the first rows attend to, one text each; what they read is repeated for the rows
                behind them.
        """
        gammas, scales, shifts = (None, None, None) if modulation is None else modulation.chunk(3, dim=2)
        normed = self.norm(x)
        if scales is not None and shifts is not None:
            normed = torch.addcmul(shifts[:, :, 0], normed, 1 + scales[:, :, 0])
        branch = self.attention(normed, segments, cache, layer, rotation)
        branch = branch if gammas is None else branch * gammas[:, :, 0]
        x = x + self.dropped(branch, 0)
        if self.cross_attention is not None and memory is not None:
            reads = self.cross_attention(self.norm(x[: readers(memory)]), memory)
            x = x + reads.repeat(len(x) // len(reads), 1, 1)
        normed = self.norm(x)
        if scales is not None and shifts is not None:
            normed = torch.addcmul(shifts[:, :, 1], normed, 1 + scales[:, :, 1])
        branch = self.feed_forward(normed)
        branch = branch if gammas is None else branch * gammas[:, :, 1]
        return x + self.dropped(branch, 1)


def readers(memory: Memory | Packed) -> int:
    """How many rows attend to a memory."""
    if isinstance(memory, Packed):
        return len(memory)
    return len(memory.key) if memory.rows is None else len(memory.rows)


class STARTransformer(NextScaleTransformer):
    """A stack of :class:`STARBlock`."""

    def __init__(self, config: STARBlocksConfig) -> None:
        super().__init__(config, block=cast("type[Block]", STARBlock))
        self.attends = config.cross_attention != "none"

    def remember(self, text: Packed) -> list[Memory]:
        """Every block's keys and values of the text: once per call, for all scales; none where no block attends."""
        attentions = [cast(STARBlock, block).cross_attention for block in self.blocks]
        return [attention.remember(text) for attention in attentions if attention is not None]

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch positions width"],
        modulations: Sequence[Tensor] | None,
        segments: Visibility | None = None,
        cache: KeyValueCache | None = None,
        *,
        rotation: Rotation | None,
        memory: Packed | Sequence[Memory],
    ) -> Float[Tensor, "batch positions width"]:
        """Run the blocks; the first four arguments as in the core.

        Args:
            memory: the text, which each block projects, or what :meth:`remember` made of it; see :class:`STARBlock`.
        """
        for layer, block in enumerate(self.blocks):
            modulation = None if modulations is None else modulations[layer]
            seen = (memory if isinstance(memory, Packed) else memory[layer]) if self.attends else None
            x = self.run_block(block, x, modulation, segments, cache, layer, rotation=rotation, memory=seen)
        return x


def kept_segments(schedule: ScaleSchedule, keep: Int[Tensor, " kept"]) -> tuple[Segment, ...]:
    """Next-scale visibility among some of a schedule's tokens, given their places in rising order."""
    stops = [int((keep < stop).sum()) for _, stop in schedule.ranges]
    return tuple(Segment(start, stop, stop) for start, stop in pairwise([0, *stops]) if stop > start)


# --- positions ----------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def rotation_of(
    schedule: ScaleSchedule,
    head_size: int,
    base: float = 10_000.0,
    span: float | None = 64.0,
    device: torch.device | str = "cpu",
) -> Rotation:
    """The rotation of every token of a schedule, columns turning the first half of the channels, rows the second.

    Args:
        span: every scale covers 0 to ``span`` (paper, section 3.3); None: tokens are counted instead.
    """
    # Outside inference mode: a cached tensor made inside one could not take part in training later.
    with torch.inference_mode(False):
        rows, columns = [], []
        for scale in schedule.scales:
            row, column = (_places(count, span) for count in scale.grid)
            rows.append(row.repeat_interleave(scale.width))
            columns.append(column.repeat(scale.height))
        return grid_rotation(torch.cat(columns), torch.cat(rows), head_size, base).to(torch.device(device))


def _places(count: int, span: float | None) -> Float[Tensor, " count"]:
    places = torch.arange(count, dtype=torch.float32)
    return places if span is None or count == 1 else places / (count - 1) * span
