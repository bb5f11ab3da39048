"""Stable Diffusion as an image encoder: the latent of the photo, denoised once under a condition made of its scene.

As in EcoDepth (Patni et al. 2024), whose scene embedding DAR takes over: the probabilities that a frozen classifier
gives become a mixture of learned embeddings, which stands where a text would.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.autoencoder import AutoencoderConfig, Encoder
from nextscale.tasks.depth.dar_necks import Gather
from nextscale.tasks.depth.dar_unet import UNet, UNetConfig
from nextscale.tasks.depth.dar_vit import CLASSIFIER, VisionTransformer, ViTConfig

TIME = 1
"""Of the one denoising step."""

FIRST_STAGE = AutoencoderConfig(channels=128, multipliers=(1, 2, 4, 4), latent_channels=8)
"""Stable Diffusion's: half of the channels that come out are the latent's mean, the others its variance."""


@dataclass(frozen=True)
class DiffusionEncoderConfig:
    """Attributes:

    scenes: learned embeddings that the condition is mixed of.
    classifier: gives the probabilities; its input is square, ``patch * grid`` pixels a side.
    latent_scale: factor of the latent before the UNet.
    outputs: channels of the joined tokens.
    unread_layers: carry the layers of the published files that nothing reads.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    first_stage: AutoencoderConfig = FIRST_STAGE
    classifier: ViTConfig = CLASSIFIER
    scenes: int = 100
    scene_hidden: int = 400
    latent_scale: float = 0.18215
    outputs: int = 1536
    unread_layers: bool = False


class FirstStage(nn.Module):
    """Image -> the mean of its latent; frozen."""

    def __init__(self, config: AutoencoderConfig, unread_layers: bool) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        # Stable Diffusion's has attention in the middle alone.
        self.encoder.levels[-1].attentions = nn.ModuleList()
        channels = config.latent_channels
        self.moments = nn.Conv2d(channels, channels, 1)
        self.unread = nn.Conv2d(channels // 2, channels // 2, 1) if unread_layers else None

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch latent tall wide"]:
        mean: Tensor = self.moments(self.encoder(images)).chunk(2, dim=1)[0]
        return mean


class SceneEmbedding(nn.Module):
    """Class logits -> a condition of one token (EcoDepth's CIDE)."""

    def __init__(self, config: DiffusionEncoderConfig) -> None:
        super().__init__()
        width = config.unet.context_width
        self.mix = nn.Sequential(
            nn.Linear(config.classifier.classes, config.scene_hidden),
            nn.GELU(),
            nn.Linear(config.scene_hidden, config.scenes),
        )
        self.scene_embedding = nn.Parameter(torch.randn(config.scenes, width))
        self.adapter = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.gamma = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch 1 width"]:
        scene = self.mix(logits).softmax(1) @ self.scene_embedding
        embedded: Tensor = (scene + self.gamma * self.adapter(scene))[:, None]
        return embedded


class DiffusionEncoder(nn.Module):
    """Image in [-1, 1] -> tokens at 1/32 of its size, and the finest features, at 1/8.

    Autoencoder and classifier are frozen.
    """

    def __init__(self, config: DiffusionEncoderConfig) -> None:
        super().__init__()
        self.config = config
        fine, middle, coarse, coarsest = config.unet.widths
        self.first_stage = FirstStage(config.first_stage, config.unread_layers).requires_grad_(False)
        self.classifier = VisionTransformer(config.classifier).requires_grad_(False)
        self.scene = SceneEmbedding(config)
        self.unet = UNet(config.unet)
        self.gather = Gather((fine, middle, coarse + coarsest), config.outputs)
        draw_normal(self.gather)

    @property
    def multiple(self) -> int:
        """Sides of images are multiples of this."""
        return 64

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of tokens and features."""
        return self.config.outputs, self.config.unet.widths[0]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.first_stage.eval()
        self.classifier.eval()
        return self

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            latents = self.first_stage(images)
            pictures = classifier_pictures(squared(images), self.config.classifier)
            logits = self.classifier(pictures.to(images.device, images.dtype))
        memory, levels = self.read(latents, self.scene(logits))
        return memory, levels[0]

    def read(self, latents: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens, and the UNet's features, of latents as the first stage gives them."""
        times = torch.full((len(latents),), TIME, device=latents.device)
        levels = self.unet(latents * self.config.latent_scale, times, condition)
        return self.gather(*levels), levels


def draw_normal(module: nn.Module) -> None:
    """Convolutions from a truncated normal distribution of deviation 0.02, without biases."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def squared(images: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch side side 3"]:
    """Images in [-1, 1] as whole numbers to 255, rounded down, with black below wide ones and beside tall ones."""
    height, width = images.shape[-2:]
    side = max(height, width)
    values = F.pad(255 * ((images + 1) / 2), (0, side - width, 0, side - height))
    return values.permute(0, 2, 3, 1).to(torch.int32)


def classifier_pictures(
    squares: Int[Tensor, "batch side side 3"], config: ViTConfig
) -> Float[Tensor, "batch 3 height width"]:
    """What the classifier sees, in [-1, 1]: resized as Pillow does it, bilinear."""
    from PIL import Image

    side = config.patch * config.grid
    pictures: list[Any] = []
    for square in squares.cpu().numpy().astype(np.uint8):
        resized = Image.fromarray(square).resize((side, side), Image.Resampling.BILINEAR)
        pictures.append(np.asarray(resized, dtype=np.float32) / 255)
    return (torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) - 0.5) / 0.5
