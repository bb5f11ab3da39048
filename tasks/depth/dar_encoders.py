"""Image encoders of DAR beside Stable Diffusion: patch transformers with a neck, and small convolutions.

Every encoder gives, of an image in [-1, 1], a map of tokens for the transformer to look at, and a finer feature map.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.autoencoder import ResidualBlock
from nextscale.tasks.depth.dar_necks import GROUPS, PatchPyramid
from nextscale.tasks.depth.dar_vit import DINOV2, VisionTransformer, ViTConfig

LEVELS = 4
"""Blocks of a patch transformer that the neck reads: the last ones."""


@dataclass(frozen=True)
class PatchEncoderConfig:
    """Attributes:

    level_widths: channels of the neck's levels, fine to coarse.
    width: of the pyramid.
    outputs: channels of the joined tokens.
    unread_layers: carry the layers of the published files that nothing reads.
    """

    vit: ViTConfig = DINOV2["large"]
    level_widths: tuple[int, ...] = (256, 512, 1024, 1024)
    width: int = 320
    outputs: int = 1536
    unread_layers: bool = False

    def __post_init__(self) -> None:
        if len(self.level_widths) != LEVELS:
            raise ValueError(f"level_widths are {self.level_widths}; expected {LEVELS} numbers")
        if self.vit.depth < LEVELS:
            raise ValueError(f"the neck reads {LEVELS} blocks, the transformer has {self.vit.depth}")
        if self.width % GROUPS or self.outputs % GROUPS:
            raise ValueError(f"width {self.width} and outputs {self.outputs} must be multiples of {GROUPS}")


class PatchEncoder(nn.Module):
    """A vision transformer and Depth Anything's neck: tokens on the grid of patches, features four times as fine."""

    def __init__(self, config: PatchEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = VisionTransformer(config.vit)
        self.neck = PatchPyramid(
            config.vit.width, config.level_widths, config.width, config.outputs, config.unread_layers
        )

    @property
    def multiple(self) -> int:
        """Sides of images are multiples of this: four patches, as in the published code."""
        return 4 * self.config.vit.patch

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of tokens and features."""
        return self.config.outputs, self.config.width

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
        memory, context = self.neck(self.vit.last_layers(images, LEVELS))
        return memory, context


@dataclass(frozen=True)
class ConvEncoderConfig:
    """Attributes:

    widths: channels at 1/2, 1/4, 1/8, … of the image's size.
    blocks: residual blocks at each size but the first.
    outputs: channels of the tokens, at the last size.
    features: channels of the finer map, at 1/4 of the image's size.
    """

    widths: tuple[int, ...] = (32, 64, 96, 128)
    blocks: int = 2
    outputs: int = 192
    features: int = 64

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or any(width % GROUPS for width in (*self.widths, self.outputs, self.features)):
            raise ValueError(
                f"widths {self.widths}, outputs {self.outputs} and features {self.features} must be multiples of "
                f"{GROUPS}, and there must be two widths or more"
            )


class ConvEncoder(nn.Module):
    """Residual convolutions that halve the image several times, and a path back up to a quarter of its size.

    Beside the colours they see where each pixel is: what lies low in a picture is mostly near.
    """

    def __init__(self, config: ConvEncoderConfig) -> None:
        super().__init__()
        self.config, widths = config, config.widths
        self.enter = nn.Conv2d(5, widths[0], 3, stride=2, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                *(ResidualBlock(outputs, outputs, GROUPS) for _ in range(config.blocks)),
            )
            for inputs, outputs in pairwise(widths)
        )
        # What residual blocks add up has no bound of its own: without norms it grows until the decoder's gates shut.
        self.sideways = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, config.features, 1))
            for width in widths[1:]
        )
        self.smooth = nn.Sequential(
            nn.Conv2d(config.features, config.features, 3, padding=1), nn.GroupNorm(GROUPS, config.features), nn.SiLU()
        )
        self.tokens = nn.Sequential(
            nn.Conv2d(widths[-1], config.outputs, 1), nn.GroupNorm(GROUPS, config.outputs), nn.ReLU()
        )

    @property
    def multiple(self) -> int:
        """Sides of images are multiples of this."""
        return 1 << len(self.config.widths)

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of tokens and features."""
        return self.config.outputs, self.config.features

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
        h = F.silu(self.enter(torch.cat((images, _places(images)), dim=1)))
        levels: list[Tensor] = []
        for stage in self.stages:
            h = stage(h)
            levels.append(h)
        path: Tensor | None = None
        for layer, level in zip(reversed(self.sideways), reversed(levels), strict=True):
            across = layer(level)
            if path is not None:
                across = across + F.interpolate(path, scale_factor=2.0, mode="nearest")
            path = across
        assert path is not None
        return self.tokens(h), self.smooth(path)


def _places(images: Tensor) -> Float[Tensor, "batch 2 height width"]:
    """Row and column of every pixel, from -1 to 1."""
    height, width = images.shape[-2:]
    rows = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype)
    columns = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(images), -1, -1, -1)
