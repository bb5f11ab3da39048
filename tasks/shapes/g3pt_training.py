"""Training G3PT: the next scale's tokens from those before, coarse scales first.

Zhang et al. 2024, "G3PT" (arXiv 2409.06322) states that training starts with the scales up to half of them and adds
the finer ones gradually; the rest is chosen (``docs/g3pt.md``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nextscale.core.bitwise import bit_cross_entropy, margins
from nextscale.core.random import sample_draws, step_draws
from nextscale.core.training import Batch, Metrics, TrainingTask
from nextscale.tasks.generation.infinity_training import token_weights
from nextscale.tasks.generation.var_training import ProgressiveConfig, Stage, stage_at
from nextscale.tasks.shapes.g3pt import G3PT, SYSTEM
from nextscale.tasks.shapes.g3pt_conditions import ShapeConditions


@dataclass(frozen=True)
class G3PTLossConfig:
    """Attributes:

    progressive: the scales that take part along the run; ``first`` None: half of them at the beginning.
    flip: largest share of a scale's bits that is turned over in what enters later scales, whose targets then correct
        it; every scale draws its own share up to this. As in Infinity, for generation from the model's own mistakes.
    reweight: a token counts sqrt(last scale's tokens / its own scale's), so that coarse scales are not drowned; else
        all count alike.
    """

    progressive: ProgressiveConfig = field(default_factory=lambda: ProgressiveConfig(share=0.3, first=-1))
    flip: float = 0.0
    reweight: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip}; expected a share of bits, 0 to 1")

    def stages(self, scales: int) -> ProgressiveConfig:
        """The progressive schedule over so many scales; a ``first`` below 0 is the last of the first half."""
        given = self.progressive
        first = max(scales // 2 - 1, 0) if given.first < 0 else given.first
        return ProgressiveConfig(given.share, first, given.warmup)


def initialize(model: G3PT, *, gate: float = 0.1, modulation: float = 0.5, head: float = 0.1) -> G3PT:
    """Initial weights, for training anew, after VAR's.

    Args:
        gate: factor of the modulation's rows that gate a block's branches; ``modulation`` of the others.
        head: factor of the last linear layer.
    """
    width, depth = model.config.transformer.width, model.config.transformer.depth
    usual = math.sqrt(1 / width / 3)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not name.startswith(("tokenizer.", "picture_encoder.")):
                nn.init.trunc_normal_(module.weight, std=usual)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (model.start_position, model.position_embedding, model.null_picture):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=usual)
        model.head.linear.weight.mul_(head)
        model.head.modulation.linear.weight.mul_(modulation)
        projections = [model.transformer.shared_modulation, *(block.modulation for block in model.transformer.blocks)]
        for projection in projections:
            if projection is not None:
                projection.linear.weight[: 2 * width].mul_(gate)
                projection.linear.weight[2 * width :].mul_(modulation)
        for block in model.transformer.blocks:
            block.attention.projection.weight.div_(math.sqrt(2 * depth))
            block.feed_forward.contract.weight.div_(math.sqrt(2 * depth))
            # Branches count fully from the start, whatever the condition: their last layers are small already.
            if block.modulation is not None:
                block.modulation.linear.bias[: 2 * width] = 1.0
            else:
                block.modulation_offset[:2] = 1.0
                block.modulation_offset[2:].mul_(modulation)
    return model


class G3PTTraining(TrainingTask):
    """Trains a :class:`nextscale.tasks.shapes.g3pt.G3PT`.

    A batch holds ``features`` (batch, latents, code width), the tokenizer's, or ``surface`` (batch, points, 6) to make
    them of; and of what the model is told by: ``label`` (batch,), -1 for none; ``image`` (batch, 3, H, W) in
    [0, 1], or ``states``, features of pictures; ``text``, pooled features (batch, channels). ``uniform`` in [0, 1)
    decides which condition of a shape is shown (:meth:`ShapeConditions.dropped`); drawn where it is missing.

    Args:
        warmup, total: steps of the learning rate's warm-up and of the run, which progressive training follows.
    """

    name = SYSTEM

    def __init__(self, model: G3PT, config: G3PTLossConfig | None = None, *, warmup: int = 0, total: int = 0) -> None:
        self.model, self.config = model, config or G3PTLossConfig()
        self._warmup, self._total = warmup, total
        self.phases: dict[str, nn.Module] = {SYSTEM: model}

    def stage(self, step: int) -> Stage:
        """Which scales take part at a step."""
        scales = len(self.model.config.schedule)
        return stage_at(self.config.stages(scales), scales, step, self._warmup, self._total)

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        uniform = batch.get("uniform")
        conditions, config = self.conditions(batch), self.model.config
        if uniform is None:
            uniform = torch.rand(len(conditions), device=self.model.device)
        shown = conditions.dropped(uniform, config.condition_drop, config.classes)
        return self._loss(module, batch, shown, self.stage(step), self.config.flip, step)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Metrics:
        """Loss and accuracy on a batch of which every condition is shown and no bit turned over."""
        stage = Stage(len(self.model.config.schedule), 1.0)
        loss, metrics = self._loss(self.model, batch, self.conditions(batch), stage, 0.0)
        return {"loss": loss, **metrics}

    def _loss(
        self,
        module: nn.Module,
        batch: Batch,
        conditions: ShapeConditions,
        stage: Stage,
        flip: float,
        step: int = 0,
    ) -> tuple[Tensor, Metrics]:
        schedule = self.model.config.schedule.prefix(stage.scales)
        bits, inputs = self.teacher_forced(batch, stage.scales, flip, step)
        logits = module(inputs, conditions, stage.scales)
        losses, right = self.token_losses(logits, bits)
        weights = token_weights(schedule, self.config.reweight).to(losses.device)
        start, stop = schedule.ranges[-1]
        if stage.newest_weight != 1:
            weights[start:stop] *= stage.newest_weight
        metrics: Metrics = {"cross_entropy": losses.detach().mean(), "accuracy": 100 * right.mean()}
        if stage.scales == len(self.model.config.schedule):
            metrics |= {
                "cross_entropy_last": losses.detach()[:, start:stop].mean(),
                "accuracy_last": 100 * right[:, start:stop].mean(),
            }
        else:
            metrics["scales"] = float(stage.scales)
        return (losses * weights).sum(1).mean(), metrics

    @torch.no_grad()
    def teacher_forced(
        self, batch: Batch, scales: int, flip: float, step: int = 0
    ) -> tuple[Bool[Tensor, "batch length bits"], Tensor]:
        """Bits of the first scales, and what enters at the scales after the first."""
        tokenizer, schedule = self.model.tokenizer, self.model.config.schedule
        given = batch.get("features")
        # The frozen tokenizer works in its own precision, outside autocast.
        with torch.autocast(self.model.device.type, enabled=False):
            features = tokenizer.features(batch["surface"]) if given is None else given.float()
            shares = flip * torch.rand(scales, generator=step_draws(step, "flips") if "seeds" in batch else None)
            draws, bits_each = sample_draws(batch, "flips"), self.model.config.bits
            flips = [
                (draws.uniform((len(features), count, bits_each), torch.device("cpu")) < share).to(features.device)
                for share, count in zip(shares, schedule.lengths[:scales], strict=True)
            ]
            bits, totals = tokenizer.quantizer.encode(features, schedule, scales, flips if flip else ())
            inputs = tokenizer.quantizer.inputs(totals, schedule)
        return torch.cat(bits, dim=1), inputs

    def token_losses(
        self, logits: Float[Tensor, "batch length symbols"], bits: Bool[Tensor, "batch length bits"]
    ) -> tuple[Float[Tensor, "batch length"], Float[Tensor, "batch length"]]:
        """Cross-entropy of every token in nats, whatever is predicted of it, and whether (or what share) is right."""
        if self.model.config.symbols == "bits":
            right = ((margins(logits.detach()) > 0) == bits).float().mean(-1)
            return bit_cross_entropy(logits, bits).sum(-1), right
        numbers = self.model.tokenizer.quantizer.numbers(bits)
        losses = F.cross_entropy(logits.flatten(0, 1), numbers.flatten(), reduction="none").view(numbers.shape)
        return losses, (logits.detach().argmax(-1) == numbers).float()

    def conditions(self, batch: Batch) -> ShapeConditions:
        """Of every shape; features of a learned encoder with their gradient."""
        model, config = self.model, self.model.config
        labels: Tensor = batch["label"] if config.classes else torch.full_like(batch["label"], config.classes)
        parts: dict[str, Tensor] = {}
        if config.prefix:
            states = batch.get("states")
            if states is None and model.picture_encoder is not None:
                found = model.picture_encoder(batch["image"]).states
                states = found.values.unflatten(0, (len(labels), -1))
            if states is not None:
                parts |= {"states": states, "shown": torch.ones_like(labels, dtype=torch.bool)}
        if config.text is not None:
            parts |= {"text": batch["text"], "said": torch.ones_like(labels, dtype=torch.bool)}
        return ShapeConditions(torch.where(labels < 0, config.classes, labels), **parts)
