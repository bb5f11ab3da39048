"""Training DepthART on its own predictions, and DepthVAR by teacher forcing.

Gabdullin et al. 2025 (arXiv 2409.15010); official code bulatko/DepthART, ``depthart.py`` and ``depth_var.py``. The
release lacks the function that makes the refined targets; it follows from where it is called, and from the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.random import ImageDraws
from nextscale.core.training import Batch, Metrics, TrainingTask
from nextscale.tasks.depth.depthart_sampling import GREEDY
from nextscale.tasks.generation.var_training import next_scale_loss

if TYPE_CHECKING:
    from nextscale.tasks.depth.depthart import DepthART

LATENT_WEIGHT = 10.0
"""Weight of the latent term (``f_dif`` in the official code)."""


@dataclass(frozen=True)
class DepthARTLoss:
    """Attributes:

    label_smoothing: of the cross-entropy.
    latent: of refined training: the last scale is not classified; the softmax over its codes is mixed to one vector per
        cell, and what all scales then amount to is compared with the latent of the true depth.
    noise: Gumbel noise in that softmax.
    detached: as the release, let no gradient pass from the depth's inputs to the embeddings.
    """

    label_smoothing: float = 0.0
    latent: bool = True
    noise: bool = True
    detached: bool = False


@dataclass(frozen=True)
class Refinement:
    """What a network's own predictions amount to, and what there was to say at each scale.

    Attributes:
        inputs: of the scales 1, 2, ….
        targets: nearest codes of what was left to explain, scale by scale, as far as scales were predicted.
        total: what the predictions amount to.
    """

    inputs: Float[Tensor, "batch rest channels"]
    targets: Int[Tensor, "batch tokens"]
    total: Float[Tensor, "batch channels height width"]


@torch.no_grad()
def refine(
    model: DepthART, photo: Tensor, latent: Float[Tensor, "batch channels height width"], scales: int
) -> Refinement:
    """Let the model predict its first ``scales`` scales greedily, and say after each what would have been right.

    The target of scale k is the nearest code of what the true latent still lacks after the predictions of the scales
    before, shrunk to the scale's grid: errors made so far are to be corrected, not to be repeated.

    Args:
        photo: from the model's ``pyramid``.
        latent: of the true depth.
    """
    schedule, quantizer = model.config.schedule, model.tokenizer.quantizer
    total, inputs, targets = quantizer.begin(len(photo), schedule), [], []
    for step in model.steps(photo, draws=ImageDraws([0] * len(photo)), emitter=GREEDY, stop=scales):
        rest = quantizer.shrink(latent - total, schedule, step.index)
        found = quantizer.nearest(rest.movedim(1, -1).flatten(0, 2))
        targets.append(found.view(len(photo), -1))
        total = step.total
        if step.index + 1 < len(schedule):
            inputs.append(quantizer.next_input(total, schedule, step.index + 1))
    # Joined and cloned outside of the sampler's inference mode, so that gradients may meet them.
    return Refinement(torch.cat(inputs, dim=1), torch.cat(targets, dim=1), total.clone())


@dataclass(frozen=True)
class Terms:
    """One training pass.

    Attributes:
        logits, targets: of the scales that are classified.
        total: what the predictions amount to.
        loss: ``cross_entropy`` + ``latent``.
    """

    logits: Float[Tensor, "batch tokens vocabulary"]
    targets: Int[Tensor, "batch tokens"]
    total: Float[Tensor, "batch channels height width"]
    cross_entropy: Float[Tensor, ""]
    latent: Float[Tensor, ""]
    metrics: Mapping[str, Tensor]

    @property
    def loss(self) -> Float[Tensor, ""]:
        return self.cross_entropy + self.latent


class DepthARTTraining(TrainingTask):
    """Trains a :class:`nextscale.tasks.depth.depthart.DepthART` as its configuration says.

    A batch holds ``image`` (batch, 3, height, width) in [-1, 1], ``depth`` (batch, 1, height, width) in metres and
    ``valid``, bool of that shape, without which all depth counts as known.

    What a scale is given carries no gradient, so the refined form needs no backward pass through the roll-out: the
    predictions are made first, without gradients, and all scales are then run at once on what they amount to.
    """

    name = "depthart"

    def __init__(self, model: DepthART, config: DepthARTLoss | None = None) -> None:
        self.model, self.config = model, config or DepthARTLoss()
        self.phases: dict[str, nn.Module] = {self.name: model}

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        device = batch["image"].device
        # The frozen tokenizer works in its own precision, outside autocast.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            photo = self.model.pyramid(batch["image"])
            latent = self.model.depth_features(self.model.config.normalizer.target(batch["depth"], batch.get("valid")))
        terms = self.terms(module, photo, latent)
        return terms.loss, {**terms.metrics, "latent": terms.latent.detach()}

    def terms(self, module: nn.Module, photo: Tensor, latent: Tensor) -> Terms:
        """One pass over encoded photos and the latents of their depths.

        Args:
            module: the model as it must be called (wrapped for distributed training).
        """
        if self.model.config.training == "plain":
            return self._plain(module, photo, latent)
        return self._refined(module, photo, latent)

    def _plain(self, module: nn.Module, photo: Tensor, latent: Tensor) -> Terms:
        """Teacher forcing: the true tokens are targets and, from scale to scale, inputs."""
        schedule, quantizer = self.model.config.schedule, self.model.tokenizer.quantizer
        tokens = torch.cat(quantizer.encode(latent, schedule)[0], dim=1)
        logits = module(photo, quantizer.teacher_inputs(tokens, schedule))
        loss, metrics = next_scale_loss(
            logits, tokens, schedule, schedule.length, label_smoothing=self.config.label_smoothing
        )
        with torch.no_grad():
            total = quantizer.decode(logits.argmax(-1), schedule)[-1]
        return Terms(logits, tokens, total, loss, torch.zeros_like(loss), metrics)

    def _refined(self, module: nn.Module, photo: Tensor, latent: Tensor) -> Terms:
        schedule, quantizer = self.model.config.schedule, self.model.tokenizer.quantizer
        mixed = self.config.latent and len(schedule) > 1
        classified = schedule.prefix(len(schedule) - 1) if mixed else schedule
        refined = refine(self.model, photo, latent, len(classified))
        logits = module(photo, refined.inputs, self.config.detached)
        known = logits[:, : classified.length]
        loss, metrics = next_scale_loss(
            known, refined.targets, classified, classified.length, label_smoothing=self.config.label_smoothing
        )
        total, difference = refined.total, torch.zeros_like(loss)
        if mixed:
            last = logits[:, classified.length :]
            if self.config.noise:
                last = last - torch.empty_like(last, memory_format=torch.contiguous_format).exponential_().log()
            codes = last.softmax(-1) @ quantizer.vectors
            total = quantizer.advance(total, codes, schedule, len(schedule) - 1)
            difference = LATENT_WEIGHT * F.mse_loss(total, latent)
        return Terms(known, refined.targets, total, loss, difference, metrics)
