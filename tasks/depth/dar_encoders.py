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

    widths: channels at 1/2, 1/4, 1/8, … of the image's size. Tokens have those of the last size but one, features those
        at 1/4.
    blocks: residual blocks at each size but the first, on the way down.
    """

    widths: tuple[int, ...] = (32, 64, 96, 128, 152)
    blocks: int = 2

    def __post_init__(self) -> None:
        if len(self.widths) < 3 or min(self.widths) < 1 or self.blocks < 1:
            raise ValueError(
                f"widths {self.widths} with {self.blocks} blocks make no encoder: expected three widths or more and at "
                "least one block"
            )


class BasicBlock(nn.Module):
    """conv, batch norm, ReLU, conv, batch norm, plus the input, ReLU (He et al. 2016, "Deep residual learning")."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Sequential | None = None
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + (x if self.shortcut is None else self.shortcut(x)))


class ConvEncoder(nn.Module):
    """A U-Net (Ronneberger et al. 2015) of residual blocks, from half of the image's size down and up to a quarter.

    Beside the colours it sees where each pixel is: what lies low in a picture is mostly near. Its batch norms keep the
    statistics of the weights as they are, not of their average: train it with ``average: 0``.
    """

    def __init__(self, config: ConvEncoderConfig) -> None:
        super().__init__()
        self.config, widths = config, config.widths
        self.enter = nn.Sequential(
            nn.Conv2d(5, widths[0], 5, 2, 2, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        self.down = nn.ModuleList(
            nn.Sequential(
                BasicBlock(inputs, outputs, stride=2), *(BasicBlock(outputs, outputs) for _ in range(config.blocks - 1))
            )
            for inputs, outputs in pairwise(widths)
        )
        self.up = nn.ModuleList(BasicBlock(below + here, here) for here, below in reversed(list(pairwise(widths[1:]))))

    @property
    def multiple(self) -> int:
        """Sides of images are multiples of this."""
        return 1 << len(self.config.widths)

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of tokens and features."""
        return self.config.widths[-2], self.config.widths[1]

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
        images = torch.cat((images, _places(images)), dim=1).contiguous(memory_format=torch.channels_last)
        h = self.enter(images)
        levels: list[Tensor] = []
        for stage in self.down:
            h = stage(h)
            levels.append(h)
        path: list[Tensor] = [levels.pop()]
        for block in self.up:
            enlarged = F.interpolate(path[-1], scale_factor=2.0, mode="nearest")
            path.append(block(torch.cat((enlarged, levels.pop()), dim=1)))
        return path[1], path[-1]


def _places(images: Tensor) -> Float[Tensor, "batch 2 height width"]:
    """Row and column of every pixel, from -1 to 1."""
    height, width = images.shape[-2:]
    rows = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype)
    columns = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(images), -1, -1, -1)
