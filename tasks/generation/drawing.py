"""Sampling batch by batch with everything kept on the way: classes, seeds, tokens, and how each picture forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.random import image_seeds
from nextscale.core.schedule import ScaleSchedule

DRAWING: dict[str, Any] = {"top_k": 900, "top_p": 0.96, "temperature": 1.0, "smooth": False}
"""How codes are drawn where nothing else is said: as for VAR's official figures."""


@dataclass(frozen=True)
class Drawn:
    """One batch.

    Attributes:
        images: in [0, 1], on the CPU.
        labels: class numbers; the number of classes stands for no class.
        seeds: one per image.
        tokens: of all scales in one sequence.
        forming: what is decoded after each scale, coarse to fine, for the first few images of the batch; None
            where it was not asked for.
    """

    images: Float[Tensor, "batch 3 height width"]
    labels: list[int]
    seeds: list[int]
    tokens: Int[Tensor, "batch length"]
    forming: Float[Tensor, "scales few 3 height width"] | None


@torch.inference_mode()
def draw(
    model: Any,
    condition: Any = None,
    n: int = 1,
    seed: int | Sequence[int] = 0,
    *,
    guidance: float | None = None,
    top_k: int | Sequence[int] = DRAWING["top_k"],
    top_p: float | Sequence[float] = DRAWING["top_p"],
    temperature: float | Sequence[float] = DRAWING["temperature"],
    smooth: bool = DRAWING["smooth"],
    batch_size: int = 16,
    official_draws: bool = False,
    forming: int = 0,
    progress: Callable[[int, int], None] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Iterator[Drawn]:
    """The images of ``generate`` (:class:`nextscale.tasks.generation.class_conditional.ClassConditional`), by batches.

    Args:
        given: what the model's ``steps`` takes beside the class; of tensors, one row per image. An entry
            ``schedule`` is the list of scales to draw, where the model takes one.
        forming: keep what is decoded after each scale for so many images, the first.
        progress: called with (scales done, scales in all) over all batches.

    Raises:
        ValueError: the model draws no images, or a class is unknown.
    """
    if not hasattr(model, "steps"):
        raise ValueError(f"a {type(model).__name__} draws no images; give a generator such as var-d16")
    emitter = model.make_emitter(top_k=top_k, top_p=top_p, temperature=temperature, smooth=smooth)
    seeds = image_seeds(seed, n)
    labels, given = model.labels(condition, n), given or {}
    schedule = ScaleSchedule.parse(given.get("schedule") or model.config.schedule)
    scales, batches = len(schedule), -(-n // batch_size)
    for number, start in enumerate(range(0, n, batch_size)):
        chosen = labels[start : start + batch_size]
        draws = model.draws(seeds[start : start + batch_size], official_draws)
        # The official code touches its generator only where classes are random; an image's own generator is
        # touched always, so that its picture does not depend on how its neighbours' classes were given.
        if not official_draws or bool((chosen < 0).any()):
            chosen = torch.where(chosen < 0, draws.integers(model.config.classes, len(chosen)).cpu(), chosen)
        few = max(min(forming - start, len(chosen)), 0)
        tokens, totals = [], []
        part = {k: v[start : start + batch_size] if isinstance(v, Tensor) else v for k, v in given.items()}
        for step in model.steps(chosen.to(model.device), draws=draws, emitter=emitter, guidance=guidance, **part):
            tokens.append(step.tokens.cpu())
            total = step.total
            totals.append(total[:few])
            if progress is not None:
                progress(number * scales + step.index + 1, batches * scales)
        images = model.picture(total).cpu()
        pictures = torch.stack([_as_large(model.picture(first).cpu(), images) for first in totals]) if few else None
        yield Drawn(images, chosen.tolist(), seeds[start : start + batch_size], torch.cat(tokens, 1), pictures)


def _as_large(pictures: Tensor, images: Tensor) -> Tensor:
    """Pictures in squares, where a model draws its coarse scales at their own size."""
    size = images.shape[-2:]
    return pictures if pictures.shape[-2:] == size else F.interpolate(pictures, size=size, mode="nearest")


def class_name(model: Any, label: int) -> str:
    """A class's name for a caption: the first synonym, else its number."""
    if label == model.config.classes:
        return "no class"
    names = model.config.class_names
    return str(names[label]).split(",")[0] if names else f"class {label}"
