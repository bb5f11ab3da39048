"""Training Infinity: teacher forcing with bits turned over, so that the model learns to correct itself.

Han et al. 2024 (arXiv 2412.04431, section 3.4); official code FoundationVision/Infinity, ``trainer.py`` and
``bitwise_self_correction.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nextscale.core.bitwise import bit_cross_entropy, margins
from nextscale.core.cross_attention import Packed
from nextscale.core.random import BatchDraws, Draws, sample_draws, step_draws
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Batch, Metrics
from nextscale.tasks.generation.infinity import SYSTEM, Infinity
from nextscale.tasks.generation.infinity_transformer import InfinityBlock
from nextscale.tasks.generation.text import TextFeatures
from nextscale.tasks.generation.text_recipe import TextTraining
from nextscale.tasks.tokenizers.bitwise_schedules import reference_grid


@dataclass(frozen=True)
class InfinityLossConfig:
    """Attributes:

    flip_strength: largest share of a scale's bits that is turned over; each batch draws each scale's share among
        0, 0.01, … up to it.
    flip_scales: how many of the first scales that happens in.
    reweight: a token counts sqrt(last scale's tokens / its own scale's), so that coarse scales are not drowned; else
        all count alike.
    bits: whether the cross-entropies of a token's bits are averaged or summed.
    scales: train the first scales of each list only; 0: all.
    """

    flip_strength: float = 0.3
    flip_scales: int = 13
    reweight: bool = True
    bits: Literal["mean", "sum"] = "mean"
    scales: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.flip_strength <= 1 or self.flip_scales < 0 or self.scales < 0:
            raise ValueError(
                f"flip_strength is {self.flip_strength}, flip_scales {self.flip_scales} and scales {self.scales}; "
                "expected a share in [0, 1] and two numbers of scales, 0 or more"
            )


def draw_flips(
    model: Infinity,
    batch: int,
    schedule: ScaleSchedule,
    config: InfinityLossConfig,
    draws: Draws | None = None,
    common: torch.Generator | None = None,
) -> list[Bool[Tensor, "batch bits height width"]]:
    """Which bits of the first scales are turned over, as the quantiser takes them.

    Args:
        draws: of the bits; ``common``, of the shares, which the batch has in common. None: the global generator.
    """
    quantizer, draws = model.tokenizer.quantizer, draws or BatchDraws(None)
    flips = []
    for index in range(min(config.flip_scales, len(schedule))):
        share = torch.randint(0, round(100 * config.flip_strength) + 1, (), generator=common) / 100
        shape = (batch, quantizer.config.bits, *quantizer.grid(schedule, index))
        flips.append((draws.uniform(shape, torch.device("cpu")) < share).to(model.device))
    return flips


def initialize(
    model: Infinity,
    *,
    modulation: float = 1e-3,
    gate: float = 5e-6,
    head: float = 0.02,
    std: float | None = None,
    shrink_branches: bool = True,
) -> Infinity:
    """Infinity's initial weights, for training anew; the defaults are the official script's.

    Args:
        modulation: factor of the head's modulation and of the scale and shift rows of each block's offset; ``gate`` of
            its gamma rows.
        head: factor of the last linear layer.
        std: of linear layers and embeddings; None: sqrt(1 / (3 width)), which the start position and the query that
            pools the text always have.
        shrink_branches: divide the last layer of every branch by sqrt(2 depth).
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
        for parameter in (model.start_position, model.pool.query):
            nn.init.trunc_normal_(parameter, std=usual)
        # Drawn from a seed of its own, as published: the same sequence for every model of a text width.
        drawn = torch.empty(model.null_text.shape)
        nn.init.trunc_normal_(drawn, std=1.2, generator=torch.Generator().manual_seed(0))
        model.null_text.copy_(drawn / math.sqrt(model.config.text_width))
        model.head.linear.weight.mul_(head)
        model.head.modulation.linear.weight.mul_(modulation)
        for block in cast("Sequence[InfinityBlock]", model.transformer.blocks):
            if shrink_branches:
                for branch in (
                    block.attention.projection,
                    block.cross_attention.projection,
                    block.feed_forward.contract,
                ):
                    branch.weight.div_(math.sqrt(2 * depth))
            block.modulation_offset[:2].mul_(gate)
            block.modulation_offset[2:].mul_(modulation)
    return model


def bit_losses(
    logits: Float[Tensor, "batch tokens twice_bits"],
    bits: Bool[Tensor, "batch tokens bits"],
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, "batch tokens"]:
    """Cross-entropy of every token: of its bits, averaged or summed."""
    losses = bit_cross_entropy(logits, bits)
    return losses.mean(-1) if reduction == "mean" else losses.sum(-1)


