"""The patch discriminator of adversarial tokenizer training (Isola et al. 2017, PatchGAN)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class PatchDiscriminator(nn.Sequential):
    """Images -> one real-or-fake score per patch.

    Strided 4x4 convolutions with leaky ReLU; group norm instead of batch norm, so that a score does not depend
    on the batch.
    """

    def __init__(self, channels: int = 64, levels: int = 3, image_channels: int = 3) -> None:
        layers: list[nn.Module] = [nn.Conv2d(image_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for level in range(1, levels + 1):
            wider = channels * min(2**level, 8)
            stride = 2 if level < levels else 1
            layers += [nn.Conv2d(width, wider, 4, stride, 1), nn.GroupNorm(8, wider), nn.LeakyReLU(0.2)]
            width = wider
        super().__init__(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        self.smallest_side = 3 * 2**levels

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 1 patches_high patches_wide"]:
        return super().forward(images)
