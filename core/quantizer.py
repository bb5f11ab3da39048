"""Multi-scale residual vector quantisation: a feature map as a coarse-to-fine pyramid of tokens.

Tian et al. 2024, "Visual Autoregressive Modeling" (arXiv 2404.02905), algorithms 1 and 2. Scale by scale,
the part of the features that is not yet explained is shrunk to the scale's grid, each cell is replaced by
its nearest code, and the codes, enlarged and smoothed by a small convolution, are taken off the rest. What
enters the transformer at the next scale is the sum so far, shrunk to that scale's grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.schedule import ScaleSchedule


@dataclass(frozen=True)
class QuantizerConfig:
    """Attributes:

    vocabulary: number of codes.
    channels: numbers per code.
    beta: weight of the commitment term.
    unit_norm: search by angle instead of distance (the code inserted is not normalised).
    smoothing: share r of the 3x3 convolution in h -> (1 - r) h + r conv(h); 0 leaves codes as they are.
    smoothers: number of those convolutions, spread over the scales by their place in the list.
    """

    vocabulary: int = 4096
    channels: int = 32
    beta: float = 0.25
    unit_norm: bool = False
    smoothing: float = 0.5
    smoothers: int = 4

    def __post_init__(self) -> None:
        if self.vocabulary < 1 or self.channels < 1:
            raise ValueError(f"a codebook needs codes and channels, got {self.vocabulary} x {self.channels}")


@lru_cache(maxsize=256)
def smoother_index(count: int, scales: int) -> tuple[int, ...]:
    """Which of ``count`` smoothers serves each of ``scales`` scales.

    The nearest of evenly spaced ticks to k / (scales - 1); the first on ties. Computed in float64 as the
    official code does: for 4 smoothers and 10 scales two ties are decided by rounding.
    """
    margin = 1 / 3 / count if count == 4 else 1 / 2 / count
    ticks = np.linspace(margin, 1 - margin, count)
    return tuple(int(np.argmin(np.abs(ticks - k / max(scales - 1, 1)))) for k in range(scales))


class Smoother(nn.Module):
    """h -> (1 - r) h + r conv3x3(h)."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.ratio = abs(ratio)

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.ratio) + self.conv(h) * self.ratio


@dataclass
class QuantizerOutput:
    """What the quantiser's training pass gives.

    Attributes:
        features: straight-through: the value of the quantised sum, the gradient of the input.
        loss: codebook and commitment terms, mean over scales.
        tokens: of each scale, (batch, scale tokens).
        rests: what each scale had to explain, (cells, channels) per scale, without gradient.
    """

    features: Float[Tensor, "batch channels height width"]
    loss: Float[Tensor, ""]
    tokens: list[Int[Tensor, "batch tokens"]]
    rests: list[Tensor]


