"""Training the raster baseline, as VAR is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextscale.core.training import Batch, Metrics
from nextscale.tasks.generation.class_recipe import ClassTraining
from nextscale.tasks.generation.raster import SYSTEM, Raster
from nextscale.tasks.generation.var_training import next_scale_loss


class RasterTraining(ClassTraining):
    """Trains a :class:`Raster` by cross-entropy.

    A batch holds ``label``, ``uniform`` in [0, 1) for label dropout, and ``tokens`` (batch, length), or ``image``
    (batch, 3, height, width) in [-1, 1], which the frozen tokenizer then encodes.
    """

    name = SYSTEM

    def __init__(self, model: Raster, *, label_smoothing: float = 0.0) -> None:
        self.model, self.label_smoothing = model, label_smoothing
        self.phases: dict[str, nn.Module] = {SYSTEM: model}

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        tokenizer = self.model.tokenizer
        if "tokens" in batch:
            tokens = batch["tokens"]
        else:
            with torch.autocast(batch["image"].device.type, enabled=False):
                tokens = tokenizer.encode(batch["image"])
        labels = self.model.drop_labels(batch["label"], batch["uniform"])
        logits = module(tokenizer.quantizer.lookup(tokens[:, :-1]), labels)
        schedule = self.model.config.schedule
        loss, metrics = next_scale_loss(logits, tokens, schedule, schedule.length, label_smoothing=self.label_smoothing)
        # The last scale is the last cell, which tells nothing.
        return loss, {name: value for name, value in metrics.items() if not name.endswith("_last")}
