"""Training SAR3D's transformer on tokens and the features of their conditions.

Official code cyw-3d/SAR3D, ``trainer.py``: cross-entropy without smoothing, the mean over the tokens of all planes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextscale.core.random import sample_draws
from nextscale.core.training import Batch, Metrics, TrainingTask
from nextscale.tasks.generation.text import TextFeatures
from nextscale.tasks.generation.var_training import next_scale_loss
from nextscale.tasks.shapes.sar3d import SAR3D, SYSTEM
from nextscale.tasks.shapes.sar3d_tokenizer_training import views_of


class SAR3DTraining(TrainingTask):
    """Trains a :class:`nextscale.tasks.shapes.sar3d.SAR3D`.

    A batch holds ``tokens`` (batch, length), or the pictures that the frozen tokenizer encodes
    (:func:`nextscale.tasks.shapes.sar3d_tokenizer_training.views_of`); ``features``
    (:class:`nextscale.tasks.generation.text.TextFeatures`), or ``condition``, pictures or texts of which they are made;
    and, if they are given, ``drop`` (2, batch), numbers in [0, 1) by which conditions are dropped (else drawn), and
    ``inputs``, the teacher-forcing inputs (else made of the tokens).
    """

    name = SYSTEM

    def __init__(self, model: SAR3D) -> None:
        self.model = model
        self.phases: dict[str, nn.Module] = {SYSTEM: model}

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        drop = batch.get("drop")
        tokens = self.tokens(batch)
        if drop is None:
            drop = sample_draws(batch, "conditions").uniform((len(tokens), 2), tokens.device).T
        return self._loss(module, batch, tokens, drop)

    def evaluate(self, batch: Batch) -> Metrics:
        """Loss and accuracy on a batch in which no condition is dropped."""
        tokens = self.tokens(batch)
        loss, metrics = self._loss(self.model, batch, tokens, torch.ones(2, len(tokens), device=tokens.device))
        return {"loss": loss, **metrics}

    def _loss(self, module: nn.Module, batch: Batch, tokens: Tensor, drop: Tensor) -> tuple[Tensor, Metrics]:
        model, schedule = self.model, self.model.config.schedule
        inputs = batch.get("inputs")
        if inputs is None:
            inputs = model.tokenizer.quantizer.teacher_inputs(tokens, schedule)
        logits = module(inputs, model.drop(self.features(batch), drop))
        loss, metrics = next_scale_loss(logits, tokens, schedule, schedule.length)
        return loss, {**metrics}

    def tokens(self, batch: Batch) -> Tensor:
        """Of every object."""
        if "tokens" in batch:
            given: Tensor = batch["tokens"]
            return given
        views = views_of(batch, self.model.tokenizer).flatten(0, 1)
        with torch.autocast(views.device.type, enabled=False):
            return self.model.tokenizer.encode(views)

    def features(self, batch: Batch) -> TextFeatures:
        """Of every condition; those of a learned encoder with their gradient."""
        if "features" in batch:
            features: TextFeatures = batch["features"]
            return features
        encoder = self.model.picture_encoder
        if encoder is None:
            return self.model.prepare(batch["condition"])
        found: TextFeatures = encoder(self.model.conditions.pictures(batch["condition"], encoder.config.size))
        return found