def token_weights(schedule: ScaleSchedule, reweight: bool) -> Float[Tensor, " tokens"]:
    """How much each token counts; they sum to 1."""
    counts = torch.tensor([length for length in schedule.lengths for _ in range(length)], dtype=torch.float64)
    weights = (schedule.lengths[-1] / counts).sqrt() if reweight else torch.ones_like(counts)
    return (weights / weights.sum()).float()


@dataclass(frozen=True)
class TeacherForced:
    """What one batch is trained on.

    Attributes:
        schedule: the scales that take part.
        inputs: of the scales 1, 2, ….
    """

    schedule: ScaleSchedule
    tokens: Bool[Tensor, "batch tokens bits"]
    inputs: Float[Tensor, "batch rest bits"]


class InfinityTraining(TextTraining):
    """Trains an :class:`Infinity`.

    A batch holds ``image`` (batch, 3, height, width) in [-1, 1], all of one size; ``text``: the texts of the images, or
    features of them; ``uniform`` in [0, 1) for dropping texts; ``flips``, of the first scales, drawn where they are
    missing.
    """

    name = SYSTEM

    def __init__(self, model: Infinity, config: InfinityLossConfig | None = None) -> None:
        self.model, self.config = model, config or InfinityLossConfig()
        self.phases: dict[str, nn.Module] = {SYSTEM: model}

    def schedule(self, images: Tensor) -> ScaleSchedule:
        """The whole list of the images' size."""
        own, stride = self.model.config.schedule, self.model.tokenizer.stride
        if tuple(images.shape[-2:]) == own.scaled(stride):
            return own
        return self.model.tokenizer.schedule_for(*images.shape[-2:])

    def teacher_forced(self, batch: Batch, schedule: ScaleSchedule) -> TeacherForced:
        """Bits and inputs of the scales that take part, under the batch's flips."""
        images, tokenizer = batch["image"], self.model.tokenizer
        scales = min(self.config.scales or len(schedule), len(schedule))
        flips: Sequence[Tensor] | None = batch.get("flips")
        if flips is None:
            flips = draw_flips(self.model, len(images), schedule, self.config)
        # The frozen tokenizer works in its own precision, outside autocast.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            tokens, totals = tokenizer.quantizer.encode(tokenizer.features(images), schedule, scales, flips)
            inputs = tokenizer.quantizer.inputs(totals, schedule)
        return TeacherForced(schedule.prefix(scales), torch.cat(tokens, dim=1), inputs)

    def text(self, batch: Batch) -> Packed:
        """The features of the batch's texts, of which some are dropped."""
        given: Any = batch["text"]
        if not isinstance(given, Packed):
            given = self.model.features(given if isinstance(given, TextFeatures) else list(given)).states
        text = given.to(self.model.device, self.model.dtype)
        return self.model.drop_text(text, batch["uniform"] < self.model.config.text_drop)

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        whole = self.schedule(batch["image"])
        if "flips" not in batch and "seeds" in batch:
            draws, common = sample_draws(batch, "flips"), step_draws(step, "flips")
            flips = draw_flips(self.model, len(batch["image"]), whole, self.config, draws, common)
            batch = {**batch, "flips": flips}
        given = self.teacher_forced(batch, whole)
        logits = module(given.inputs, self.text(batch), given.schedule, self.grid(whole, batch))
        losses = bit_losses(logits, given.tokens, self.config.bits)
        weights = token_weights(given.schedule, self.config.reweight).to(losses.device)
        with torch.no_grad():
            right = ((margins(logits) > 0) == given.tokens).float()
            start, stop = given.schedule.ranges[-1]
            metrics: Metrics = {
                "cross_entropy": losses.mean(),
                "bit_accuracy": 100 * right.mean(),
                "bit_accuracy_last": 100 * right[:, start:stop].mean(),
            }
        return (losses * weights).sum(1).mean(), metrics

    def grid(self, schedule: ScaleSchedule, batch: Batch) -> tuple[int, int]:
        """The grid that positions are counted on: the batch's entry ``grid``, else that of the list's aspect ratio."""
        given: tuple[int, int] | None = batch.get("grid")
        return given or reference_grid(schedule)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Metrics:
        """Loss and accuracy on a batch in which no text is dropped; bits are turned over as in training."""
        uniform = torch.ones(len(batch["image"]), device=self.model.device)
        loss, metrics = self.loss(self.name, self.model, {**batch, "uniform": uniform}, 0)
        return {"loss": loss, **metrics}
