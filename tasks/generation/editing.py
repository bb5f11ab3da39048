"""Zero-shot editing: part of an image's tokens is held fixed while the rest is drawn.

VAR's in-painting, out-painting and class-conditional editing (arXiv 2404.02905, section 5.3). At every
scale, after the draw, the code vectors of kept cells are put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import ImageDraws, image_seeds
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.class_conditional import Condition
from nextscale.tasks.generation.var import VAR

ALWAYS_KEPT = 3
"""Grids of at most so many cells are kept wholly: they carry the image's overall colour."""


def box_mask(
    grid: tuple[int, int], box: tuple[float, float, float, float], keep_inside: bool
) -> Int[Tensor, "height width"]:
    """1 where tokens are kept, 0 where they are drawn.

    Args:
        grid: (height, width) of the finest map.
        box: (top, left, bottom, right) as fractions of the image; edges are rounded to cells, halves to even.
        keep_inside: keep the box and draw around it (out-painting), or the reverse (in-painting).

    Raises:
        ValueError: the box leaves [0, 1] or its edges are in the wrong order.
    """
    top, left, bottom, right = box
    if not (0 <= top <= bottom <= 1 and 0 <= left <= right <= 1):
        raise ValueError(
            f"the box {box} is (top, left, bottom, right) in fractions of the image: 0 <= top <= bottom <= 1, "
            "0 <= left <= right <= 1"
        )
    height, width = grid
    inside = torch.zeros(grid, dtype=torch.int64)
    inside[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = 1
    return inside if keep_inside else 1 - inside


@dataclass(frozen=True)
class KeptTokens:
    """A control of the sampling loop: cells under the mask take the image's codes.

    Attributes:
        codes: of the image, (batch, length, channels).
        mask: 1 = keep, at the finest grid.
    """

    codes: Float[Tensor, "batch length channels"]
    mask: Int[Tensor, "height width"]
    schedule: ScaleSchedule

    def kept(self, index: int) -> Tensor:
        """bool (tokens,): the cells of a scale that are kept."""
        scale = self.schedule[index]
        if scale.tokens <= ALWAYS_KEPT:
            return torch.ones(scale.tokens, dtype=torch.bool, device=self.codes.device)
        mask = self.mask[None, None].to(self.codes.device, torch.float32)
        return (F.interpolate(mask, size=scale.grid, mode="bilinear") > 0.5).flatten()

    def adjust(self, codes: Tensor, index: int) -> Tensor:
        start, stop = self.schedule.ranges[index]
        return torch.where(self.kept(index)[:, None], self.codes[:, start:stop].to(codes.dtype), codes)


@torch.inference_mode()
def edit(
    model: VAR,
    image: Float[Tensor, "3 height width"],
    mask: Int[Tensor, "cells_high cells_wide"],
    condition: Condition = None,
    n: int = 1,
    seed: int | Sequence[int] = 0,
    *,
    guidance: float = 3.0,
    top_k: int | Sequence[int] = 900,
    top_p: float | Sequence[float] = 0.95,
    temperature: float | Sequence[float] = 1.0,
    smooth: bool = False,
    schedule: ScaleSchedule | None = None,
) -> Float[Tensor, "n 3 height width"]:
    """Draw ``n`` versions of an image, its tokens under the mask kept.

    Args:
        image: in [0, 1], of the size that the scales stand for.
        mask: 1 = keep, at the finest grid (see :func:`box_mask`).
        condition: as in :meth:`VAR.generate`; None: no class, as for in- and out-painting.
        seed: version i is drawn from ``seed + i``, or one seed per version.
        schedule: other scales than the model's own, where it takes any (FlexVAR).

    Returns:
        Images in [0, 1], on the CPU.

    Raises:
        ValueError: image or mask have another size than the scales.
    """
    given: dict[str, Any] = {} if schedule is None else {"schedule": schedule}
    schedule, tokenizer = schedule or model.config.schedule, model.tokenizer
    size = (3, *tokenizer.image_size(schedule))
    if tuple(image.shape) != size:
        raise ValueError(f"the image is {tuple(image.shape)}, the scales '{schedule}' stand for {size}")
    if tuple(mask.shape) != schedule.final.grid:
        raise ValueError(f"the mask is {tuple(mask.shape)}, expected the finest grid, {schedule.final.grid}")
    tokens = tokenizer.encode(image[None].to(model.device) * 2 - 1, schedule)
    control = KeptTokens(tokenizer.quantizer.lookup(tokens), mask, schedule)
    labels = model.labels(condition, n).to(model.device)
    labels = torch.where(labels < 0, model.config.classes, labels)
    final: Any = None
    for step in model.steps(
        labels,
        draws=ImageDraws(image_seeds(seed, n)),
        emitter=CategoricalEmitter(top_k, top_p, temperature, smooth),
        guidance=guidance,
        controls=[control],
        **given,
    ):
        final = step.total
    return model.picture(final).cpu()
