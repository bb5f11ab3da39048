"""Attention with windows, and shared between guidance branches: only what is needed is computed.

Queries of late scales are multiplied with the keys of their windows alone. Where branches share their attention,
queries and keys of the first branch give the weights, once per image, with which every branch weighs its own values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nextscale.core.attention import Visibility, attend
from nextscale.core.cache import KeyValueCache
from nextscale.core.fused import linear
from nextscale.core.rotary import Rotation, rotate
from nextscale.core.schedule import ScaleSchedule, Segment
from nextscale.core.transformer import SelfAttention
from nextscale.tasks.generation.litevar_cache import LiteCache, Vectors
from nextscale.tasks.generation.litevar_quantizers import Quantizer
from nextscale.tasks.generation.litevar_windows import TileGroup, Window

Form = Literal["absent", "logits", "probabilities"]
"""What a key outside of the window is. ``absent``: not there, and the weights of the others sum to 1. ``logits``: its
logit is 0, as the published code has it, so that it counts with weight e^0. ``probabilities``: its weight is set to 0
after the softmax over all keys, as in the published code's quantised path; the others then sum to less than 1."""

CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Numbers to gather at once, at most, so that what is gathered stays near."""


@dataclass
class Work:
    """Multiplications that attention has really done.

    Attributes:
        scores: of queries and keys.
        values: of weights and values.
        full: what attention to all keys in all branches would have taken, both kinds together.
    """

    scores: int = 0
    values: int = 0
    full: int = 0

    @property
    def done(self) -> int:
        return self.scores + self.values

    @property
    def saved(self) -> float:
        """The share of the full work that was not done."""
        return 1 - self.done / self.full if self.full else 0.0

    def clear(self) -> None:
        self.scores = self.values = self.full = 0


def lite_attention(
    query: Float[Tensor, "images queries heads size"],
    keys: Vectors,
    values: Vectors,
    visible: int,
    scale: float,
    *,
    window: Window | None = None,
    form: Form = "absent",
    bits: int | None = None,
    work: Work | None = None,
) -> Float[Tensor, "rows queries heads size"]:
    """Attention of one scale's queries.

    Args:
        query, keys: of the rows whose attention counts: all, or those of the first branch.
        values: of all rows, branch by branch; their number is a multiple of the images.
        visible: keys up to and with the queries' scale.
        window: what is kept; None: all.
        bits: simulate so many bits for queries, keys, values and probabilities; then ``form`` is "probabilities".

    Raises:
        ValueError: the rows of the values are no multiple of the images.
    """
    images, count, heads, size = query.shape
    if values.rows % images:
        raise ValueError(f"{values.rows} rows of values do not divide into branches of {images} images")
    branches = values.rows // images
    work = work or Work()
    work.full += 2 * values.rows * heads * count * visible * size
    if window is None and branches == 1 and bits is None:
        each = images * heads * count * visible * size
        work.scores, work.values = work.scores + each, work.values + each
        return attend(query, keys.read(visible).transpose(1, 2), values.read(visible).transpose(1, 2), scale)
    tiled = window is not None and form != "probabilities" and bits is None
    per_image = (
        max(g.keys.numel() for g in window.groups) * size
        if window is not None and tiled
        else heads * max(count, size) * visible
    )
    step = max(1, CHUNK.get(query.device.type, CHUNK["cpu"]) // (per_image * (1 + branches)))
    out = torch.empty(values.rows, heads, count, size, dtype=values.dtype, device=query.device)
    for start in range(0, images, step):
        chosen = slice(start, min(start + step, images))
        rows = [slice(b * images + chosen.start, b * images + chosen.stop) for b in range(branches)]
        part = query[chosen].transpose(1, 2)
        if tiled:
            assert window is not None
            results = _tiled(part, keys, values, chosen, rows, visible, scale, window, form, work)
        else:
            mask = None if window is None else window.mask
            results = _explicit(part, keys, values, chosen, rows, visible, scale, mask, bits, work)
        for place, result in zip(rows, results, strict=True):
            out[place] = result
    return out.transpose(1, 2)


def _explicit(
    query: Float[Tensor, "images heads queries size"],
    keys: Vectors,
    values: Vectors,
    chosen: slice,
    rows: Sequence[slice],
    visible: int,
    scale: float,
    mask: Bool[Tensor, "heads queries keys"] | None,
    bits: int | None,
    work: Work,
) -> list[Tensor]:
    """All scores, then the mask on the probabilities."""
    key = keys.read(visible, chosen)
    if bits is not None:
        vectors = Quantizer("group", bits, group=query.shape[-1])
        query, key = vectors(query), vectors(key)
    scores = torch.matmul(query.float(), key.float().mT)
    weights = scores.mul_(scale).softmax(-1)
    if bits is not None and visible > 1:
        weights = Quantizer("static", bits)(weights)
    if mask is not None:
        weights = weights * mask
    weights = weights.to(values.dtype)
    results = []
    for place in rows:
        value = values.read(visible, place)
        if bits is not None and visible > 1:
            value = Quantizer("axis", bits, axis=2)(value)
        results.append(weights @ value)
    each = weights.numel() * query.shape[-1]
    work.scores, work.values = work.scores + each, work.values + each * len(rows)
    return results


def _tiled(
    query: Float[Tensor, "images heads queries size"],
    keys: Vectors,
    values: Vectors,
    chosen: slice,
    rows: Sequence[slice],
    visible: int,
    scale: float,
    window: Window,
    form: Form,
    work: Work,
) -> list[Tensor]:
    """The scores of the windows' tiles alone."""
    images, heads, count, size = query.shape
    filled = F.pad(query, (0, 0, 0, window.tiles * window.tile - count))
    filled = filled.reshape(images, heads * window.tiles, window.tile, size).float()
    results = [torch.empty_like(filled, dtype=values.dtype) for _ in rows]
    totals = [values.read(visible, place).float().sum(2) for place in rows] if form == "logits" else []
    for group in window.groups:
        key = keys.gather(group.heads, group.keys, chosen).float()
        scores = torch.matmul(filled.index_select(1, group.tiles), key.mT).mul_(scale)
        if group.bias is not None:
            scores += group.bias[:, None]
        if form == "logits":
            weights, outside = _zero_logit_weights(scores, group, visible)
        else:
            weights = scores.masked_fill_(~_kept(group), -torch.inf).softmax(-1)
        weights = weights.to(values.dtype)
        for b, place in enumerate(rows):
            result = weights @ values.gather(group.heads, group.keys, place)
            if form == "logits":
                result = (result + outside * totals[b].index_select(1, group.heads)[:, :, None]).to(result.dtype)
            results[b].index_copy_(1, group.tiles, result)
        each = scores.numel() * size
        work.scores, work.values = work.scores + each, work.values + each * len(rows)
    taken = [result.view(images, heads, -1, size)[:, :, :count] for result in results]
    return taken if window.offset is None else [each + window.offset.to(each.dtype) for each in taken]


