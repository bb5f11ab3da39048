"""Training DAR: the scale-invariant error of logarithms, at every scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nextscale.core.training import Batch, Metrics, TrainingTask

if TYPE_CHECKING:
    from nextscale.tasks.depth.dar import DAR

WEIGHT = 10.0
VARIANCE_FOCUS = 0.85


def scale_invariant_error(
    prediction: Float[Tensor, "batch 1 height width"],
    truth: Float[Tensor, "batch 1 height width"],
    valid: Bool[Tensor, "batch 1 height width"],
    variance_focus: float = VARIANCE_FOCUS,
) -> Float[Tensor, ""]:
    """10 sqrt(mean g^2 - lambda (mean g)^2) of g = ln truth - ln prediction, over all valid pixels of the batch.

    Eigen et al. 2014, in the form of Lee et al. 2019 (BTS). 0 where no pixel is valid.

    Args:
        prediction, truth: metres; positive where valid.
        variance_focus: lambda; at 1 the error is blind to a common factor.
    """
    difference = truth[valid].log() - prediction[valid].log()
    if not difference.numel():
        return prediction.sum() * 0
    variance = (difference**2).mean() - variance_focus * difference.mean() ** 2
    # A perfect prediction has no gradient; the root would give it an infinite one.
    return WEIGHT * torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)


def scale_losses(
    depths: Sequence[Tensor], truth: Tensor, valid: Tensor, variance_focus: float = VARIANCE_FOCUS
) -> Float[Tensor, " scales"]:
    """The error of every scale's depth map; the loss is their sum."""
    return torch.stack([scale_invariant_error(depth, truth, valid, variance_focus) for depth in depths])


class DARTraining(TrainingTask):
    """Trains a :class:`nextscale.tasks.depth.dar.DAR`.

    A batch holds ``image`` (batch, 3, height, width) in [-1, 1], ``depth`` (batch, 1, height, width) in metres, and
    ``valid``, bool of the same shape: where the depth is known.
    """

    def __init__(self, model: DAR, *, variance_focus: float = VARIANCE_FOCUS) -> None:
        self.model, self.variance_focus, self.name = model, variance_focus, model.system
        self.phases: dict[str, nn.Module] = {self.name: model}

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        truth, valid = batch["depth"].float(), batch["valid"]
        depths = module(batch["image"])
        losses = scale_losses([depth.float() for depth in depths], truth, valid, self.variance_focus)
        with torch.no_grad():
            last, known = depths[-1][valid].float(), truth[valid]
            wrong = ((last - known).abs() / known).mean() if known.numel() else last.sum()
            right = (torch.maximum(last / known, known / last) < 1.25).float().mean() if known.numel() else last.sum()
        figures = {"first_scale": losses[0].detach(), "last_scale": losses[-1].detach()}
        return losses.sum(), {**figures, "abs_rel": wrong, "delta1": right}

    def evaluate(self, batch: Batch) -> Metrics:
        """Loss and metric errors, of all pixels together."""
        loss, metrics = self.loss(self.name, self.model, batch, 0)
        return {"loss": loss, **metrics}
