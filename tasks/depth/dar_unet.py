"""Stable Diffusion's UNet, read for its features (Rombach et al. 2022; VPD and EcoDepth use it so)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.attention import attend

GROUPS = 32
READ = (1, 4, 7)
"""Blocks of the upward path whose outputs are read, beside the last one's."""


@dataclass(frozen=True)
class UNetConfig:
    """Attributes:

    channels: of the highest resolution; ``multipliers`` gives those of all, from the highest down.
    blocks: residual blocks per level on the way down; one more on the way up.
    attention_at: by how much a level is smaller than the latent, where it has attention.
    heads: of the attention; None: as many as ``head_size`` channels each give.
    context_width: channels of the condition.
    attention_depth: transformer blocks in each attention.
    modulated: the time scales and shifts (instead of shifting alone).
    """

    channels: int = 320
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    attention_at: tuple[int, ...] = (1, 2, 4)
    heads: int | None = 8
    head_size: int = 64
    context_width: int = 768
    attention_depth: int = 1
    modulated: bool = False
    latent_channels: int = 4

    def heads_of(self, width: int) -> int:
        return self.heads or width // self.head_size

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the features that are read, fine to coarse."""
        coarse = [self.channels * multiplier for multiplier in reversed(self.multipliers)]
        up = [width for width in coarse for _ in range(self.blocks + 1)]
        return (up[-1], *(up[index] for index in reversed(READ)))


class TimeStep(nn.Module):
    """A residual block that a vector of the time goes into."""

    def __init__(self, inputs: int, outputs: int, time_width: int, modulated: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time_width, 2 * outputs if modulated else outputs)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None
        self.modulated = modulated

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        added = self.time(F.silu(time))[..., None, None]
        if self.modulated:
            scale, shift = added.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + added)
        h = self.conv2(F.silu(h))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, 1 / math.sqrt(width // heads)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            layer(given).unflatten(-1, (self.heads, -1))
            for layer, given in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.projection(attend(q, k, v, self.scale).flatten(2))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the condition, gated feed-forward network."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, width, heads)
        self.norm2, self.context_attention = nn.LayerNorm(width), Attention(width, context_width, heads)
        self.norm3, self.expand = nn.LayerNorm(width), nn.Linear(width, 8 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        own = self.norm1(x)
        x = x + self.attention(own, own)
        x = x + self.context_attention(self.norm2(x), context)
        value, gate = self.expand(self.norm3(x)).chunk(2, dim=-1)
        return x + self.contract(value * F.gelu(gate))


class MapAttention(nn.Module):
    """Transformer blocks over the positions of a map."""

    def __init__(self, width: int, context_width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.enter, self.leave = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.blocks = nn.ModuleList(TransformerBlock(width, context_width, heads) for _ in range(depth))

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        h = self.enter(self.norm(x)).flatten(2).mT
        for block in self.blocks:
            h = block(h, context)
        return x + self.leave(h.mT.unflatten(-1, x.shape[-2:]))


class Resample(nn.Module):
    """A convolution: of stride 2, or behind nearest-neighbour doubling; or at the same size."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, doubled: bool = False) -> None:
        super().__init__()
        self.conv, self.doubled = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), doubled

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.doubled else x)


class Stage(nn.ModuleList):
    """Modules one after another."""

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        for module in self:
            x = module(x, time, context)
        return x


class UNet(nn.Module):
    """Noisy latent, time and condition -> features; the layers that would predict the noise are left out."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        time_width = 4 * config.channels
        self.time = nn.Sequential(nn.Linear(config.channels, time_width), nn.SiLU(), nn.Linear(time_width, time_width))

        def block(inputs: int, outputs: int) -> TimeStep:
            return TimeStep(inputs, outputs, time_width, config.modulated)

        def attention(width: int) -> MapAttention:
            return MapAttention(width, config.context_width, config.heads_of(width), config.attention_depth)

        width, shrunk = config.channels, 1
        down = [Stage([Resample(config.latent_channels, width)])]
        kept, last = [width], len(config.multipliers) - 1
        for level, multiplier in enumerate(config.multipliers):
            for _ in range(config.blocks):
                stage = Stage([block(width, config.channels * multiplier)])
                width = config.channels * multiplier
                if shrunk in config.attention_at:
                    stage.append(attention(width))
                down.append(stage)
                kept.append(width)
            if level < last:
                down.append(Stage([Resample(width, width, stride=2)]))
                kept.append(width)
                shrunk *= 2
        middle = Stage([block(width, width), attention(width), block(width, width)])
        up = []
        for level in range(last, -1, -1):
            for index in range(config.blocks + 1):
                outputs = config.channels * config.multipliers[level]
                stage = Stage([block(width + kept.pop(), outputs)])
                width = outputs
                if shrunk in config.attention_at:
                    stage.append(attention(width))
                if level and index == config.blocks:
                    stage.append(Resample(width, width, doubled=True))
                    shrunk //= 2
                up.append(stage)
        self.down = cast("Sequence[Stage]", nn.ModuleList(down))
        self.middle = middle
        self.up = cast("Sequence[Stage]", nn.ModuleList(up))

    def forward(
        self,
        latents: Float[Tensor, "batch channels height width"],
        times: Float[Tensor, " batch"],
        context: Float[Tensor, "batch tokens condition"],
    ) -> list[Tensor]:
        """Four maps, fine to coarse: 1, 1/2, 1/4 and 1/8 of the latent's size in Stable Diffusion."""
        time = self.time(waves(times, self.config.channels).to(latents.dtype))
        h, kept, read = latents, [], []
        for stage in self.down:
            h = stage(h, time, context)
            kept.append(h)
        h = self.middle(h, time, context)
        for index, stage in enumerate(self.up):
            h = stage(torch.cat((h, kept.pop()), dim=1), time, context)
            if index in READ or index == len(self.up) - 1:
                read.append(h)
        return read[::-1]


def waves(times: Float[Tensor, " batch"], width: int) -> Float[Tensor, "batch width"]:
    """Cosines and sines of the time, of wavelengths from 2 pi to 20,000 pi."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=times.device) / half)
    angles = times[:, None].float() * frequencies
    return F.pad(torch.cat((angles.cos(), angles.sin()), dim=-1), (0, width % 2))
