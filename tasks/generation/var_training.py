"""Training VAR: the official recipe, with progressive training as an option.

Tian et al. 2024 (arXiv 2404.02905); official code FoundationVision/VAR, ``trainer.py`` and ``train.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Batch, Metrics
from nextscale.tasks.generation.class_conditional import ClassConditional
from nextscale.tasks.generation.class_recipe import ClassTraining
from nextscale.tasks.generation.var import SYSTEM, VAR


def initialize(
    model: VAR, *, modulation: float = 0.5, gate: float = 1e-3, head: float = 0.02, std: float | None = None
) -> VAR:
    """VAR's initial weights, for training anew.

    Args:
        modulation: factor of the modulation's scale and shift rows; ``gate`` of its gamma rows (the official
            trainer takes 1e-3 for d16 and d20, less for deeper models).
        head: factor of the last linear layer.
        std: of linear layers and embeddings; None: sqrt(1 / (3 width)), which positions always have.
    """
    width, depth = model.config.transformer.width, model.config.transformer.depth
    usual = math.sqrt(1 / width / 3)
    std = usual if std is None else std
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not name.startswith("tokenizer."):
                nn.init.trunc_normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (model.start_position, model.position_embedding):
            nn.init.trunc_normal_(parameter, std=usual)
        model.head.linear.weight.mul_(head)
        model.head.modulation.linear.weight.mul_(modulation)
        for block in model.transformer.blocks:
            block.attention.projection.weight.div_(math.sqrt(2 * depth))
            block.feed_forward.contract.weight.div_(math.sqrt(2 * depth))
            if block.modulation is not None:
                block.modulation.linear.weight[: 2 * width].mul_(gate)
                block.modulation.linear.weight[2 * width :].mul_(modulation)
            else:
                block.modulation_offset[:2].mul_(gate)
                block.modulation_offset[2:].mul_(modulation)
    return model


@dataclass(frozen=True)
class ProgressiveConfig:
    """Train on the coarse scales first and add the finer ones one by one.

    Attributes:
        share: part of the run until all scales take part; 0: all from the start.
        first: index of the newest scale at the beginning.
        warmup: part of the run over which a newly added scale's weight rises from 0.01 to 1.
    """

    share: float = 0.0
    first: int = 4
    warmup: float = 1 / 300


@dataclass(frozen=True)
class Stage:
    """Progressive training at one step: how many scales take part and how much the newest counts."""

    scales: int
    newest_weight: float


def newest_scale(config: ProgressiveConfig, scales: int, step: int, warmup: int, total: int) -> int:
    """Index of the newest scale that takes part at ``step``.

    Args:
        warmup: steps of the learning rate's warm-up, in which only the first scales take part.
    """
    if config.share <= 0:
        return scales - 1
    if step <= warmup:
        return min(config.first, scales - 1)
    if step >= config.share * total:
        return scales - 1
    progress = (step - warmup) / max(config.share * total - warmup, 1e-9)
    return min(config.first + round(progress * (scales - 1 - config.first)), scales - 1)


def stage_at(config: ProgressiveConfig, scales: int, step: int, warmup: int, total: int) -> Stage:
    """The stage at ``step``; the newest scale's weight counts the steps since it was added."""
    newest = newest_scale(config, scales, step, warmup, total)
    # The run's first stage has no warm-up of its own; once all scales take part, all count fully.
    if newest in (newest_scale(config, scales, 0, warmup, total), scales - 1):
        return Stage(newest + 1, 1.0)
    low, high = 0, step
    while low < high:
        middle = (low + high) // 2
        if newest_scale(config, scales, middle, warmup, total) >= newest:
            high = middle
        else:
            low = middle + 1
    steps = step - low + 1
    return Stage(newest + 1, newest_weight(steps, config.warmup * total))


def newest_weight(steps: int, warmup: float) -> float:
    """Weight of a scale that has taken part for ``steps`` steps."""
    return max(min(steps / max(warmup, 1e-9), 1.0), 0.01)


