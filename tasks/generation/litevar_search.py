"""Choosing windows from how a model attends: the published rule, and the best windows for a given amount of work."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.litevar_windows import (
    ALL,
    NONE,
    Window,
    offsets,
    tile_size,
    tiled_scores,
    visible_mask,
)

FEW_TOKENS = 16
"""Scales of fewer tokens keep all their keys: there is nothing to save."""

Bounds = Int[Tensor, "blocks heads scales scales 2"]


def histogram(attention: Float[Tensor, "heads queries keys"]) -> Float[Tensor, "2 heads offsets"]:
    """Attention to the keys of one scale by their offset from the query's own place, averaged over queries.

    Returns:
        By the offset rounded down, and rounded up; the first entry is that of the offset -keys.
    """
    heads, queries, keys = attention.shape
    flat = attention.flatten(1) / queries
    places = [offset.to(attention.device).flatten().long() + keys for offset in offsets(queries, keys)]
    return torch.stack([flat.new_zeros(heads, 2 * keys + 1).index_add_(1, place, flat) for place in places])


@dataclass(frozen=True)
class AttentionMass:
    """How much of its attention each head of each block gives to keys at each offset.

    Attributes:
        shares: for query scale i and key scale j <= i: a :func:`histogram` of each block. Over all key scales a head's
            shares sum to at most 1.
    """

    schedule: ScaleSchedule
    shares: dict[tuple[int, int], Float[Tensor, "blocks 2 heads offsets"]]

    @property
    def sizes(self) -> tuple[int, int]:
        """Blocks and heads."""
        blocks, _, heads, _ = self.shares[0, 0].shape
        return blocks, heads

    def total(self, index: int, key: int) -> Float[Tensor, "blocks heads"]:
        """The share of a whole key scale."""
        return self.shares[index, key][:, 0].sum(-1)

    def kept(self, index: int, key: int, before: Tensor, after: Tensor) -> Float[Tensor, "blocks heads windows"]:
        """The share that windows keep.

        Args:
            before, after: bounds (windows,), or (blocks, heads, windows).
        """
        shares, keys = self.shares[index, key], self.schedule.lengths[key]
        sums = torch.cat((shares.new_zeros(*shares.shape[:3], 1), shares.cumsum(-1)), dim=-1)
        # Of offsets rounded down all below `after`, less those which rounded up are not above -before.
        upper = (after + keys).clamp(0, 2 * keys + 1).long()
        lower = (keys - before + 1).clamp(0, 2 * keys + 1).long()
        shape = (*sums.shape[:1], sums.shape[2], upper.shape[-1])
        below = sums[:, 0].gather(-1, upper.expand(shape)) - sums[:, 1].gather(-1, lower.expand(shape))
        return below.clamp_min(0) * (before + after > 0)


def computed_share(schedule: ScaleSchedule, bounds: Bounds) -> float:
    """Scores really computed with such windows, as a share of those of all keys."""
    done = full = 0
    for block in bounds:
        for index, (length, (_, stop)) in enumerate(zip(schedule.lengths, schedule.ranges, strict=True)):
            full += len(block) * length * stop
            if bool((block[:, index, : index + 1] == ALL).all()):
                done += len(block) * length * stop
            else:
                mask = visible_mask(schedule, index, block[:, index])
                done += Window.from_mask(mask, tile_size(schedule, index)).scores
    return done / full


def kept_attention(mass: AttentionMass, bounds: Bounds) -> float:
    """How much of its attention a token of a windowed scale keeps, averaged over blocks, heads and tokens.

    What its tile sees beside its own window is not counted.
    """
    kept, tokens = 0.0, 0
    for index, length in enumerate(mass.schedule.lengths):
        if bool((bounds[:, :, index, : index + 1] == ALL).all()):
            continue
        tokens += length
        for j in range(index + 1):
            before, after = bounds[:, :, index, j, :, None].int().unbind(2)
            kept += float(mass.kept(index, j, before, after).mean()) * length
    return kept / tokens if tokens else 1.0


# --- the published rule -------------------------------------------------------------------------------


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


def published_widths(schedule: ScaleSchedule, index: int, key: int) -> list[int]:
    """Widths to choose among, from narrow to wide; none keeps every key.

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


