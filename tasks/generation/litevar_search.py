"""Choosing windows from how a model attends: the published rule, and the best keys for a given amount of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.litevar_windows import ALL, NONE, Window, by_length, in_tiles, least_widths, tile_size

FEW_TOKENS = 16
"""Scales of fewer tokens keep all their keys: there is nothing to save."""


def late_scales(schedule: ScaleSchedule) -> list[int]:
    """The scales of at least 16 tokens."""
    return [index for index, length in enumerate(schedule.lengths) if length >= FEW_TOKENS]


def all_scores(schedule: ScaleSchedule) -> int:
    """Query-key products of one head without windows."""
    return sum(length * stop for length, (_, stop) in zip(schedule.lengths, schedule.ranges, strict=True))


# --- the best keys for a given amount of work ---------------------------------------------------------


TileWorth = Mapping[int, Float[Tensor, "blocks heads tiles keys"]]
"""For each late scale: what each key is worth to a tile's queries, for each of their scores."""

TileKeys = dict[int, Bool[Tensor, "blocks heads tiles keys"]]
"""For each late scale: the keys that a tile's queries see."""


def tile_attention(
    attention: Float[Tensor, "heads queries keys"], schedule: ScaleSchedule, index: int, tile: int | None = None
) -> Float[Tensor, "heads tiles keys"]:
    """The average over the queries of each tile; ``tile`` as for :func:`tile_size`."""
    tile = tile_size(schedule, index, tile)
    sums = in_tiles(attention, tile).sum(2)
    members = in_tiles(attention.new_ones(1, attention.shape[1], 1), tile).sum(2)
    return sums / members


def best_keys(worth: TileWorth, schedule: ScaleSchedule, share: float, tile: int | None = None) -> TileKeys:
    """The keys that are worth most, when only so much of the scores may be computed.

    One level divides what is kept from what is not, in all blocks, heads and scales, and no tile is left without a key.
    Tiles are computed with few lengths; those that are shorter are filled up with their next best keys.

    Args:
        share: of the scores of all keys, those of the small scales included.
        tile: as for :func:`tile_size`.

    Raises:
        ValueError: the small scales alone, and one key for each tile, compute more than that.
    """
    flat = torch.cat([part.flatten() for part in worth.values()])
    costs = torch.cat([torch.full((part.numel(),), tile_size(schedule, i, tile)) for i, part in worth.items()])
    order = flat.argsort(descending=True, stable=True)
    spent = costs[order].cumsum(0)
    blocks, heads = next(iter(worth.values())).shape[:2]
    full = blocks * heads * all_scores(schedule)
    early = blocks * heads * (all_scores(schedule) - sum(_scores(schedule, index) for index in worth))
    budget = share * full - early
    aim = budget
    while aim >= 1:
        count = int(torch.searchsorted(spent, int(aim), right=True))
        least = float(flat[order[count - 1]]) if count else float("inf")
        keys = {index: _kept(part, least) for index, part in worth.items()}
        done = sum(windowed_scores(schedule, index, part, tile) for index, part in keys.items())
        if done <= budget:
            return {
                index: torch.stack([_filled_up(*each) for each in zip(worth[index], keys[index], strict=True)])
                for index in keys
            }
        aim *= min(budget / done, 0.995)
    raise ValueError(
        f"{share:.1%} of the scores were to be computed, but the small scales, which keep all their keys, take "
        f"{early / full:.1%} for the scales '{schedule}', and every query needs a key"
    )


def _scores(schedule: ScaleSchedule, index: int) -> int:
    return schedule.lengths[index] * schedule.ranges[index][1]


def _kept(worth: Tensor, least: float) -> Tensor:
    """Keys that are worth at least so much, and each tile's best."""
    return (worth >= least) | (worth == worth.amax(-1, keepdim=True))


def _filled_up(
    worth: Float[Tensor, "heads tiles keys"], kept: Bool[Tensor, "heads tiles keys"]
) -> Bool[Tensor, "heads tiles keys"]:
    """Tiles that are computed with the length of a longer one take their next best keys, which cost nothing more."""
    flat, result, counts = worth.flatten(0, 1), kept.flatten(0, 1).clone(), kept.flatten(0, 1).sum(1)
    for members in by_length(counts):
        best = flat[members].topk(int(counts[members].max()), dim=1).indices
        result[members] = torch.zeros_like(result[members]).scatter_(1, best, True)
    return result.view(kept.shape)


def windowed_scores(
    schedule: ScaleSchedule, index: int, keys: Bool[Tensor, "blocks heads tiles keys"], tile: int | None = None
) -> int:
    """Scores that are computed of one scale, over all blocks and heads."""
    queries, size = schedule.lengths[index], tile_size(schedule, index, tile)
    return sum(Window.from_tiles(block, queries, size).scores for block in keys)


