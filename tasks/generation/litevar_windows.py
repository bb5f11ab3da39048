"""Windows of attention: which earlier tokens the queries of a late scale still look at.

A processor computes few long rows better than many short ones, and gains nothing from single scores left out. So
queries are taken in tiles of neighbours that share their keys: what any of them keeps, all of them see. A window is
given by widths, as published, or by the keys of each tile.

LiteVAR (arXiv 2411.17178) bands the attention map of late scales: per block, head, query scale i and key scale j, query
x of i keeps the keys y of j with |y - x L_j / L_i| < width, in row-major positions of their scales. Bands follow the
rows of the maps, so a band as wide as a row takes in a token's neighbours above and below.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nextscale.core.schedule import ScaleSchedule

ALL, NONE = 32767, 0
"""Widths that keep every key of a scale, and none of them."""

TILE = (4, 16)
"""Neighbouring queries that share their keys, at least and at most, unless a number is given; between, half a row."""

GROUPS = 4
"""Matrix products that one scale's tiles are gathered into, at most: each is as wide as its widest tile."""


def tile_size(schedule: ScaleSchedule, index: int, tile: int | None = None) -> int:
    """Queries of a tile of one scale.

    Args:
        tile: as many as are asked for; None: half a row.
    """
    half_row = min(max(-(-schedule[index].width // 2), TILE[0]), TILE[1])
    return min(half_row if tile is None else tile, schedule.lengths[index])


@lru_cache(maxsize=256)
def least_widths(queries: int, keys: int) -> Int[Tensor, "queries keys"]:
    """The smallest width with which a query keeps a key: the integer part of |y - x keys / queries|, plus one."""
    with torch.inference_mode(False):
        x, y = torch.arange(queries)[:, None], torch.arange(keys)
        return ((y * queries - x * keys).abs() // queries + 1).to(torch.int32)


def band(queries: int, keys: int, widths: Int[Tensor, " heads"]) -> Bool[Tensor, "heads queries keys"]:
    """True where |y - x keys / queries| < width."""
    return least_widths(queries, keys) <= widths.to(torch.int32)[:, None, None]


def visible_mask(
    schedule: ScaleSchedule, index: int, widths: Int[Tensor, "heads scales"]
) -> Bool[Tensor, "heads queries keys"]:
    """What the queries of scale ``index`` keep of all keys up to their own scale.

    Args:
        widths: of this query scale, one per head and key scale; those of later key scales have no meaning.
    """
    lengths = schedule.lengths
    return torch.cat([band(lengths[index], lengths[j], widths[:, j]) for j in range(index + 1)], dim=2)


@dataclass(frozen=True)
class TileGroup:
    """Tiles of any heads whose numbers of keys are near each other.

    Attributes:
        tiles: place of each tile among (heads x tiles of a head).
        heads: the head of each.
        keys: positions in the flat sequence; a tile that has fewer is filled up with its first.
        counts: keys that count.
        mask: which query of the tile keeps which key, where that is to be exact; None: all share all.
        bias: added to the scores: the logarithm of how much a key counts; None: each as one.
    """

    tiles: Int[Tensor, " tiles"]
    heads: Int[Tensor, " tiles"]
    keys: Int[Tensor, "tiles keys"]
    counts: Int[Tensor, " tiles"]
    mask: Bool[Tensor, "tiles queries keys"] | None = None
    bias: Float[Tensor, "tiles keys"] | None = None

    def to(self, device: torch.device) -> TileGroup:
        tiles, heads, keys, counts = (t.to(device) for t in (self.tiles, self.heads, self.keys, self.counts))
        mask, bias = (None if t is None else t.to(device) for t in (self.mask, self.bias))
        return TileGroup(tiles, heads, keys, counts, mask, bias)

    @property
    def nbytes(self) -> int:
        parts = (self.tiles, self.heads, self.keys, self.counts, self.mask, self.bias)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class Window:
    """What the queries of one scale keep, in one block.

    Attributes:
        visible: keys up to the queries' own scale.
        tile: queries of a tile; the last tile is filled up with zeros.
        tiles: of each head.
        mask: kept for the forms that need the whole of it.
        offset: added to what the heads take from the keys; None: nothing.
    """

    heads: int
    queries: int
    visible: int
    tile: int
    tiles: int
    groups: tuple[TileGroup, ...]
    mask: Bool[Tensor, "heads queries keys"] | None = None
    offset: Float[Tensor, "heads queries size"] | None = None

    @classmethod
    def from_mask(cls, mask: Bool[Tensor, "heads queries keys"], tile: int, exact: bool = False) -> Self:
        """Tiles that take in at least what a mask keeps.

        Args:
            tile: queries of a tile.
            exact: keep the mask, so that no query sees more than it says.
        """
        padded = in_tiles(mask, tile)
        return cls._grouped(padded.any(2), mask.shape[1], tile, padded if exact else None, mask if exact else None)

    @classmethod
    def from_tiles(
        cls,
        kept: Bool[Tensor, "heads tiles keys"],
        queries: int,
        tile: int,
        bias: Float[Tensor, "heads tiles keys"] | None = None,
        offset: Float[Tensor, "heads queries size"] | None = None,
    ) -> Self:
        """Tiles with the keys of each given.

        Args:
            bias: of the keys that are kept, the logarithm of how much each counts.
        """
        return cls._grouped(kept, queries, tile, None, None, bias, offset)

    @classmethod
    def _grouped(
        cls,
        kept: Tensor,
        queries: int,
        tile: int,
        exact: Tensor | None,
        mask: Tensor | None,
        bias: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Self:
        heads, tiles, visible = kept.shape
        kept = kept.flatten(0, 1)
        counts = kept.sum(1)
        groups = []
        for members in by_length(counts):
            most = max(int(counts[members].max()), 1)
            keys = (~kept[members]).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
            filler = torch.arange(most) >= counts[members][:, None]
            part = None
            if exact is not None:
                part = exact.flatten(0, 1)[members].gather(2, keys[:, None].expand(-1, tile, -1))
            counted = None if bias is None else bias.flatten(0, 1)[members].gather(1, keys)
            keys = keys.masked_fill(filler, 0).to(torch.int32)
            groups.append(TileGroup(members, members // tiles, keys, counts[members], part, counted))
        return cls(heads, queries, visible, tile, tiles, tuple(groups), mask, offset)

    @property
    def device(self) -> torch.device:
        return self.groups[0].keys.device

    @property
    def scores(self) -> int:
        """Query-key products computed, over all heads."""
        return sum(group.keys.numel() for group in self.groups) * self.tile

    @property
    def nbytes(self) -> int:
        own = sum(part.nbytes for part in (self.mask, self.offset) if part is not None)
        return sum(group.nbytes for group in self.groups) + own

    def to(self, device: torch.device) -> Window:
        groups = tuple(group.to(device) for group in self.groups)
        mask, offset = (None if t is None else t.to(device) for t in (self.mask, self.offset))
        return Window(self.heads, self.queries, self.visible, self.tile, self.tiles, groups, mask, offset)


def in_tiles(x: Tensor, tile: int) -> Tensor:
    """(heads, queries, keys) as (heads, tiles, tile, keys), filled up with zeros."""
    heads, queries, keys = x.shape
    tiles = -(-queries // tile)
    return F.pad(x, (0, 0, 0, tiles * tile - queries)).view(heads, tiles, tile, keys)


def by_length(counts: Int[Tensor, " tiles"], most: int = GROUPS) -> list[Int[Tensor, " members"]]:
    """Tiles split by their number of keys into at most ``most`` groups, so that filling up costs least."""
    sizes, inverse, members = counts.unique(return_inverse=True, return_counts=True)
    kinds = len(sizes)
    before = [0, *members.cumsum(0).tolist()]
    values = sizes.tolist()
    # best[g][k]: least cost of the first k kinds in g groups, and where the last group begins.
    best = [[(0, 0)] + [(1 << 62, 0)] * kinds]
    for g in range(most):
        row = [(0, 0)]
        for k in range(1, kinds + 1):
            options = ((best[g][c][0] + values[k - 1] * (before[k] - before[c]), c) for c in range(k))
            row.append(min(options))
        best.append(row)
    cuts, k = [], kinds
    g = min(range(1, most + 1), key=lambda n: best[n][kinds][0])
    while k > 0:
        start = best[g][k][1]
        cuts.append((start, k))
        k, g = start, g - 1
    return [((inverse >= a) & (inverse < b)).nonzero()[:, 0] for a, b in reversed(cuts)]
