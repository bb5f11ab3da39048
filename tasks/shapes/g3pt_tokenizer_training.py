"""Training G3PT's tokenizer: occupancy of points in space, first of continuous latents, then through the tokens.

Zhang et al. 2024, "G3PT" (arXiv 2409.06322) states the two phases; terms and weights are chosen (``docs/g3pt.md``),
those of occupancy after 3DShape2VecSet (Zhang et al. 2023, arXiv 2301.11445), those of bits after Infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.training import Batch, Metrics, TrainingTask
from nextscale.tasks.shapes.g3pt_queries import PointEncoding, QueryAttention
from nextscale.tasks.shapes.g3pt_tokenizer import SYSTEM, PointTokenizer, TokenizerOutput


@dataclass(frozen=True)
class PointTokenizerLossConfig:
    """Attributes:

    near: weight of the points near the surface, beside 1 for those of the whole cube.
    quantizer: weight of the commitment and entropy terms.
    fit: weight of the squared distance between the sum after every scale and the continuous latents.
    commitment: weight of the same distance for the encoder, within ``fit``.
    continuous: share of the run in which the decoder sees the continuous latents and nothing is quantised.
    partial: share of shapes that are decoded from a drawn number of their first scales instead of all.
    """

    near: float = 0.1
    quantizer: float = 1.0
    fit: float = 1.0
    commitment: float = 0.25
    continuous: float = 0.3
    partial: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.continuous < 1 or not 0 <= self.partial <= 1:
            raise ValueError(
                f"continuous is {self.continuous} and partial {self.partial}; expected shares, continuous below 1"
            )


# --- initial weights ----------------------------------------------------------------------------------


def spread(count: int, reach: float = 0.9) -> Float[Tensor, "count 3"]:
    """Points that lie evenly in [-reach, reach]^3; a single one in its middle."""
    if count == 1:
        return torch.zeros(1, 3)
    return (torch.quasirandom.SobolEngine(3).draw(count) * 2 - 1) * reach


@torch.no_grad()
def initialize(tokenizer: PointTokenizer) -> PointTokenizer:
    """Initial weights, for training anew: queries begin as places, and look at what is near them.

    All queries are the encodings of evenly spread points; both encodings of points begin alike, low frequencies strong;
    and each attention's keys begin as its queries, so that what is alike attends to each other.
    """
    quantizer, config = tokenizer.quantizer, tokenizer.config
    waves = tokenizer.query_encoding.linear
    strength = 2.0 ** (-0.5 * torch.arange(config.octaves)).repeat(6)
    strength = torch.cat((strength, torch.ones(3)))
    nn.init.normal_(waves.weight).mul_(strength / strength.square().sum().div(2).sqrt())
    points = tokenizer.point_encoding.linear
    nn.init.normal_(points.weight, std=0.5)
    points.weight[:, : waves.in_features] = waves.weight
    for layer in (waves, points):
        nn.init.zeros_(layer.bias)
    encode: PointEncoding = tokenizer.query_encoding
    latents = encode(spread(config.latents).to(tokenizer.device))
    tokenizer.latent_queries.copy_(latents)
    quantizer.latent_queries.copy_(latents)
    quantizer.queries.copy_(torch.cat([encode(spread(count)) for count in config.schedule.lengths]))
    nn.init.normal_(quantizer.from_codes.weight)
    for module in tokenizer.modules():
        if isinstance(module, QueryAttention):
            attention, width = module.attention, config.width
            nn.init.normal_(attention.query.weight, std=1 / math.sqrt(width))
            nn.init.zeros_(attention.query.bias)
            attention.key_value.weight[:width] = attention.query.weight
    for blocks in (tokenizer.encoder, tokenizer.decoder):
        for block in blocks.blocks:
            for branch in (block.attention.projection, block.feed_forward.contract):
                branch.weight.div_(math.sqrt(2 * len(blocks.blocks)))
    return tokenizer


# --- the objective ------------------------------------------------------------------------------------


class PointTokenizerTraining(TrainingTask):
    """Trains a :class:`nextscale.tasks.shapes.g3pt_tokenizer.PointTokenizer`.

    A batch holds ``surface`` (batch, points, 6), points and normals; ``queries`` (batch, queries, 3) and ``occupied``
    (batch, queries), whether they lie inside; and may hold ``near`` (batch, queries), whether a query was drawn near
    the surface, and ``uniform`` in [0, 1), by which shapes are decoded from some of their scales.

    Args:
        total: steps of the run, which the phase without quantisation is a share of.
    """

    name = SYSTEM

    def __init__(
        self, tokenizer: PointTokenizer, config: PointTokenizerLossConfig | None = None, total: int = 0
    ) -> None:
        self.tokenizer, self.config = tokenizer, config or PointTokenizerLossConfig()
        self._begin = round(self.config.continuous * total)
        self.phases: dict[str, nn.Module] = {SYSTEM: tokenizer}

    def quantizes(self, step: int) -> bool:
        """Whether the decoder sees what the tokens keep at a step."""
        return step >= self._begin

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        quantize = self.quantizes(step)
        scales = self._scales(batch, step) if quantize else None
        output: TokenizerOutput = module(batch["surface"], batch["queries"], quantize, scales)
        loss, metrics = self.occupancy_terms(output.logits, batch)
        if output.quantized is None:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                # Distributed training waits for a gradient of every weight.
                loss = loss + 0 * sum(p.sum() for p in self.tokenizer.quantizer.parameters())
            return loss, metrics
        features, totals = output.features, output.quantized.totals
        fits = torch.stack([F.mse_loss(total, features.detach()) for total in totals])
        committed = torch.stack([F.mse_loss(features, total.detach()) for total in totals])
        fit = fits.mean() + self.config.commitment * committed.mean()
        loss = loss + self.config.fit * fit + self.config.quantizer * output.quantized.loss
        usage = torch.cat(output.quantized.tokens, dim=1).float().mean((0, 1))
        metrics |= {
            "fit": fits[-1].detach(),
            "quantizer": output.quantized.loss.detach(),
            # Of the bit that is most often alike: 0.5 where both values come equally often, 0 where it says nothing.
            "rarest_bit": torch.minimum(usage, 1 - usage).min(),
        }
        return loss, metrics

    def _scales(self, batch: Batch, step: int) -> Tensor | None:
        count, chance = len(self.tokenizer.config.schedule), batch.get("uniform")
        if chance is None or not self.config.partial:
            return None
        drawn = 1 + (chance / self.config.partial * count).long()
        return torch.where(chance < self.config.partial, drawn.clamp(max=count), count)

    def occupancy_terms(self, logits: Float[Tensor, "batch queries"], batch: Batch) -> tuple[Tensor, Metrics]:
        """Binary cross-entropy of uniform points, and of near ones by their weight; and the IoU of each, in [0, 1]."""
        target = batch["occupied"].float()
        near: Tensor = batch.get("near", torch.zeros_like(target, dtype=torch.bool))
        every = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        loss = logits.new_zeros(())
        metrics: Metrics = {}
        for name, chosen, weight in (("", ~near, 1.0), ("_near", near, self.config.near)):
            if chosen.any():
                term = every[chosen].mean()
                loss = loss + weight * term
                metrics |= {f"cross_entropy{name}": term.detach(), f"iou{name}": iou(logits, target > 0, chosen)}
        return loss, metrics


@torch.no_grad()
def iou(logits: Tensor, occupied: Tensor, chosen: Tensor) -> Float[Tensor, ""]:
    """Mean over shapes of the intersection over union of predicted and true insides among chosen points."""
    inside = (logits > 0) & chosen
    truth = occupied & chosen
    return ((inside & truth).sum(1) / (inside | truth).sum(1).clamp_min(1)).mean()