def _kept(group: TileGroup) -> Bool[Tensor, "tiles queries keys"]:
    """Without what fills a tile's keys up, and what an exact mask drops."""
    there = torch.arange(group.keys.shape[1], device=group.keys.device) < group.counts[:, None]
    return there[:, None] if group.mask is None else group.mask & there[:, None]


def _zero_logit_weights(scores: Tensor, group: TileGroup, visible: int) -> tuple[Tensor, Tensor]:
    """Weights of the kept keys and of every key alike, so that keys with logit 0 need not be multiplied.

    With m = max(0, kept logits), softmax over logits that are l where kept and 0 elsewhere is
    sum_kept (e^(l-m) - e^-m) v + e^-m sum_all v, divided by sum_kept (e^(l-m) - e^-m) + visible e^-m.
    """
    kept = _kept(group)
    most = scores.masked_fill(~kept, 0).amax(-1, keepdim=True).clamp_min(0)
    outside = (-most).exp()
    inside = torch.where(kept, (scores - most).exp() - outside, 0)
    total = inside.sum(-1, keepdim=True) + visible * outside
    return inside / total, outside / total


# --- in a model ---------------------------------------------------------------------------------------


@dataclass
class AttentionPlan:
    """How one block attends.

    Attributes:
        schedule: the scales that windows belong to.
        windows: one per scale; None: all keys. Empty: no windows at all.
        form: what keys outside of windows are.
        bits: of the published simulation, if any.
        work: counts what is done; one for all blocks of a model.
    """

    schedule: ScaleSchedule
    windows: list[Window | None] = field(default_factory=list)
    form: Form = "absent"
    bits: int | None = None
    work: Work = field(default_factory=Work)

    def window(self, start: int, stop: int, device: torch.device) -> Window | None:
        """The window of the scale whose queries have these positions; it moves to the device and stays there.

        Raises:
            ValueError: these positions are no scale of the schedule.
        """
        if not self.windows:
            return None
        if (start, stop) not in self.schedule.ranges:
            raise ValueError(
                f"the windows belong to the scales '{self.schedule}', none of which has the positions {start} to "
                f"{stop}: draw with these scales, or calibrate with the others"
            )
        index = self.schedule.ranges.index((start, stop))
        window = self.windows[index]
        if window is not None and window.device != device:
            window = self.windows[index] = window.to(device)
        return window


class LiteAttention(SelfAttention):
    """A block's attention as a plan says, with the weights of the one it takes the place of.

    Windows are the same whether the scales are run one by one or at once; branches share only where they are drawn
    one by one, with a :class:`LiteCache`.
    """

    plan: AttentionPlan

    def forward(
        self,
        x: Tensor,
        segments: Visibility | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """As of :class:`nextscale.core.transformer.SelfAttention`, but for what the plan leaves out.

        Raises:
            ValueError: what is seen is given as a tensor, so that scales cannot be told.
        """
        if isinstance(segments, Tensor):
            raise ValueError("a compressed model runs scale by scale; visibility was given as a bias, for training")
        plan, (q, k, v) = self.plan, self.project(x)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        start = 0 if cache is None else cache.filled(layer)
        if isinstance(cache, LiteCache):
            keys, values = cache.write(layer, k, v)
        else:
            keys, values = (Vectors.of(t) for t in ((k, v) if cache is None else cache.append(layer, k, v)))
        end = start + x.shape[1]
        parts = []
        for segment in segments or [Segment(0, x.shape[1], end)]:
            # Segments count queries from the first that is given, windows from the first of all.
            window = plan.window(start + segment.start, start + segment.stop, x.device)
            queries = q[: keys.rows, segment.start : segment.stop]
            part = lite_attention(
                queries, keys, values, segment.visible, self.scale,
                window=window, form=plan.form, bits=plan.bits, work=plan.work,
            )  # fmt: skip
            parts.append(part)
        out = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return F.dropout(linear(self.projection, out.flatten(2)), self.dropout, self.training)
