"""Calibration: which keys a model can do without and which of its weights bear rounding, measured as it draws.

Nothing is trained and no data is needed. What entered at every scale is recorded while pictures are drawn; the same
inputs are then run again, to find windows, and with one layer rounded at a time, so that differences in what is drawn
from come from that alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.litevar import (
    LiteConfig,
    LitePlan,
    attention_compressed,
    check,
    find_transformer,
    fingerprint,
)
from nextscale.tasks.generation.litevar_packing import PackedLinear, linears
from nextscale.tasks.generation.litevar_packing import replace as replace_module
from nextscale.tasks.generation.litevar_recording import Run, divergences, draw_recorded
from nextscale.tasks.generation.litevar_search import all_scores, late_scales
from nextscale.tasks.generation.litevar_windowing import published_from, windows_for_work

ALWAYS_KEPT = ("feed_forward.contract",)
"""Layers whose inputs have the widest range; kept at 16 bits, as published."""


TEMPERATURES = tuple(1 + step / 400 for step in range(-40, 61))
"""To choose among: 0.9 to 1.15."""


@dataclass(frozen=True)
class Calibration:
    """What to measure and what to save.

    Attributes:
        images: pictures to draw.
        batch_size: drawn at once; memory and speed.
        seed: of the first picture.
        rule: how windows are chosen. ``work``: the keys without which what attention gives changes least, as many as
            the work that ``saving`` leaves, and standing in for those left out; ``mass``: the published rule, the
            narrowest bands that keep ``threshold`` of each key scale's attention; ``none``: no windows.
        saving: share of the attention's multiplications to be saved, sharing included.
        threshold: of the rule ``mass``.
        share: let guidance branches share the first one's attention, from the first scale of 16 tokens on.
        tile: neighbouring queries that share their keys. Fewer lose less for the same work, more make
            larger matrix products; None: half a row of each map.
        weight_bits: of the packed layers: 8, 4 where the weights bear it (``tolerance``), or 16 for none.
        keep: layers whose name contains one of these keep 16 bits.
        tolerance: largest Kullback-Leibler divergence, in nats per token, between what is drawn from before and after
            rounding one layer; a layer above it takes the next larger number of bits.
        cache_bits, activation_bits: as in :class:`nextscale.tasks.generation.litevar.LiteConfig`.
    """

    images: int = 32
    batch_size: int = 16
    seed: int = 0
    rule: str = "work"
    saving: float = 0.75
    threshold: float = 0.95
    share: bool = False
    tile: int | None = None
    weight_bits: int = 8
    keep: tuple[str, ...] = ALWAYS_KEPT
    tolerance: float = 0.01
    cache_bits: int = 8
    activation_bits: int = 16

    def __post_init__(self) -> None:
        if self.images < 1 or self.batch_size < 1:
            raise ValueError(f"{self.images} images in batches of {self.batch_size} were asked for; expected 1 or more")
        if self.rule not in ("work", "mass", "none"):
            raise ValueError(f"the rule for windows is {self.rule!r}, expected work, mass or none")
        if self.weight_bits not in (4, 8, 16):
            raise ValueError(f"weights of {self.weight_bits} bits were asked for, expected 4, 8 or 16")
        if self.tile is not None and self.tile < 1:
            raise ValueError(f"tiles of {self.tile} queries were asked for; expected 1 or more")
        if not 0 <= self.saving < 1:
            raise ValueError(f"{self.saving} of the work was to be saved; expected at least 0 and below 1")


def calibrate(
    model: Any, settings: Calibration | None = None, progress: Callable[[int, int], None] | None = None
) -> LitePlan:
    """A plan for a model, from pictures that it draws. The model is left as it was.

    Args:
        model: draws pictures by ``steps`` and has one next-scale transformer.
        progress: called with (parts done, all parts).

    Raises:
        ValueError: the model cannot be compressed, or the windows cannot save so much.
    """
    settings, schedule = settings or Calibration(), model.config.schedule
    check(model, LitePlan(LiteConfig(schedule)))
    late = late_scales(schedule)
    share_from = late[0] if settings.share and late else None
    layers = [name for name, _ in linears(model) if not any(part in name for part in settings.keep)]
    layers = layers if settings.weight_bits != 16 else []
    batches = range(0, settings.images, settings.batch_size)
    searched = settings.rule == "work" and bool(late)
    done, parts = 0, len(batches) + len(layers) + (2 * len(find_transformer(model).blocks) if searched else 0)

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, parts)

    runs = []
    for start in batches:
        number = min(settings.batch_size, settings.images - start)
        runs.append(draw_recorded(model, number, settings.seed + start))
        count()
    # What follows measures differences on the last batch.
    run = runs[-1]
    before = run.log_probabilities()
    tokens = sum(part.shape[1] for part in before)
    plan = LitePlan(
        LiteConfig(
            schedule=schedule,
            activation_bits=settings.activation_bits,
            cache_bits=settings.cache_bits,
            share_from=share_from,
            fingerprint=fingerprint(model),
            tile=settings.tile,
        )
    )
    measured = dict[str, Any]()
    if settings.rule == "mass":
        plan = replace(plan, widths=published_from(model, runs, share_from, settings.threshold))
    elif searched:
        branches, early = (1, 0.0) if share_from is None else (run.branches, early_share(schedule, share_from))
        found = windows_for_work(model, runs, plan, scores_left(settings.saving, branches, early), count)
        plan = replace(plan, keys=found.keys, bias=found.bias, offsets=found.offsets)
        measured["attention_kept"] = found.kept
    if settings.rule != "none" or settings.share:
        plan = replace(plan, config=replace(plan.config, temperatures=best_temperatures(model, runs, plan)))
    with attention_compressed(model, plan):
        measured["attention_divergence"] = sum(divergences(before, run.log_probabilities())) / tokens
    measured["attention_saved"] = attention_saved(plan, run.branches)
    rounded = {}
    for name in layers:
        rounded[name] = layer_divergence(model, name, settings.weight_bits, settings.tolerance, run, before)
        count()
    precision = {name: 16 for name, _ in linears(model)} | {
        name: next((bits for bits in sorted(each) if each[bits] <= settings.tolerance), 16)
        for name, each in rounded.items()
    }
    measured["divergence"] = {
        name: {str(bits): value for bits, value in each.items()} for name, each in rounded.items()
    }
    return replace(plan, config=replace(plan.config, precision=precision, measured=measured))


# --- windows ------------------------------------------------------------------------------------------


def best_temperatures(model: Any, runs: Sequence[Run], plan: LitePlan) -> tuple[float, ...]:
    """For each scale that with which a plan's attention changes least what is drawn from."""
    found = torch.zeros(len(plan.config.schedule), len(TEMPERATURES), dtype=torch.float64)
    for run in runs:
        before = run.log_probabilities()
        with attention_compressed(model, plan):
            after = run.log_probabilities()
        for place, temperature in enumerate(TEMPERATURES):
            changed = [(part / temperature).log_softmax(-1) for part in after]
            found[:, place] += run.images * torch.tensor(divergences(before, changed), dtype=torch.float64)
    return tuple(TEMPERATURES[place] for place in found.argmin(1).tolist())