def next_scale_loss(
    logits: Float[Tensor, "batch tokens vocabulary"],
    tokens: Int[Tensor, "batch tokens"],
    schedule: ScaleSchedule,
    full_length: int,
    *,
    label_smoothing: float = 0.0,
    newest_weight: float = 1.0,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Cross-entropy of every token, weighted 1 / full_length, summed over tokens, mean over the batch.

    Args:
        schedule: the scales that take part, a prefix of the model's list.
        full_length: tokens of the whole list: the weight of a token does not depend on the stage.
        newest_weight: factor for the last of the scales.

    Returns:
        The loss, and without label smoothing and weights: mean cross-entropy, that of the last scale,
        accuracy in percent, that of the last scale.
    """
    vocabulary = logits.shape[-1]
    flat, target = logits.reshape(-1, vocabulary), tokens.reshape(-1)
    loss = F.cross_entropy(flat, target, label_smoothing=label_smoothing, reduction="none").view(tokens.shape)
    weights = torch.full((schedule.length,), 1 / full_length, device=loss.device)
    start, stop = schedule.ranges[-1]
    weights[start:stop] *= newest_weight
    with torch.no_grad():
        plain = F.cross_entropy(flat, target, reduction="none").view(tokens.shape) if label_smoothing else loss.detach()
        right = (logits.argmax(-1) == tokens).float() * 100
        metrics = {
            "cross_entropy": plain.mean(),
            "cross_entropy_last": plain[:, start:stop].mean(),
            "accuracy": right.mean(),
            "accuracy_last": right[:, start:stop].mean(),
        }
    return (loss * weights).sum(1).mean(), metrics


class VARTraining(ClassTraining):
    """Trains a :class:`VAR`.

    A batch holds ``label``, ``uniform`` in [0, 1) for label dropout, and ``tokens`` (batch, length), or
    ``image`` (batch, 3, height, width) in [-1, 1], which the frozen tokenizer then encodes.

    Args:
        warmup, total: steps of the learning rate's warm-up and of the run, which progressive training follows.
    """

    name = SYSTEM

    def __init__(
        self,
        model: ClassConditional,
        *,
        label_smoothing: float = 0.0,
        progressive: ProgressiveConfig | None = None,
        warmup: int = 0,
        total: int = 1,
    ) -> None:
        self.model, self.label_smoothing = model, label_smoothing
        self.progressive = progressive or ProgressiveConfig()
        self._warmup, self._total = warmup, total
        self.phases: dict[str, nn.Module] = {self.name: model}

    def stage(self, step: int) -> Stage:
        """Which scales take part at a step."""
        return stage_at(self.progressive, len(self.model.config.schedule), step, self._warmup, self._total)

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        return self._loss(module, batch, self.stage(step))

    def evaluate(self, batch: Batch) -> Metrics:
        loss, metrics = self._loss(self.model, batch, Stage(len(self.model.config.schedule), 1.0))
        return {"loss": loss, **metrics}

    def teacher_forced(self, batch: Batch, scales: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of the first ``scales`` scales, the inputs they imply, and labels of which some are dropped."""
        tokens = self._tokens(batch, scales)
        inputs = self.model.tokenizer.quantizer.teacher_inputs(tokens, self.model.config.schedule, scales)
        return tokens, inputs, self.model.drop_labels(batch["label"], batch["uniform"])

    def logits(
        self, module: nn.Module, batch: Batch, inputs: Tensor, labels: Tensor, schedule: ScaleSchedule
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        """What the network makes of a batch."""
        logits: Tensor = module(inputs, labels, schedule)
        return logits

    def _loss(self, module: nn.Module, batch: Batch, stage: Stage) -> tuple[Tensor, Metrics]:
        full = self.model.config.schedule
        schedule = full.prefix(stage.scales)
        tokens, inputs, labels = self.teacher_forced(batch, stage.scales)
        logits = self.logits(module, batch, inputs, labels, schedule)
        loss, metrics = next_scale_loss(
            logits,
            tokens,
            schedule,
            full.length,
            label_smoothing=self.label_smoothing,
            newest_weight=stage.newest_weight,
        )
        if stage.scales == len(full):
            return loss, {**metrics}
        # The last scale in use is not the list's last: its figures would mix with the full run's.
        return loss, {**{k: v for k, v in metrics.items() if not k.endswith("_last")}, "scales": float(stage.scales)}

    def _tokens(self, batch: Batch, scales: int) -> Tensor:
        full = self.model.config.schedule
        if "tokens" in batch:
            return batch["tokens"][:, : full.prefix(scales).length]
        tokenizer = self.model.tokenizer
        # The frozen tokenizer works in its own precision, outside autocast.
        with torch.no_grad(), torch.autocast(batch["image"].device.type, enabled=False):
            features = tokenizer.features(batch["image"])
            return torch.cat(tokenizer.quantizer.encode(features, full, scales)[0], dim=1)
