"""Infinity's network around the shared core: blocks that look at a text, and where tokens stand.

Han et al. 2024 (arXiv 2412.04431, section 3.1 and appendix); official code FoundationVision/Infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nextscale.core.attention import attend_visible
from nextscale.core.cache import KeyValueCache
from nextscale.core.cross_attention import CrossAttention, Memory, Packed
from nextscale.core.fused import linear
from nextscale.core.rotary import Rotation, angles, grid_rotation
from nextscale.core.schedule import ScaleSchedule, Segment
from nextscale.core.transformer import Block, NextScaleTransformer, TransformerConfig

Positions = Literal["spread", "shrunk", "plain"]

TABLE = 128
"""Positions a side of the table that "shrunk" positions are made of."""


@dataclass(frozen=True)
class InfinityBlocksConfig(TransformerConfig):
    """Attributes:

    conditioning, attention: as published: shared modulation, cosine attention.
    chunks: groups that the blocks come in. Files name blocks by group, and see ``level_each_chunk``.
    level_each_chunk: add the level embedding before every chunk (before every block, if there is one chunk),
        instead of before the first block only.
    cross_gate: initial value of a learned factor per channel on what a block reads from the text; None: no factor.
    text_precision: ``"bfloat16"`` rounds queries, keys, values and the outcome of the attention to the text, as the
        official code does in models of any precision.
    """

    conditioning: Literal["block", "shared"] = "shared"
    chunks: int = 1
    level_each_chunk: bool = False
    cross_gate: float | None = None
    text_precision: Literal["model", "bfloat16"] = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks < 1 or self.depth % self.chunks:
            raise ValueError(f"{self.depth} blocks do not divide into {self.chunks} chunks of one size")
        if self.text_precision not in ("model", "bfloat16"):
            raise ValueError(f"text_precision is {self.text_precision!r}, expected 'model' or 'bfloat16'")


def attend_rounded(query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor | None) -> Tensor:
    """Attention whose inputs and outcome are rounded to bfloat16, and nothing in between."""
    if query.dtype != torch.float32:
        return attend_visible(query, key, value, scale, visible)
    q, k, v = (t.bfloat16().float() for t in (query, key, value))
    return attend_visible(q, k, v, scale, visible).bfloat16().float()


class TextAttention(CrossAttention):
    """Attention to the text, in one of two precisions."""

    def __init__(self, config: InfinityBlocksConfig) -> None:
        super().__init__(config.width, config.heads, config.width)
        self._attend = attend_rounded if config.text_precision == "bfloat16" else attend_visible

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        return self._attend(query, key, value, self.scale, visible)


class TextPool(nn.Module):
    """A text as one vector: learned queries, one per head, attend to its features."""

    def __init__(self, text_width: int, config: InfinityBlocksConfig, heads: int) -> None:
        super().__init__()
        width = config.width
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the {heads} heads that read the text")
        self.query = nn.Parameter(torch.zeros(1, heads, width // heads))
        self.key_value = nn.Linear(text_width, 2 * width, bias=False)
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.projection = nn.Linear(width, width)
        self._attend = attend_rounded if config.text_precision == "bfloat16" else attend_visible

    def forward(self, text: Packed) -> Float[Tensor, "texts width"]:
        heads, size = self.query.shape[1:]
        bias = torch.cat((torch.zeros_like(self.value_bias), self.value_bias))
        packed = text.map(linear(self.key_value, text.values, bias))
        key, value = packed.padded().unflatten(-1, (2, heads, -1)).unbind(2)
        query = self.query[None].expand(len(text), -1, -1, -1)
        out = self._attend(query, key, value, 1 / math.sqrt(size), text.visible())
        return self.projection(out.flatten(1))


class InfinityBlock(Block):
    """:class:`nextscale.core.transformer.Block` that looks at the text between its two branches, unmodulated."""

    def __init__(self, config: InfinityBlocksConfig, condition_width: int, drop_probability: float) -> None:
        super().__init__(config, condition_width, drop_probability)
        self.cross_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.cross_attention = TextAttention(config)
        gate = config.cross_gate
        self.cross_gate = None if gate is None else nn.Parameter(torch.full((config.width,), gate))

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch positions width"],
        modulation: Float[Tensor, "batch 1 6 width"],
        segments: Sequence[Segment] | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        *,
        rotation: Rotation,
        memory: Memory | Packed,
    ) -> Float[Tensor, "batch positions width"]:
        """Run the block.

        Args:
            rotation: of these positions.
            memory: the text: its keys and values, or what they are made of.
        """
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        branch = self.attention(torch.addcmul(shift1, self.norm(x), 1 + scale1), segments, cache, layer, rotation)
        x = torch.addcmul(x, self.dropped(branch, 0), gamma1)
        branch = self.cross_attention(self.cross_norm(x), memory)
        x = x + branch if self.cross_gate is None else torch.addcmul(x, branch, self.cross_gate)
        branch = self.feed_forward(torch.addcmul(shift2, self.norm(x), 1 + scale2))
        return torch.addcmul(x, self.dropped(branch, 1), gamma2)


class InfinityTransformer(NextScaleTransformer):
    """A stack of :class:`InfinityBlock`."""

    def __init__(self, config: InfinityBlocksConfig) -> None:
        super().__init__(config, block=cast("type[Block]", InfinityBlock))
        step = config.depth // config.chunks if config.chunks > 1 else 1
        self._levels_before = range(0, config.depth, step) if config.level_each_chunk else range(1)

    def remember(self, text: Packed) -> list[Memory]:
        """Every block's keys and values of the text: once per call, for all scales."""
        return [cast(InfinityBlock, block).cross_attention.remember(text) for block in self.blocks]

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch positions width"],
        modulations: Sequence[Tensor],
        segments: Sequence[Segment] | None = None,
        cache: KeyValueCache | None = None,
        *,
        levels: Float[Tensor, "positions width"],
        rotation: Rotation,
        memory: Packed | Sequence[Memory],
        after: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Float[Tensor, "batch positions width"]:
        """Run the blocks; the first four arguments as in the core.

        Args:
            levels: embedding of each position's level.
            memory: the text, which each block projects, or what :meth:`remember` made of it.
            after: changes the output of a block, given its number.
        """
        for layer, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True)):
            if layer in self._levels_before:
                x = x + levels
            seen = memory if isinstance(memory, Packed) else memory[layer]
            x = self.run_block(block, x, modulation, segments, cache, layer, rotation=rotation, memory=seen)
            if after is not None:
                x = after(x, layer)
        return x