def published_windows(mass: AttentionMass, threshold: float = 0.95) -> Bounds:
    """The narrowest windows of :func:`published_widths` that keep ``threshold`` of each key scale's attention.

    Key scales that get little attention are dropped. At the last scale the newest is dropped only where it gets less
    than 0.2 and the two before it together less than 0.2 as well.

    Raises:
        ValueError: the threshold is not between 0 and 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold is {threshold}, a share above 0 and up to 1 was expected")
    schedule, (blocks, heads) = mass.schedule, mass.sizes
    scales = len(schedule)
    result = torch.full((blocks, heads, scales, scales, 2), ALL, dtype=torch.int16)
    for index in range(scales):
        banded = banded_keys(schedule, index)
        totals = [mass.total(index, j) for j in banded]
        for order, j in enumerate(banded):
            chosen = torch.full((blocks, heads), ALL, dtype=torch.int16)
            for width in reversed(published_widths(schedule, index, j)):
                bound = torch.tensor([width])
                chosen[mass.kept(index, j, bound, bound)[..., 0] >= threshold * totals[order]] = width
            if order == 0 and index == scales - 1:
                others = torch.stack(totals[1:3]).sum(0) if len(totals) > 1 else torch.ones_like(totals[0])
                dropped = (totals[0] < 0.2) & (others < 0.2)
            else:
                dropped = totals[order] < least_share(schedule, index, order)
            chosen[dropped] = NONE
            result[:, :, index, j] = chosen[..., None]
    return result


# --- the best windows for a given amount of work ------------------------------------------------------


def best_windows(mass: AttentionMass, share: float) -> Bounds:
    """The windows that lose least attention when only so much of the scores may be computed.

    Every query of a scale of 16 tokens or more starts with the first scale alone. Then windows are opened where a score
    brings most, as long as scores are left. What a head loses counts by its square, so that no head loses much.

    Args:
        share: of the scores of all keys, those of the small scales included.

    Raises:
        ValueError: the small scales alone compute more than that.
    """
    schedule, (blocks, heads) = mass.schedule, mass.sizes
    scales, lengths = len(schedule), schedule.lengths
    result = torch.full((blocks, heads, scales, scales, 2), ALL, dtype=torch.int16)
    full = sum(length * stop for length, (_, stop) in zip(lengths, schedule.ranges, strict=True))
    spent, late = 0, [index for index in range(scales) if lengths[index] >= FEW_TOKENS]
    for index in range(scales):
        if index in late:
            tile = tile_size(schedule, index)
            spent += -(-lengths[index] // tile) * tile * lengths[0]
            result[:, :, index, 1:] = NONE
        else:
            spent += lengths[index] * schedule.ranges[index][1]
    if spent > share * full:
        raise ValueError(
            f"{share:.1%} of the scores were to be computed, but the small scales alone, which keep all their keys, "
            f"take {spent / full:.1%} for the scales '{schedule}'"
        )
    _spend((share * full - spent) * blocks * heads, _ladders(mass, late), lengths, result)
    return result


@dataclass(frozen=True)
class _Rung:
    """One window worth considering: what it costs in scores, and what attention it keeps."""

    cost: int
    kept: float
    bounds: tuple[int, int]


Place = tuple[int, int, int]
"""Block, head and query scale: what loses attention as one."""


def _spend(left: float, ladders: dict[Place, dict[int, list[_Rung]]], lengths: Sequence[int], result: Bounds) -> None:
    """Climb rung by rung where it is worth most, as long as scores are left."""
    lost = {place: sum(ladder[-1].kept for ladder in each.values()) for place, each in ladders.items()}

    def worth(place: Place, key: int, rung: int) -> float:
        """The fall of the square of what the head loses, for all tokens of the scale, by each score."""
        cost, gain = _climb(ladders[place][key], rung)
        return lengths[place[2]] * gain * (2 * lost[place] - gain) / cost

    queue = [(-worth(place, key, 0), place, key, 0) for place, each in ladders.items() for key in each]
    heapq.heapify(queue)
    while queue:
        _, place, key, rung = heapq.heappop(queue)
        now = worth(place, key, rung)
        if queue and now < -queue[0][0] * (1 - 1e-9):
            # Other windows of this head have been opened since: this one is worth less now.
            heapq.heappush(queue, (-now, place, key, rung))
            continue
        ladder = ladders[place][key]
        cost, gain = _climb(ladder, rung)
        if cost > left:
            continue
        left, lost[place] = left - cost, lost[place] - gain
        block, head, index = place
        result[block, head, index, key] = torch.tensor(ladder[rung].bounds)
        if rung + 1 < len(ladder):
            heapq.heappush(queue, (-worth(place, key, rung + 1), place, key, rung + 1))


def _climb(ladder: list[_Rung], rung: int) -> tuple[int, float]:
    """What a rung costs and gains beyond the one before."""
    now, before = ladder[rung], ladder[rung - 1] if rung else _Rung(0, 0.0, (NONE, NONE))
    return now.cost - before.cost, now.kept - before.kept


def _ladders(mass: AttentionMass, late: list[int]) -> dict[Place, dict[int, list[_Rung]]]:
    """For every head and query scale, and each key scale but the first: windows that gain less and less a score."""
    ladders: dict[Place, dict[int, list[_Rung]]] = {}
    for index in late:
        for key in range(1, index + 1):
            before, after = _placed(mass, index, key)
            lengths = mass.schedule.lengths
            costs = tiled_scores(lengths[index], lengths[key], tile_size(mass.schedule, index), before, after).tolist()
            kept = mass.kept(index, key, before, after).tolist()
            bounds = torch.stack((before, after), dim=-1).tolist()
            for block, heads in enumerate(kept):
                for head, shares in enumerate(heads):
                    rungs = [
                        _Rung(cost, share, (low, high))
                        for cost, share, (low, high) in zip(
                            costs[block][head], shares, bounds[block][head], strict=True
                        )
                    ]
                    ladders.setdefault((block, head, index), {})[key] = _concave(rungs)
    return ladders


def _placed(
    mass: AttentionMass, index: int, key: int
) -> tuple[Int[Tensor, "blocks heads windows"], Int[Tensor, "blocks heads windows"]]:
    """For each of several lengths, the window that keeps most; the last keeps every key."""
    keys = mass.schedule.lengths[key]
    starts = torch.arange(-keys, keys, dtype=torch.int32)
    lows, highs, length = [], [], 1
    while length < 2 * keys:
        kept = mass.kept(index, key, -starts, starts + length + 1)
        low = starts[kept.argmax(-1)]
        lows.append(-low)
        highs.append(low + length + 1)
        length += max(1, length // 4)
    everything = torch.full_like(lows[0], ALL)
    return torch.stack([*lows, everything], dim=-1), torch.stack([*highs, everything], dim=-1)


def _concave(rungs: list[_Rung]) -> list[_Rung]:
    """Those that no mixture of a cheaper and a dearer one beats, from cheap to dear."""
    hull: list[_Rung] = []
    for rung in sorted(rungs, key=lambda r: (r.cost, -r.kept)):
        if rung.cost == 0 or (hull and (rung.cost == hull[-1].cost or rung.kept <= hull[-1].kept)):
            continue
        while hull:
            base = hull[-2] if len(hull) > 1 else _Rung(0, 0.0, (NONE, NONE))
            last = hull[-1]
            if (last.kept - base.kept) * (rung.cost - last.cost) > (rung.kept - last.kept) * (last.cost - base.cost):
                break
            hull.pop()
        hull.append(rung)
    return hull or rungs[-1:]
