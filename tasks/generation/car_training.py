"""Training CAR's adapter under a frozen base; official code MiracleDance/CAR, ``trainer.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Batch
from nextscale.tasks.generation.car import CAR, SYSTEM
from nextscale.tasks.generation.var_training import VARTraining

RIDGE = 1e-3
"""Weight of the squared weights in :func:`pass_base_through`, as a share of the mean squared input."""


def initialize(model: CAR, *, conv_std: float | None = 0.02) -> CAR:
    """The official initial weights of the adapter: nothing is zero, so the base is not left as it was.

    Args:
        conv_std: of the convolutions; None: He's sqrt(2 / inputs), which lets a signal through an encoder of any width,
            where 0.02 all but stops it in narrow ones.
    """
    linear_std = math.sqrt(1 / model.config.base.transformer.width / 3)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.startswith("base"):
                continue
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=conv_std or math.sqrt(2 / module.weight[0].numel()))
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=linear_std)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


@torch.no_grad()
def pass_base_through(model: CAR, batch: Mapping[str, Any]) -> CAR:
    """Set the skips' linear layers so that an untrained adapter leaves the base nearly as it was.

    One after the other, each is fitted by least squares to give, of both normalised streams, what the base itself has
    there. Training then goes on from the base's figures instead of first learning them anew.

    Args:
        batch: as for training; some hundred images.
    """
    task, schedule, base = CARTraining(model), model.config.schedule, model.base
    training = model.training
    model.eval()
    batch = {"uniform": torch.ones(len(batch["label"]), device=model.device), **batch}
    _, inputs, labels = task.teacher_forced(batch, len(schedule))
    features = model.encode(task.pyramid(batch))
    condition = base.class_embedding(labels)
    x, control = model.streams(inputs, condition, features, schedule, 0, len(schedule) - 1)
    modulations, half = model.modulate(condition), len(model.skips)
    outputs: list[Tensor] = []
    for block, modulation in zip(model.control_blocks, modulations, strict=False):
        control = block(control, modulation, schedule.segments)
        outputs.append(control)
    for layer, (block, modulation) in enumerate(zip(base.transformer.blocks, modulations[half:], strict=True)):
        if layer >= half:
            skip, output = model.skips[layer - half], outputs.pop()
            _fit(skip.linear, skip.joined(x, output), x)
        x = block(x, modulation, schedule.segments)
    return model.train(training)


def _fit(linear: nn.Linear, inputs: Tensor, targets: Tensor) -> None:
    """Ridge regression with a bias."""
    a, b = inputs.flatten(0, 1).double(), targets.flatten(0, 1).double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    a, b = a - mean_a, b - mean_b
    squares = a.T @ a
    squares.diagonal().add_(RIDGE * squares.diagonal().mean())
    weight = torch.linalg.solve(squares, a.T @ b).T
    linear.weight.copy_(weight)
    linear.bias.copy_(mean_b - weight @ mean_a)


class CARTraining(VARTraining):
    """Trains a :class:`CAR`'s adapter; its base takes no gradient, but drops branches as it did in its own training.

    A batch holds what VAR's does, and ``control`` (batch, 3, height, width) in [-1, 1]. Labels are dropped, the
    control never.
    """

    name = SYSTEM
    model: CAR

    def pyramid(self, batch: Mapping[str, Any]) -> list[Float[Tensor, "batch 3 height width"]]:
        """The batch's controls at every scale."""
        with torch.no_grad():
            return self.model.pyramid((batch["control"] + 1) / 2)

    def logits(
        self, module: nn.Module, batch: Batch, inputs: Tensor, labels: Tensor, schedule: ScaleSchedule
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        logits: Tensor = module(inputs, labels, self.pyramid(batch)[: len(schedule)], schedule)
        return logits