# --- positions ----------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def rotation_of(
    schedule: ScaleSchedule,
    grid: tuple[int, int],
    head_size: int,
    positions: Positions = "spread",
    device: torch.device | str = "cpu",
    base: float = 10_000.0,
) -> Rotation:
    """The rotation of every token of a schedule, rows turning the first half of the channels.

    Args:
        grid: the finest grid of the largest list of this aspect ratio.
        positions: ``"spread"``: row y of h stands at round(y H / h) of the grid's H rows, halves to even;
            ``"shrunk"``: the cosines and sines of a table with the grid's aspect ratio, 128 positions on its longer
            side, interpolated linearly to each scale; ``"plain"``: row y stands at y.
    """
    # Outside inference mode: a cached tensor made inside one could not take part in training later.
    with torch.inference_mode(False):
        place = {"spread": _spread, "shrunk": _shrunk, "plain": _plain}[positions]
        parts = [place(*scale.grid, grid, head_size, base) for scale in schedule.scales]
        joined = Rotation(torch.cat([part.cos for part in parts]), torch.cat([part.sin for part in parts]))
        return joined.to(torch.device(device))


def _on_grid(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """What each token of a map has from its row and from its column."""
    height, width = len(rows), len(columns)
    return rows.repeat_interleave(width, 0), columns.repeat(height, *(1,) * (columns.ndim - 1))


def _plain(height: int, width: int, grid: tuple[int, int], head_size: int, base: float) -> Rotation:
    return grid_rotation(*_on_grid(torch.arange(height), torch.arange(width)), head_size, base)


def _spread(height: int, width: int, grid: tuple[int, int], head_size: int, base: float) -> Rotation:
    # Python rounds a half to the even number, exactly.
    sides = ((height, grid[0]), (width, grid[1]))
    places = (torch.tensor([round(i * full / count) for i in range(count)]) for count, full in sides)
    return grid_rotation(*_on_grid(*places), head_size, base)


def _shrunk(height: int, width: int, grid: tuple[int, int], head_size: int, base: float) -> Rotation:
    full_height, full_width = grid
    if full_height >= full_width:
        sides = TABLE, int(TABLE / full_height * full_width)
    else:
        sides = int(TABLE / full_width * full_height), TABLE

    def shrink(wave: Tensor, count: int) -> Tensor:
        return F.interpolate(wave.T[None], size=count, mode="linear", align_corners=True)[0].T

    turns = [angles(torch.arange(side), head_size, base) for side in sides]
    waves = (partial(shrink, count=height), partial(shrink, count=width))
    cos = _on_grid(*(shrink_to(turn.cos()) for shrink_to, turn in zip(waves, turns, strict=True)))
    sin = _on_grid(*(shrink_to(turn.sin()) for shrink_to, turn in zip(waves, turns, strict=True)))
    return Rotation(torch.cat(cos, dim=-1), torch.cat(sin, dim=-1))


def choose_text(given: Packed, other: Float[Tensor, "longest channels"], replaced: Bool[Tensor, " texts"]) -> Packed:
    """Texts of which some are replaced by the beginning of another sequence, at the same lengths.

    The other sequence takes part in any case, so that its gradient is there (zero where nothing was replaced).

    Raises:
        ValueError: a text is longer than the other sequence.
    """
    if max(given.lengths) > len(other):
        raise ValueError(
            f"a text has {max(given.lengths)} positions, the model at most {len(other)}: cut it where it is encoded"
        )
    lengths = torch.tensor(given.lengths, device=given.values.device)
    places = torch.cat([torch.arange(length) for length in given.lengths]).to(given.values.device)
    rows = replaced.to(given.values.device).repeat_interleave(lengths, output_size=len(given.values))[:, None]
    return given.map(torch.where(rows, other[places].to(given.values.dtype), given.values))
