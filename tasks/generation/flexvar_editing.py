"""Going on from an image: refinement from its coarse maps, and a larger canvas around it.

Jiao et al. 2025 (arXiv 2502.20313, sections 4.3 and appendix). In- and out-painting at any size is
:func:`nextscale.tasks.generation.editing.edit` with a list of scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import ImageDraws, image_seeds
from nextscale.core.sampling import Accepted
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.class_conditional import Condition
from nextscale.tasks.generation.editing import edit
from nextscale.tasks.generation.flexvar import FlexVAR


def accept(
    model: FlexVAR, images: Float[Tensor, "batch 3 height width"], schedule: ScaleSchedule, scales: int
) -> Accepted:
    """The first maps of images as the beginning of a sampling.

    Args:
        images: in [0, 1], of any size that the tokenizer takes.
        scales: how many of the schedule's maps are taken from the images.

    Raises:
        ValueError: no scale, or none but the images', is left.
    """
    if not 0 < scales < len(schedule):
        raise ValueError(f"{scales} scales of {len(schedule)} are to be kept; expected 1 to {len(schedule) - 1}")
    tokenizer, known = model.tokenizer, schedule.prefix(scales)
    tokens = tokenizer.encode(images.to(model.device) * 2 - 1, known)
    quantizer = tokenizer.quantizer
    return Accepted(scales, quantizer.decode(tokens, known)[-1], quantizer.teacher_inputs(tokens, schedule, scales + 1))


@torch.inference_mode()
def refine(
    model: FlexVAR,
    image: Float[Tensor, "3 height width"],
    scales: int,
    condition: Condition = None,
    n: int = 1,
    seed: int | Sequence[int] = 0,
    *,
    schedule: ScaleSchedule | str | None = None,
    guidance: float | None = None,
    top_k: int | Sequence[int] = 900,
    top_p: float | Sequence[float] = 0.95,
    temperature: float | Sequence[float] = 1.0,
    smooth: bool = False,
) -> Float[Tensor, "n 3 high wide"]:
    """Draw the fine maps of an image anew, from its coarse ones, also to another size than the image's.

    Args:
        image: in [0, 1], of any size that the tokenizer takes.
        scales: how many of the first maps are the image's: few keep its colours, many its shapes too.
        condition: as in ``generate``; None: no class.
        seed: version i is drawn from ``seed + i``, or one seed per version.
        schedule: None: the model's own. Its last scale is the size of the result.

    Returns:
        Images in [0, 1], on the CPU.
    """
    schedule = ScaleSchedule.parse(schedule or model.config.schedule)
    accepted = accept(model, image[None].expand(n, -1, -1, -1), schedule, scales)
    labels = model.labels(condition, n).to(model.device)
    steps = model.steps(
        torch.where(labels < 0, model.config.classes, labels),
        draws=ImageDraws(image_seeds(seed, n)),
        emitter=CategoricalEmitter(top_k, top_p, temperature, smooth),
        guidance=guidance,
        accepted=accepted,
        schedule=schedule,
    )
    *_, last = steps
    return model.picture(last.total).cpu()


def expand(
    model: FlexVAR,
    image: Float[Tensor, "3 height width"],
    schedule: ScaleSchedule | str,
    condition: Condition = None,
    n: int = 1,
    seed: int | Sequence[int] = 0,
    *,
    place: tuple[int, int] | None = None,
    **options: Any,
) -> Float[Tensor, "n 3 high wide"]:
    """Draw a larger picture around an image.

    Args:
        image: in [0, 1].
        schedule: its last scale is the canvas.
        place: of the image's top left corner on the canvas, (down, right) in pixels; None: the middle.
        options: as for :func:`nextscale.tasks.generation.editing.edit`.

    Raises:
        ValueError: the image does not lie on the canvas, cell by cell.
    """
    schedule = ScaleSchedule.parse(schedule)
    canvas, mask = on_canvas(image, schedule, model.tokenizer.stride, place)
    return edit(model, canvas, mask, condition, n, seed, schedule=schedule, **options)


def on_canvas(
    image: Float[Tensor, "3 height width"], schedule: ScaleSchedule, stride: int, place: tuple[int, int] | None = None
) -> tuple[Float[Tensor, "3 high wide"], Int[Tensor, "cells_high cells_wide"]]:
    """An image on the canvas of a list, its edges drawn out to the canvas's, and a mask: 1 where it lies."""
    (high, wide), (height, width) = schedule.scaled(stride), image.shape[-2:]
    if place is None:
        place = (high - height) // 2 // stride * stride, (wide - width) // 2 // stride * stride
    top, left = place
    fits = 0 <= top <= high - height and 0 <= left <= wide - width
    if not fits or any(number % stride for number in (top, left, height, width)):
        raise ValueError(
            f"an image of {height} x {width} pixels, {top} down and {left} right, does not lie on a canvas of {high} x "
            f"{wide}: it must fit, and all these numbers must be multiples of {stride}"
        )
    pad = (left, wide - width - left, top, high - height - top)
    mask = torch.zeros(schedule.final.grid, dtype=torch.int64)
    mask[top // stride : (top + height) // stride, left // stride : (left + width) // stride] = 1
    return F.pad(image[None], pad, mode="replicate")[0], mask
