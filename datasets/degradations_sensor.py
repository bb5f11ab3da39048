"""What a camera and its file format do: noise, compression, rounding, too little light."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from .degradations_base import Degradation, Range, Whole, check_range, draw, draw_whole, normal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Degradation):
    """White Gaussian noise, the usual denoising benchmark: sigma 15, 25 or 50, or, blind, drawn for each image.

    Attributes:
        sigma: standard deviation on the scale of 0 to 255.
        clip: to [0, 1]; Restormer and SwinIR leave noisy images as they are, AirNet and PromptIR clip them.
    """

    kind: Literal["noise"] = "noise"
    sigma: Range = 25.0
    clip: bool = True

    def __post_init__(self) -> None:
        check_range(self, "sigma", 0, 255)

    def apply(self, image: Tensor, draws: np.random.Generator, depth: Tensor | None = None) -> Tensor:
        noisy = image + draw(self.sigma, draws) / 255 * normal(draws, tuple(image.shape))
        return noisy.clamp(0, 1) if self.clip else noisy


@dataclass(frozen=True, kw_only=True)
class JPEG(Degradation):
    """JPEG compression and decompression by libjpeg, as in Pillow and OpenCV.

    Attributes:
        quality: 1 to 100; 10, 20, 30 and 40 are the usual benchmark.
        subsampling: of the colour differences, 4:2:0 as OpenCV writes, or 4:4:4.
    """

    kind: Literal["jpeg"] = "jpeg"
    quality: Whole = 10
    subsampling: Literal["4:2:0", "4:4:4"] = "4:2:0"

    def __post_init__(self) -> None:
        check_range(self, "quality", 1, 100)

    def apply(self, image: Tensor, draws: np.random.Generator, depth: Tensor | None = None) -> Tensor:
        import torch

        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        quality = draw_whole(self.quality, draws)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=self.subsampling)
        return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1).contiguous().float() / 255


@dataclass(frozen=True, kw_only=True)
class Quantise(Degradation):
    """To 8 bits, as saving does; AirNet and PromptIR truncate noisy images instead of rounding them."""

    kind: Literal["quantise"] = "quantise"
    mode: Literal["round", "truncate"] = "round"

    def apply(self, image: Tensor, draws: np.random.Generator, depth: Tensor | None = None) -> Tensor:
        scaled = image.clamp(0, 1) * 255
        return (scaled.round() if self.mode == "round" else scaled.floor()) / 255


@dataclass(frozen=True, kw_only=True)
class LowLight(Degradation):
    """Too little light: scale (dim * image)^gamma, then the noise of few photons and of reading them out.

    The curve and its ranges are those of Lv, Li and Lu 2021, "Attention Guided Low-Light Image Enhancement"
    (arXiv 1908.00682).

    Attributes:
        dim, scale, gamma: of the curve.
        read_noise: standard deviation on the scale of 0 to 255.
        photons: at full brightness; fewer give more shot noise. 0: no shot noise.
    """

    kind: Literal["lowlight"] = "lowlight"
    dim: Range = (0.9, 1.0)
    scale: Range = (0.5, 1.0)
    gamma: Range = (1.5, 5.0)
    read_noise: Range = (0.0, 3.0)
    photons: Range = (1000.0, 4000.0)

    def __post_init__(self) -> None:
        for name in ("dim", "scale"):
            check_range(self, name, 0, 1)
        for name in ("gamma", "read_noise", "photons"):
            check_range(self, name, 0)

    def apply(self, image: Tensor, draws: np.random.Generator, depth: Tensor | None = None) -> Tensor:
        dim, scale, gamma, read, photons = (
            draw(value, draws) for value in (self.dim, self.scale, self.gamma, self.read_noise, self.photons)
        )
        dark = scale * (dim * image.clamp(0, 1)) ** gamma
        variance = (read / 255) ** 2 + (dark / photons if photons else 0)
        return (dark + variance**0.5 * normal(draws, tuple(image.shape))).clamp(0, 1)
