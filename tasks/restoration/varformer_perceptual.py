"""The perceptual term of restoration losses: how different two images look to VGG-19.

Johnson et al. 2016 (arXiv 1603.08155) with the one layer that VarFormer's recipe compares, relu5_4. The weights are the
user's: an ImageNet VGG-19.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.checkpoint import CheckpointError, read_tensors

STAGES = ((64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14, 16)), (512, (19, 21, 23, 25)), (512, (28, 30, 32, 34)))
"""Width and places in torchvision's ``vgg19().features`` of each stage's convolutions."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of images in [0, 1], per channel: the normalisation VGG-19 was trained with."""


class VGG19Features(nn.Module):
    """Mean absolute difference of two images' features after relu5_4. Frozen; gradients reach the images.

    Made by :meth:`from_file`. It moves itself to the images' device.
    """

    def __init__(self) -> None:
        super().__init__()
        inputs, self.stages = 3, nn.ModuleList()
        for width, places in STAGES:
            widths = [inputs, *[width] * len(places)]
            self.stages.append(
                nn.ModuleList(
                    nn.utils.skip_init(nn.Conv2d, widths[i], widths[i + 1], 3, padding=1) for i in range(len(places))
                )
            )
            inputs = width
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> VGG19Features:
        """With weights from torchvision's VGG-19 (``features.N.weight``, ``features.N.bias``).

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it is damaged, would need code to be executed, or holds other weights.
        """
        model, content = cls(), read_tensors(Path(path))
        with torch.no_grad():
            for (_, places), stage in zip(STAGES, model.stages, strict=True):
                assert isinstance(stage, nn.ModuleList)
                for place, convolution in zip(places, stage, strict=True):
                    for kind, parameter in convolution.named_parameters():
                        value = content.get(f"features.{place}.{kind}")
                        if not isinstance(value, Tensor) or value.shape != parameter.shape:
                            raise CheckpointError(
                                f"{path} has no features.{place}.{kind} of the shape {tuple(parameter.shape)}: it is "
                                "no VGG-19"
                            )
                        parameter.copy_(value)
        return model.eval()

    def features(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 512 h w"]:
        """Of images in [-1, 1], after relu5_4."""
        x = ((images + 1) / 2 - self.mean) / self.deviation
        for number, stage in enumerate(self.stages):
            assert isinstance(stage, nn.ModuleList)
            if number:
                x = F.max_pool2d(x, 2)
            for convolution in stage:
                x = F.relu(convolution(x))
        return x

    def forward(
        self, first: Float[Tensor, "batch 3 height width"], second: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, ""]:
        """Mean absolute difference.

        Args:
            first: takes the gradient; both in [-1, 1], at least 16 pixels a side.

        Raises:
            ValueError: the shapes differ, or an image is too small.
        """
        if first.shape != second.shape or min(first.shape[-2:]) < 16:
            raise ValueError(
                f"images are {tuple(first.shape)} and {tuple(second.shape)}; expected one shape, 16 or more"
            )
        if self.mean.device != first.device:
            self.to(first.device)
        with torch.no_grad():
            target = self.features(second)
        return F.l1_loss(self.features(first), target)