def kept_attention(
    attention: Mapping[int, Float[Tensor, "blocks heads tiles keys"]],
    keys: Mapping[int, Tensor],
    schedule: ScaleSchedule,
) -> float:
    """How much of its attention a token of a late scale keeps, averaged over blocks, heads and tokens.

    Args:
        attention: to each key, summed over the queries of each tile.
    """
    blocks, heads = next(iter(keys.values())).shape[:2]
    kept = sum(float((attention[i] * keys[i]).sum()) for i in keys)
    return kept / (blocks * heads * sum(schedule.lengths[i] for i in keys))


# --- the published rule -------------------------------------------------------------------------------


BandAttention = Mapping[tuple[int, int], Float[Tensor, "blocks heads widths"]]
"""For each query scale and key scale: the share of attention that goes to keys which a window of width 1, 2, … takes in
and none narrower."""


def band_attention(
    attention: Float[Tensor, "heads queries keys"], schedule: ScaleSchedule, index: int
) -> list[Float[Tensor, "heads widths"]]:
    """Of one query scale: a :data:`BandAttention` for each key scale."""
    heads, queries, _ = attention.shape
    parts = []
    for start, stop in schedule.ranges[: index + 1]:
        place = (least_widths(queries, stop - start) - 1).to(attention.device).flatten().long()
        flat = attention[:, :, start:stop].flatten(1) / queries
        parts.append(flat.new_zeros(heads, stop - start).index_add_(1, place, flat))
    return parts


def banded_keys(schedule: ScaleSchedule, index: int) -> list[int]:
    """Key scales that the published rule bands for the queries of a scale, the newest first.

    Those of at least 16 tokens, for queries of at least 16; for up to 25 queries also those of 9. With the published
    list at 256 pixels these are the newest 2, 3, 3, 4, 5, 6 and 7 of the scales 3 to 9, as published.
    """
    lengths = schedule.lengths
    if lengths[index] < FEW_TOKENS:
        return []
    least = 9 if lengths[index] <= 25 else FEW_TOKENS
    return [j for j in range(index, -1, -1) if lengths[j] >= least]


def published_widths(schedule: ScaleSchedule, key: int) -> list[int]:
    """Widths to choose among for a key scale, from narrow to wide; none keeps every key.

    In steps of a quarter of a row of the key map from one row to three, and of a row from there on: of the published
    list's last scale 16, 20, 24, … 48, 64, 80, … 240.
    """
    length, row = schedule.lengths[key], schedule[key].width
    quarters = [row * q / 4 for q in range(4, 13)]
    rows = [float(row * n) for n in range(4, length // row)]
    return [width for width in sorted({round(width) for width in [*quarters, *rows]}) if width < length]


def least_share(schedule: ScaleSchedule, index: int, order: int) -> float:
    """The share of its attention below which a head drops a key scale, by the published code for each scale.

    Args:
        order: of the key scale, 0 for the newest. At the last scale the newest has a rule of its own.
    """
    if index == len(schedule) - 1:
        return 0.1 if order == 1 else 0.05
    tokens = schedule.lengths[index]
    return next((share for most, share in ((16, 0.1), (36, 0.05), (100, 0.03)) if tokens <= most), 0.02)


def published_windows(
    attention: BandAttention, schedule: ScaleSchedule, threshold: float = 0.95
) -> Int[Tensor, "blocks heads scales scales"]:
    """The narrowest windows of :func:`published_widths` that keep ``threshold`` of each key scale's attention.

    Key scales that get little attention are dropped. At the last scale the newest is dropped only where it gets less
    than 0.2 and the two before it together less than 0.2 as well.

    Raises:
        ValueError: the threshold is not between 0 and 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold is {threshold}, a share above 0 and up to 1 was expected")
    blocks, heads, _ = attention[0, 0].shape
    scales = len(schedule)
    result = torch.full((blocks, heads, scales, scales), ALL, dtype=torch.int16)
    for index in range(scales):
        banded = banded_keys(schedule, index)
        totals = [attention[index, j].sum(-1) for j in banded]
        for order, j in enumerate(banded):
            within = attention[index, j].cumsum(-1)
            chosen = torch.full((blocks, heads), ALL, dtype=torch.int16)
            for width in reversed(published_widths(schedule, j)):
                chosen[within[..., width - 1] >= threshold * totals[order]] = width
            chosen[_dropped(schedule, index, order, totals)] = NONE
            result[:, :, index, j] = chosen
    return result


def _dropped(schedule: ScaleSchedule, index: int, order: int, totals: Sequence[Tensor]) -> Tensor:
    """Which heads do without a key scale."""
    if order == 0 and index == len(schedule) - 1:
        others = sum(totals[1:3], torch.zeros_like(totals[0])) if len(totals) > 1 else torch.ones_like(totals[0])
        return (totals[0] < 0.2) & (others < 0.2)
    return totals[order] < least_share(schedule, index, order)
