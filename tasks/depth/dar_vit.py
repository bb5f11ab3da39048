"""The vision transformer (Dosovitskiy et al. 2021), with what DINOv2 adds: a scale per branch, any image size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.tasks.depth.dar_transformer import FeedForward, SelfAttention


@dataclass(frozen=True)
class ViTConfig:
    """Attributes:

    patch: side of a patch in pixels.
    grid: side of the grid of patches that the positions are learned for; others are interpolated.
    branch_scale: a learned factor per channel of every branch (LayerScale).
    grid_offset: added to the sides of another grid before the positions' scale is taken, as DINOv2 does against
        rounding.
    classes: of a classifier on the class token; 0: none.
    mask_token: carry the token that stands for hidden patches in DINOv2's own training.
    """

    width: int = 1024
    depth: int = 24
    heads: int = 16
    patch: int = 14
    grid: int = 37
    mlp_ratio: float = 4.0
    branch_scale: bool = True
    grid_offset: float = 0.1
    norm_eps: float = 1e-6
    classes: int = 0
    mask_token: bool = False

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")


DINOV2: dict[str, ViTConfig] = {
    "small": ViTConfig(384, 12, 6),
    "base": ViTConfig(768, 12, 12),
    "large": ViTConfig(1024, 24, 16),
}
"""The released DINOv2 models of patch 14 (the giant one has other feed-forward networks)."""

CLASSIFIER = ViTConfig(768, 12, 12, 16, 14, branch_scale=False, grid_offset=0.0, norm_eps=1e-12, classes=1000)
"""ViT-B/16 on ImageNet's 1,000 classes at 224 px."""


class ViTBlock(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.attention = nn.LayerNorm(width, config.norm_eps), SelfAttention(width, config.heads)
        self.norm2 = nn.LayerNorm(width, config.norm_eps)
        self.feed_forward = FeedForward(width, int(width * config.mlp_ratio))
        self.scale1 = nn.Parameter(torch.ones(width)) if config.branch_scale else None
        self.scale2 = nn.Parameter(torch.ones(width)) if config.branch_scale else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.attention(self.norm1(x))
        x = x + (branch if self.scale1 is None else branch * self.scale1)
        branch = self.feed_forward(self.norm2(x))
        return x + (branch if self.scale2 is None else branch * self.scale2)


class VisionTransformer(nn.Module):
    """Image -> patch tokens, or class logits."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.patches = nn.Conv2d(3, width, config.patch, config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.empty(1, config.grid**2 + 1, width))
        nn.init.trunc_normal_(self.position_embedding, std=0.02)
        modules = nn.ModuleList(ViTBlock(config) for _ in range(config.depth))
        self.blocks = cast("Sequence[ViTBlock]", modules)
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.mask_token: nn.Parameter | None = None
        if config.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, width), requires_grad=False)
        self.classifier = nn.Linear(width, config.classes) if config.classes else None

    def positions(self, height: int, width: int) -> Float[Tensor, "1 tokens channels"]:
        """Of the class token and of a grid of patches, row by row."""
        side, learned = self.config.grid, self.position_embedding
        if (height, width) == (side, side):
            return learned
        maps = learned[:, 1:].mT.unflatten(-1, (side, side)).float()
        if offset := self.config.grid_offset:
            # The size alone would give another sampling: DINOv2 was trained and published with the scale.
            scale = ((height + offset) / side, (width + offset) / side)
            maps = F.interpolate(maps, scale_factor=scale, mode="bicubic")
        else:
            maps = F.interpolate(maps, size=(height, width), mode="bicubic")
        return torch.cat((learned[:, :1], maps.flatten(2).mT.to(learned.dtype)), dim=1)

    def embed(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens channels"]:
        """Class token and patches, with their positions."""
        patches = self.patches(images)
        x = torch.cat((self.class_token.expand(len(images), -1, -1), patches.flatten(2).mT), dim=1)
        return x + self.positions(*patches.shape[-2:])

    def last_layers(self, images: Float[Tensor, "batch 3 height width"], count: int) -> list[Tensor]:
        """The normalised patch maps (batch, channels, rows, columns) of the last ``count`` blocks, in order."""
        rows, columns = (side // self.config.patch for side in images.shape[-2:])
        x, outputs = self.embed(images), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index >= len(self.blocks) - count:
                outputs.append(self.norm(x)[:, 1:].mT.unflatten(-1, (rows, columns)))
        return outputs

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Class logits.

        Raises:
            ValueError: the model has no classifier.
        """
        if self.classifier is None:
            raise ValueError("this vision transformer has no classifier")
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.classifier(self.norm(x[:, 0]))
        return logits
