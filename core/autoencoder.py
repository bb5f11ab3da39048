"""The convolutional autoencoder under most image tokenizers (the latent-diffusion layout).

Rombach et al. 2022 as VAR uses it: residual blocks with group norm and SiLU, self-attention only at the
lowest resolution, downsampling by a strided convolution, upsampling by nearest neighbour and convolution.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.attention import attend

NORM_EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig:
    """Attributes:

    channels: width at full resolution.
    multipliers: width of each level in units of ``channels``, from full resolution down.
    blocks: residual blocks per encoder level; the decoder has one more.
    latent_channels: channels of the encoder's output and the decoder's input.
    attention: self-attention in the lowest level and in the middle.
    norm_groups: groups of the group norms.
    level_attention: levels with self-attention after each block, full resolution being 0, where it is not (only) the
        lowest; empty: the middle alone has some.
    """

    channels: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent_channels: int = 32
    image_channels: int = 3
    dropout: float = 0.0
    attention: bool = True
    norm_groups: int = 32
    level_attention: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for multiplier in self.multipliers:
            if self.channels * multiplier % self.norm_groups:
                raise ValueError(
                    f"a level of {self.channels * multiplier} channels does not divide into {self.norm_groups} groups; "
                    "set norm_groups to a divisor"
                )

    @property
    def stride(self) -> int:
        """Image pixels per latent cell, along each side."""
        return 2 ** (len(self.multipliers) - 1)

    def attends(self, level: int) -> bool:
        """Whether a level has attention after each of its blocks."""
        if self.level_attention is not None:
            return level in self.level_attention
        return self.attention and level == len(self.multipliers) - 1


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input (1x1 convolved where the width changes)."""

    def __init__(self, inputs: int, outputs: int, groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, NORM_EPS), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outputs, NORM_EPS), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        # In place where no gradient needs the value: at full resolution the memory traffic costs as much as a
        # convolution in half precision.
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.dropout(F.silu(self.norm2(h), inplace=True), self.dropout, self.training))
        return h.add_(x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nn.Module):
    """One-head self-attention over all positions, plus the input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(2).chunk(3, dim=-1)
        out = attend(q, k, v, channels**-0.5)
        return x + self.projection(out.squeeze(2).mT.unflatten(-1, (height, width)))


class Downsample(nn.Module):
    """Zero-pad right and bottom by one, then a 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The blocks at one resolution, each followed by attention where the level has it."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = [inputs] + [outputs] * blocks, config.norm_groups
        self.blocks = nn.ModuleList(
            ResidualBlock(widths[i], widths[i + 1], groups, config.dropout) for i in range(blocks)
        )
        self.attentions = nn.ModuleList(AttentionBlock(outputs, groups) for _ in range(blocks if attention else 0))
        self.resample: nn.Module | None = None

    def process(self, x: Tensor) -> Tensor:
        """What the level makes of its input, at its own resolution."""
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attentions):
                x = self.attentions[i](x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.process(x)
        return x if self.resample is None else self.resample(x)


def middle(channels: int, config: AutoencoderConfig) -> nn.Sequential:
    """The blocks at the lowest resolution, between encoder and decoder levels."""
    parts = OrderedDict[str, nn.Module](block1=ResidualBlock(channels, channels, config.norm_groups, config.dropout))
    if config.attention:
        parts["attention"] = AttentionBlock(channels, config.norm_groups)
    parts["block2"] = ResidualBlock(channels, channels, config.norm_groups, config.dropout)
    return nn.Sequential(parts)


class Encoder(nn.Module):
    """Image -> latent map."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in (1, *config.multipliers)]
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3, padding=1)
        self.levels = nn.ModuleList()
        for i in range(len(config.multipliers)):
            lowest = i == len(config.multipliers) - 1
            level = Level(widths[i], widths[i + 1], config.blocks, config.attends(i), config)
            level.resample = None if lowest else Downsample(widths[i + 1])
            self.levels.append(level)
        self.middle = middle(widths[-1], config)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(
        self, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch latent height/stride width/stride"]:
        x = self.conv_in(image)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Latent map -> image. Level 0 is full resolution; levels run from the lowest up."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.middle = middle(widths[-1], config)
        levels: list[Level] = []
        inputs = widths[-1]
        for i in reversed(range(len(widths))):
            level = Level(inputs, widths[i], config.blocks + 1, config.attends(i), config)
            level.resample = Upsample(widths[i]) if i else None
            levels.append(level)
            inputs = widths[i]
        self.levels = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(config.norm_groups, inputs, NORM_EPS)
        self.conv_out = nn.Conv2d(inputs, config.image_channels, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the final convolution, where adversarial training balances its gradients."""
        return self.conv_out.weight

    def forward(
        self, latent: Float[Tensor, "batch latent height width"]
    ) -> Float[Tensor, "batch channels height*stride width*stride"]:
        x = self.middle(self.conv_in(latent))
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def lay_out_channels_last(module: nn.Module) -> None:
    """Store convolution weights channels last, in place: the layout that convolutions are fastest in."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
