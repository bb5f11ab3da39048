"""LPIPS: how different two images look to a network's features.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (arXiv 1801.03924),
with the VGG16 trunk, the form that is used as a training loss. The weights are the user's: an ImageNet VGG16
and the learned linear weights of LPIPS 0.1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.evaluation.weights import read_weights

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of the five stages whose last activations are compared."""
CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Places of each stage's convolutions in torchvision's ``vgg16().features``, by which weights are named."""
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Of images in [-1, 1], per channel: the normalisation VGG16 was trained with."""
NORM_EPS = 1e-10


class LPIPS(nn.Module):
    """Sum over five stages of VGG16 of weighted squared differences of unit-length features (equation 1).

    Made by :meth:`from_files`. Frozen: gradients reach the images, not the weights. It moves itself to the
    images' device.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *WIDTHS)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                nn.utils.skip_init(nn.Conv2d, widths[stage + (i > 0)], widths[stage + 1], 3, padding=1)
                for i in range(len(places))
            )
            for stage, places in enumerate(CONVOLUTIONS)
        )
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(width)) for width in WIDTHS)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def from_files(cls, vgg_weights: str | os.PathLike[str], lpips_weights: str | os.PathLike[str]) -> LPIPS:
        """With weights from files.

        Args:
            vgg_weights: torchvision's VGG16 (``features.N.weight``, ``features.N.bias``).
            lpips_weights: LPIPS 0.1 for VGG16 (``lin0.model.1.weight`` to ``lin4.model.1.weight``).
                Both are ``.safetensors`` or PyTorch files of tensors.

        Raises:
            OSError: a file is missing.
            ValueError: a file is damaged, would need code to be executed, or holds other weights.
        """
        model = cls()
        trunk, linear = read_weights(vgg_weights), read_weights(lpips_weights)
        with torch.no_grad():
            for places, stage in zip(CONVOLUTIONS, model.stages, strict=True):
                assert isinstance(stage, nn.ModuleList)
                for place, convolution in zip(places, stage, strict=True):
                    for kind, parameter in convolution.named_parameters():
                        name = f"features.{place}.{kind}"
                        parameter.copy_(_entry(trunk, name, tuple(parameter.shape), vgg_weights))
            for i, parameter in enumerate(model.weights):
                shape = (1, WIDTHS[i], 1, 1)
                parameter.copy_(_entry(linear, f"lin{i}.model.1.weight", shape, lpips_weights).flatten())
        return model.eval()

    def features(self, images: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
        """Unit-length feature maps of the five stages, (batch, channels, height / 2^k, width / 2^k)."""
        x, maps = (images - self.shift) / self.scale, []
        for number, stage in enumerate(self.stages):
            assert isinstance(stage, nn.ModuleList)
            if number:
                x = F.max_pool2d(x, 2)
            for convolution in stage:
                x = F.relu(convolution(x))
            maps.append(F.normalize(x.float(), dim=1, eps=NORM_EPS))
        return maps

    def distance(
        self, first: Float[Tensor, "batch 3 height width"], second: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, " batch"]:
        """The distance of each pair of images.

        Args:
            first, second: in [-1, 1], at least 16 pixels a side.

        Raises:
            ValueError: the shapes differ, or an image is too small.
        """
        if first.shape != second.shape or first.ndim != 4 or first.shape[1] != 3 or min(first.shape[-2:]) < 16:
            raise ValueError(
                f"images are {tuple(first.shape)} and {tuple(second.shape)}; expected two of the same shape "
                "(batch, 3, height, width), at least 16 pixels a side"
            )
        if self.shift.device != first.device:
            self.to(first.device)
        total = first.new_zeros(len(first))
        for weight, a, b in zip(self.weights, self.features(first), self.features(second), strict=True):
            difference = (a - b).square() * weight[:, None, None]
            total = total + difference.sum(1).mean((1, 2))
        return total

    def forward(
        self, first: Float[Tensor, "batch 3 height width"], second: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, ""]:
        """Mean :meth:`distance` over the batch."""
        return self.distance(first, second).mean()


def _entry(content: Mapping[str, Any], name: str, shape: tuple[int, ...], path: str | os.PathLike[str]) -> Tensor:
    value = content.get(name)
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        found = f"has the shape {tuple(value.shape)}" if isinstance(value, Tensor) else "is missing"
        raise ValueError(f"{path}: {name} {found}, expected {shape}; these are not the weights LPIPS needs")
    return value