def scores_left(saving: float, branches: int, early: float = 0.0) -> float:
    """The share of scores that may be computed so that ``saving`` of all multiplications is saved.

    Scores are multiplied once for all branches, values once for each: of 2 b products for b branches, 1 + b are left.

    Args:
        early: the share of scores of the scales where branches do not share.
    """
    return early + (1 - saving - early) * 2 * branches / (1 + branches)


def early_share(schedule: ScaleSchedule, scales: int) -> float:
    """Scores of the first scales, as a share of all."""
    return all_scores(schedule.prefix(scales)) / all_scores(schedule) if scales else 0.0


def attention_saved(plan: LitePlan, branches: int) -> float:
    """The share of multiplications that attention does not do under a plan, drawing with so many guidance branches."""
    schedule, share_from = plan.config.schedule, plan.config.share_from
    blocks, heads = plan.sizes or (1, 1)
    done = full = 0
    for block in range(blocks):
        windows = plan.windows(block) or [None] * len(schedule)
        for index, window in enumerate(windows):
            scores = heads * schedule.lengths[index] * schedule.ranges[index][1]
            shared = share_from is not None and index >= share_from
            done += (scores if window is None else window.scores) * ((1 if shared else branches) + branches)
            full += 2 * branches * scores
    return 1 - done / full


# --- precision ----------------------------------------------------------------------------------------


@contextmanager
def layer_packed(model: nn.Module, name: str, bits: int) -> Iterator[None]:
    """One layer's weights rounded, for as long as the context lasts."""
    layer = cast(nn.Linear, model.get_submodule(name))
    replace_module(model, name, PackedLinear.of(layer, bits))
    try:
        yield
    finally:
        replace_module(model, name, layer)


def layer_divergence(
    model: nn.Module, name: str, bits: int, tolerance: float, run: Run, before: Sequence[Tensor]
) -> Mapping[int, float]:
    """By how much what is drawn from changes when one layer is rounded, in nats per token.

    Args:
        bits: to begin with; where that changes it by more than the tolerance, 8 bits are tried too.
    """
    tokens = sum(part.shape[1] for part in before)
    found: dict[int, float] = {}
    inputs = cast(nn.Linear, model.get_submodule(name)).in_features
    for tried in sorted({bits, 8}):
        if tried < bits or (tried == 4 and inputs % 2) or min(found.values(), default=tolerance + 1) <= tolerance:
            continue
        with layer_packed(model, name, tried):
            found[tried] = sum(divergences(before, run.log_probabilities())) / tokens
    return found
