"""Windows found from drawn batches: by the published rule, or for a given amount of work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.transformer import SelfAttention
from nextscale.tasks.generation.litevar import LitePlan, attention_compressed, find_transformer
from nextscale.tasks.generation.litevar_attention import lite_attention
from nextscale.tasks.generation.litevar_cache import Vectors
from nextscale.tasks.generation.litevar_plan import Offsets, TileBias
from nextscale.tasks.generation.litevar_recording import Run, Seen
from nextscale.tasks.generation.litevar_search import (
    TileKeys,
    band_attention,
    best_keys,
    kept_attention,
    late_scales,
    published_windows,
)
from nextscale.tasks.generation.litevar_stand_ins import Effects, elimination_costs, stand_in_weights
from nextscale.tasks.generation.litevar_windows import Window, tile_size

PUBLISHED_FLOOR = 0.003
"""Attention below this, averaged over pictures, counts as none in the published search."""


LITTLE = 0.02
"""Of the Fisher information, the share of its mean that is added in all directions."""


def published_from(
    model: Any, runs: Sequence[Run], share_from: int | None, threshold: float
) -> Int[Tensor, "blocks heads scales scales"]:
    """Widths by the published rule (:func:`nextscale.tasks.generation.litevar_search.published_windows`)."""
    schedule, blocks = model.config.schedule, len(find_transformer(model).blocks)
    sums: dict[tuple[int, int], list[list[Tensor]]] = {}

    def see(seen: Seen) -> None:
        weights = seen.weights()[: seen.shared].mean(0)
        parts = band_attention(torch.where(weights < PUBLISHED_FLOOR, 0, weights), schedule, seen.index)
        for key, part in enumerate(parts):
            sums.setdefault((seen.index, key), [[] for _ in range(blocks)])[seen.layer].append(part.cpu())

    for run in runs:
        run.watch(model, see, share_from)
    shares = {place: torch.stack([torch.stack(batches).mean(0) for batches in parts]) for place, parts in sums.items()}
    return published_windows(shares, schedule, threshold)


@dataclass
class Windows:
    """Windows for a given amount of work; :class:`nextscale.tasks.generation.litevar_plan.LitePlan` tells of each.

    Attributes:
        kept: how much of its attention a token of a late scale keeps, averaged over blocks, heads and tokens.
    """

    keys: TileKeys
    bias: TileBias
    offsets: Offsets
    kept: float


def windows_for_work(
    model: Any, runs: Sequence[Run], plan: LitePlan, share: float, progress: Callable[[], None] = lambda: None
) -> Windows:
    """The keys without which what attention gives changes least, and what stands in for the others.

    Block by block: first which keys could be missed; then, with the windows of the blocks before in place, how much
    those that are kept count, and what the heads' averages still lack.

    Args:
        plan: says of the windows all but what is found here.
        share: of the scores of all keys that may be computed, those of the small scales included.
        progress: called after each block, twice.

    Raises:
        ValueError: the small scales alone take more than that.
    """
    schedule, tile = plan.config.schedule, plan.config.tile
    late, blocks = late_scales(schedule), range(len(find_transformer(model).blocks))
    information = fisher_information(model, runs)
    costs, attention, outputs = ({index: list[Tensor]() for index in late} for _ in range(3))
    for block in blocks:
        found, before = _effects(model, runs, block, plan, information)
        for index, effects in found.items():
            # What a score is worth, wherever it is: a key of a larger tile costs more of them.
            costs[index].append((elimination_costs(effects) / tile_size(schedule, index, tile)).cpu())
            attention[index].append(effects.attention.cpu() / effects.images)
            outputs[index].append(before[index])
        progress()
    keys = best_keys({index: torch.stack(each) for index, each in costs.items()}, schedule, share, tile)
    bias, offsets = ({index: list[Tensor]() for index in late} for _ in range(2))
    with attention_compressed(model, replace(plan, config=replace(plan.config, cache_bits=16))) as plans:
        for block in blocks:
            windows: dict[int, Window] = {}
            for index, effects in _effects(model, runs, block, plan, information)[0].items():
                kept = keys[index][block]
                counted = stand_in_weights(effects, kept.to(effects.attention.device)).cpu()
                bias[index].append(torch.where(kept, counted.log(), 0).half())
                windows[index] = Window.from_tiles(
                    kept, schedule.lengths[index], tile_size(schedule, index, tile), bias[index][-1]
                )
            given = _outputs(model, runs, block, plan, windows)
            for index, window in windows.items():
                offsets[index].append((outputs[index][block] - given[index]).bfloat16().cpu())
                windows[index] = replace(window, offset=offsets[index][-1])
            plans[block].windows[:] = [windows.get(index) for index in range(len(schedule))]
            progress()
    return Windows(
        keys,
        {index: torch.stack(each) for index, each in bias.items()},
        {index: torch.stack(each) for index, each in offsets.items()},
        kept_attention({index: torch.stack(each) for index, each in attention.items()}, keys, schedule),
    )


Information = dict[tuple[int, int], Float[Tensor, "heads branches branches size size"]]
"""Of a block and a late scale, what :class:`nextscale.tasks.generation.litevar_stand_ins.Effects` weighs with."""


def fisher_information(model: Any, runs: Sequence[Run]) -> Information:
    """The Fisher information of symbols that a model draws, in what its heads take before the output projection.

    It is averaged over the queries of a scale, with a little of the same in all directions, for those that few
    pictures do not tell of.
    """
    late, found, heads = late_scales(model.config.schedule), Information(), find_transformer(model).config.heads
    branches, images = runs[0].branches, sum(run.images for run in runs)

    def see(layer: int, index: int, attention: SelfAttention, gradient: Tensor) -> None:
        if index not in late:
            return
        parts = (gradient.float() @ attention.projection.weight.float()).unflatten(-1, (heads, -1))
        joined = parts.unflatten(0, (branches, -1)).permute(3, 1, 2, 0, 4).flatten(3).flatten(1, 2)
        share = joined.mT @ joined / (images * gradient.shape[1])
        found[layer, index] = found[layer, index] + share if (layer, index) in found else share

    generator = torch.Generator().manual_seed(0)
    for run in runs:
        run.log_gradients(model, see, generator)
    for place, value in found.items():
        even = LITTLE * value.diagonal(dim1=1, dim2=2).mean(1)
        value = value + torch.diag_embed(even[:, None].expand(-1, value.shape[1]))
        found[place] = value.detach().unflatten(2, (branches, -1)).unflatten(1, (branches, -1)).transpose(2, 3)
    return found


def _effects(
    model: Any, runs: Sequence[Run], block: int, plan: LitePlan, information: Information
) -> tuple[dict[int, Effects], dict[int, Tensor]]:
    """Of one block, as the model now is, for each late scale; and what its heads take, (heads, queries, size), averaged
    over pictures and branches."""
    schedule = plan.config.schedule
    late, found, outputs = late_scales(schedule), dict[int, Effects](), dict[int, Tensor]()
    total = sum(run.images * run.branches for run in runs)

    def see(seen: Seen) -> None:
        if seen.index not in late:
            return
        rows, keys, heads, size = seen.value.shape
        tile = tile_size(schedule, seen.index, plan.config.tile)
        if seen.index not in found:
            queries, device = seen.query.shape[1], seen.value.device
            found[seen.index] = Effects.none(heads, queries, keys, tile, device)
            outputs[seen.index] = torch.zeros(heads, queries, size, device=device)
        weights, value = seen.weights(), seen.value.float().transpose(1, 2)
        output = weights @ value
        outputs[seen.index] += output.sum(0) / total
        if seen.shared is not None:
            weights = weights[: seen.shared].repeat(rows // seen.shared, 1, 1, 1)
            output = weights @ value
        found[seen.index].add(weights, value, output, information[seen.layer, seen.index], tile)

    for run in runs:
        run.watch(model, see, plan.config.share_from, block)
    return found, outputs


def _outputs(
    model: Any, runs: Sequence[Run], block: int, plan: LitePlan, windows: dict[int, Window]
) -> dict[int, Tensor]:
    """What one block's heads take within windows, (heads, queries, size), averaged over pictures and branches."""
    sums = dict[int, Tensor]()
    rows = sum(run.images * run.branches for run in runs)

    def see(seen: Seen) -> None:
        if seen.index not in windows:
            return
        window = windows[seen.index].to(seen.value.device)
        query, key = seen.query[: seen.shared], Vectors.of(seen.key[: seen.shared])
        given = lite_attention(
            query, key, Vectors.of(seen.value), seen.key.shape[1], seen.attention.scale, window=window
        )
        part = given.float().sum(0).transpose(0, 1) / rows
        sums[seen.index] = sums[seen.index] + part if seen.index in sums else part

    for run in runs:
        run.watch(model, see, plan.config.share_from, block)
    return sums
