"""Training FlexVAR: every step has a list of scales of its own.

Jiao et al. 2025 (arXiv 2502.20313, section 3.3); official code jiaosiyu1999/FlexVAR, ``trainer.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Batch, Metrics
from nextscale.tasks.generation.class_recipe import ClassTraining
from nextscale.tasks.generation.flexvar import SYSTEM, FlexVAR, waves
from nextscale.tasks.generation.flexvar_lists import RandomLists
from nextscale.tasks.generation.var_training import initialize as initialize_var
from nextscale.tasks.generation.var_training import next_scale_loss


def initialize(model: FlexVAR, **factors: float) -> FlexVAR:
    """The initial weights: as VAR's (:func:`nextscale.tasks.generation.var_training.initialize`), but for positions."""
    initialize_var(model, **factors)
    with torch.no_grad():
        model.position_embedding.copy_(waves(model.config.transformer.width, model.config.position_side))
    return model


class FlexVARTraining(ClassTraining):
    """Trains a :class:`FlexVAR`.

    A batch holds ``label``, ``uniform`` in [0, 1) for label dropout, and ``image`` (batch, 3, height, width) in -1..1,
    which the frozen tokenizer then encodes, or ``tokens``: of the scales ``held``, of which a step picks its own.

    Args:
        lists: how the list of a step is drawn; None: always the model's own.
        seed: (seed, step) decides the list, alike on all processes and after an interruption.
        held: the scales in ``tokens``; None: the model's own.
    """

    name = SYSTEM

    def __init__(
        self,
        model: FlexVAR,
        *,
        label_smoothing: float = 0.0,
        lists: RandomLists | None = None,
        seed: int = 0,
        held: ScaleSchedule | None = None,
    ) -> None:
        self.model, self.label_smoothing, self.lists, self.seed = model, label_smoothing, lists, seed
        self.held = held or model.config.schedule
        self.phases: dict[str, nn.Module] = {SYSTEM: model}

    def list_at(self, step: int) -> ScaleSchedule:
        """The scales of a step."""
        return self.model.config.schedule if self.lists is None else self.lists.at(self.seed, step)

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        schedule = self.list_at(step)
        loss, metrics = self.loss_of(module, batch, schedule)
        return loss, {**metrics, "length": float(schedule.length)}

    def evaluate(self, batch: Batch) -> Metrics:
        loss, metrics = self.loss_of(self.model, batch, self.model.config.schedule)
        return {"loss": loss, **metrics}

    def loss_of(self, module: nn.Module, batch: Batch, schedule: ScaleSchedule) -> tuple[Tensor, Metrics]:
        """Mean cross-entropy over the tokens of a list, and what to log."""
        tokens = self._tokens(batch, schedule)
        inputs = self.model.tokenizer.teacher_inputs(tokens, schedule)
        labels = self.model.drop_labels(batch["label"], batch["uniform"])
        logits = module(inputs, labels, schedule)
        loss, metrics = next_scale_loss(logits, tokens, schedule, schedule.length, label_smoothing=self.label_smoothing)
        if schedule.final == self.model.config.schedule.final:
            return loss, {**metrics}
        # Another last scale: its figures would mix with those of the usual one.
        return loss, {name: value for name, value in metrics.items() if not name.endswith("_last")}

    def _tokens(self, batch: Batch, schedule: ScaleSchedule) -> Tensor:
        if "tokens" in batch:
            parts = dict(zip(self.held.scales, self.held.split(batch["tokens"]), strict=True))
            return torch.cat([parts[scale] for scale in schedule.scales], dim=1)
        # The frozen tokenizer works in its own precision, outside autocast.
        with torch.no_grad(), torch.autocast(batch["image"].device.type, enabled=False):
            return self.model.tokenizer.encode(batch["image"], schedule)
