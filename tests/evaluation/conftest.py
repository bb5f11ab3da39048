"""A small classifier as a TorchScript file, and images it knows."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn


class ByColour(nn.Module):
    """Features: the mean of each channel and of its left half. Class: the brightest channel."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means = images.mean(dim=(2, 3))
        left = images[:, :, :, : images.shape[3] // 2].mean(dim=(2, 3))
        return torch.cat([means, left], dim=1), 20.0 * means


def coloured_images(labels: Tensor, seed: int, side: int = 12) -> Tensor:
    """Images (B, 3, side, side) in [0, 1] whose brightest channel is the label."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.4 * torch.rand(len(labels), 3, side, side, generator=generator)
    offsets = 0.2 * torch.rand(len(labels), 3, 1, 1, generator=generator)
    images += offsets + 0.4 * nn.functional.one_hot(labels, 3)[:, :, None, None] * (1 - offsets)
    return images.clamp(0, 1)


@pytest.fixture(scope="session")
def network_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "by_colour.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(ByColour()).save(str(path))
    return path


Maker = Callable[..., Tensor]


@pytest.fixture(scope="session")
def coloured() -> Maker:
    return coloured_images


@pytest.fixture(scope="session")
def real() -> tuple[Tensor, Tensor]:
    """240 images (240, 3, 12, 12), 80 of each of three classes, and their labels."""
    labels = torch.arange(240) % 3
    return coloured_images(labels, seed=0), labels