class Float32Module(nn.Module):
    """A module whose weights stay float32, whatever the model around it is converted to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves go with the model, casts do not: codes and what is made of them stay float32 in a bfloat16 model."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)


class VectorQuantizer(Float32Module):
    """A codebook and the search in it. Runs in float32 whatever the surrounding precision.

    Args:
        unit_norm: search by angle instead of distance.
    """

    def __init__(self, vocabulary: int, channels: int, unit_norm: bool = False) -> None:
        super().__init__()
        self.codebook = nn.Embedding(vocabulary, channels)
        self.unit_norm = unit_norm
        nn.init.uniform_(self.codebook.weight, -1 / vocabulary, 1 / vocabulary)

    @property
    def vectors(self) -> Float[Tensor, "vocabulary channels"]:
        """What the symbols stand for, float32."""
        return self.codebook.weight.float()

    def nearest(self, z: Float[Tensor, "cells channels"]) -> Int[Tensor, " cells"]:
        """Index of the nearest code, the first on ties."""
        codes = self.codebook.weight.float()
        if self.unit_norm:
            return (F.normalize(z, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(1)
        distance = z.square().sum(1, keepdim=True) + codes.square().sum(1)
        return torch.addmm(distance, z, codes.T, alpha=-2).argmin(1)

    def lookup(self, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens channels"]:
        """The code vectors of tokens."""
        return F.embedding(tokens, self.vectors)


class ResidualQuantizer(VectorQuantizer):
    """Features <-> token pyramid. Runs in float32 whatever the surrounding precision."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config.vocabulary, config.channels, config.unit_norm)
        self.config = config
        count = config.smoothers if abs(config.smoothing) > 1e-6 else 0
        self.smoothers = nn.ModuleList(Smoother(config.channels, config.smoothing) for _ in range(count))

    # --- single steps ------------------------------------------------------------------------------------

    def shrink(self, features: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        """Features at the grid of scale ``index``, by area; the finest scale is taken as it is."""
        if index == len(schedule) - 1:
            return features
        return F.interpolate(features, size=schedule[index].grid, mode="area")

    def begin(self, batch: int, schedule: ScaleSchedule, like: Tensor | None = None) -> Tensor:
        """The sum of nothing: zeros (batch, channels, height, width) at the finest grid."""
        device = (self.codebook.weight if like is None else like).device
        return torch.zeros(batch, self.config.channels, *schedule.final.grid, device=device)

    def contribution(
        self, codes: Float[Tensor, "batch tokens channels"], schedule: ScaleSchedule, index: int
    ) -> Float[Tensor, "batch channels height width"]:
        """What the codes of scale ``index`` add to the sum: enlarged bicubically, then smoothed."""
        h = codes.float().mT.unflatten(-1, schedule[index].grid)
        if index != len(schedule) - 1:
            h = F.interpolate(h, size=schedule.final.grid, mode="bicubic")
        return self.smooth(h, schedule, index)

    def advance(self, total: Tensor, codes: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        """The sum after scale ``index``, given its codes."""
        return total + self.contribution(codes, schedule, index)

    def smooth(self, h: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        """The convolution that belongs to scale ``index``."""
        if len(self.smoothers) == 0:
            return h
        with torch.autocast(h.device.type, enabled=False):
            return self.smoothers[smoother_index(len(self.smoothers), len(schedule))[index]](h)

    def next_input(
        self, total: Float[Tensor, "batch channels height width"], schedule: ScaleSchedule, index: int
    ) -> Float[Tensor, "batch tokens channels"]:
        """What enters the transformer at scale ``index``: the sum of all scales before it, on its grid."""
        return F.interpolate(total, size=schedule[index].grid, mode="area").flatten(2).mT

    # --- whole pyramids ----------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self, features: Float[Tensor, "batch channels height width"], schedule: ScaleSchedule, scales: int | None = None
    ) -> tuple[list[Int[Tensor, "batch tokens"]], list[Tensor]]:
        """Tokens of each scale, and the sum after each scale.

        Args:
            features: the encoder's output; its grid must be the schedule's finest.
            scales: stop after so many scales; all by default.

        Raises:
            ValueError: the grids differ.
        """
        if tuple(features.shape[-2:]) != schedule.final.grid:
            raise ValueError(
                f"the features' grid is {tuple(features.shape[-2:])}, the schedule '{schedule}' ends at "
                f"{schedule.final.grid}: give a list whose last scale is the features' size"
            )
        rest = features.float()
        total = torch.zeros_like(rest)
        tokens, totals = [], []
        for index in range(len(schedule) if scales is None else scales):
            z = self.shrink(rest, schedule, index)
            found = self.nearest(z.movedim(1, -1).flatten(0, 2)).view(len(z), -1)
            h = self.contribution(self.lookup(found), schedule, index)
            total, rest = total + h, rest - h
            tokens.append(found)
            totals.append(total)
        return tokens, totals

    def decode(self, tokens: Int[Tensor, "batch length"], schedule: ScaleSchedule) -> list[Tensor]:
        """The sum after each scale, (batch, channels, height, width) each, from tokens of all scales."""
        total = self.begin(len(tokens), schedule)
        totals = []
        for index, scale_tokens in enumerate(schedule.split(tokens)):
            total = total + self.contribution(self.lookup(scale_tokens), schedule, index)
            totals.append(total)
        return totals

    @torch.no_grad()
    def teacher_inputs(
        self, tokens: Int[Tensor, "batch length"], schedule: ScaleSchedule, scales: int | None = None
    ) -> Float[Tensor, "batch rest channels"]:
        """Teacher forcing: the inputs of scales 1, 2, … from the true tokens, in one sequence.

        Args:
            tokens: of all scales in use; the last one's may be missing.
            scales: how many of the schedule's scales are in use; all by default. The sum stays at the
                finest grid, so a prefix of the schedule is not the same.
        """
        total = self.begin(len(tokens), schedule)
        inputs = [total.new_zeros(len(tokens), 0, self.config.channels)]
        for index in range((len(schedule) if scales is None else scales) - 1):
            start, stop = schedule.ranges[index]
            total = total + self.contribution(self.lookup(tokens[:, start:stop]), schedule, index)
            inputs.append(self.next_input(total, schedule, index + 1))
        return torch.cat(inputs, dim=1)

    def forward(self, features: Tensor, schedule: ScaleSchedule) -> QuantizerOutput:
        """The training pass (paper, section 3.2), with the straight-through estimator.

        loss = mean over scales of beta mse(sum_k detached, f) + mse(sum_k, f detached).
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            target = features.detach()
            rest, total = target, torch.zeros_like(target)
            loss = features.new_zeros(())
            tokens, rests = [], []
            for index in range(len(schedule)):
                z = self.shrink(rest, schedule, index).movedim(1, -1).flatten(0, 2)
                found = self.nearest(z).view(len(features), -1)
                h = self.contribution(self.lookup(found), schedule, index)
                total = total + h
                rest = rest - h.detach()
                loss = loss + self.config.beta * F.mse_loss(total.detach(), features) + F.mse_loss(total, target)
                tokens.append(found)
                rests.append(z)
            straight_through = (total.detach() - target) + features
        return QuantizerOutput(straight_through, loss / len(schedule), tokens, rests)
