"""Rain, haze and snow, drawn onto clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from .degradations_base import Degradation, Range, Whole, check_range, convolved, draw, draw_whole
from .degradations_blur import disk, line

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RainStreaks(Degradation):
    """Bright streaks over the image, O = B + S, as in Rain100L and Rain100H (Yang et al. 2017, equation 1).

    Attributes:
        density: share of pixels from which a drop starts; 0.003 looks like Rain100L, five layers of 0.004 like
            Rain100H.
        length: of the streaks in pixels.
        angle: of the fall to the vertical, in degrees.
        strength: brightness of a streak's middle.
        layers: streaks of so many directions and lengths lie over each other.
        veil: far drops that no longer show as streaks lighten the image by this share.
    """

    kind: Literal["rain"] = "rain"
    density: Range = (0.001, 0.004)
    length: Whole = (11, 31)
    angle: Range = (-30.0, 30.0)
    strength: Range = (0.4, 0.9)
    layers: Whole = 1
    veil: Range = 0.0

    def __post_init__(self) -> None:
        for name in ("density", "strength", "veil"):
            check_range(self, name, 0, 1)
        check_range(self, "length", 1)
        check_range(self, "layers", 1, 16)
        check_range(self, "angle", -90, 90)

    def apply(self, image: Tensor, draws: np.random.Generator, depth: Tensor | None = None) -> Tensor:
        import torch

        veil, streaks = draw(self.veil, draws), torch.zeros(image.shape[-2:])
        for _ in range(draw_whole(self.layers, draws)):
            density, angle, strength = (draw(value, draws) for value in (self.density, self.angle, self.strength))
            kernel = line(draw_whole(self.length, draws) | 1, 90 + angle, fade=0.8)
            drops = _drops(image, density, draws)
            # A drop's streak is as bright as asked for, however long it is.
            streaks += convolved(drops[None], kernel / kernel.max())[0] * strength
        return (image * (1 - veil) + 0.8 * veil + streaks.clamp(max=1)).clamp(0, 1)


def _drops(image: Tensor, density: float, draws: np.random.Generator) -> Tensor:
    """(height, width): places where something falls, each of its own brightness."""
    import torch

    height, width = image.shape[-2:]
    places, brightness = draws.random((2, height, width), dtype=np.float32)
    return torch.from_numpy((places < density) * (0.3 + 0.7 * brightness))


@dataclass(frozen=True, kw_only=True)
class Haze(Degradation):
    """Atmospheric scattering: J t + A (1 - t) with t = exp(-beta depth) (Koschmieder's law).

    Attributes:
        beta: per unit of depth. RESIDE draws 0.6 to 1.8 indoors.
        airlight: A. RESIDE draws 0.7 to 1 indoors and 0.8 to 1 outdoors.
        depth: ``given`` with every sample; or ``made``: from 0.2 at the bottom to 1 at the top, waves of its own in
            it, which follow the image's edges: no real distance, but haze of the right kind.
    """

    kind: Literal["haze"] = "haze"
    beta: Range = (0.6, 1.8)
    airlight: Range = (0.7, 1.0)
    depth: Literal["given", "made"] = "made"

    def __post_init__(self) -> None:
        check_range(self, "beta", 0)
        check_range(self, "airlight", 0, 1)

    def apply(self, image: Tensor, draws: np.random.Generator, depth: Tensor | None = None) -> Tensor:
        beta, airlight = draw(self.beta, draws), draw(self.airlight, draws)
        waves = draws.random((4, 4), dtype=np.float32)
        if self.depth == "made":
            depth = _made_depth(image, waves)
        elif depth is None:
            raise ValueError("haze with depth 'given' needs the sample's depth map; give it, or ask for 'made'")
        elif depth.shape != image.shape[-2:]:
            raise ValueError(f"the depth map is {tuple(depth.shape)}, the image {tuple(image.shape[-2:])}")
        seen = (-beta * depth.float()).exp()
        return (image * seen + airlight * (1 - seen)).clamp(0, 1)


def _made_depth(image: Tensor, waves: np.ndarray) -> Tensor:
    import torch
    import torch.nn.functional as F
    from kornia.filters import guided_blur

    height, width = image.shape[-2:]
    rise = torch.linspace(1, 0.2, height)[:, None].expand(height, width)
    field = F.interpolate(torch.from_numpy(waves)[None, None], (height, width), mode="bicubic", align_corners=False)
    field = (rise + 0.5 * (field[0, 0] - 0.5)).clamp(0.05, 1.2)
    size = (min(height, width) // 8) | 1
    if size < 3:
        return field
    return guided_blur(image.mean(0)[None, None], field[None, None], size, 1e-3, separable=True)[0, 0].clamp(0.05, 1.2)


@dataclass(frozen=True, kw_only=True)
class Snow(Degradation):
    """Opaque white flakes, J (1 - z) + z, as in Snow100K (Liu et al. 2018, equation 1).

    Attributes:
        size: ``small`` flakes as in Snow100K-S, ``medium``: small and middle ones, ``large``: those of all sizes.
        density: share of pixels at which a small flake is; larger ones are rarer.
        opacity: of a flake's middle.
        speed: length in pixels by which a flake of the middle size is drawn out; larger, nearer ones more.
        angle: of the fall to the vertical, in degrees.
    """

    kind: Literal["snow"] = "snow"
    size: Literal["small", "medium", "large"] = "medium"
    density: Range = (0.005, 0.02)
    opacity: Range = (0.7, 1.0)
    speed: Whole = (1, 5)
    angle: Range = (-40.0, 40.0)

    def __post_init__(self) -> None:
        for name in ("density", "opacity"):
            check_range(self, name, 0, 1)
        check_range(self, "speed", 1)
        check_range(self, "angle", -90, 90)

    def apply(self, image: Tensor, draws: np.random.Generator, depth: Tensor | None = None) -> Tensor:
        import torch

        density, opacity, angle = (draw(value, draws) for value in (self.density, self.opacity, self.angle))
        speed, cover = draw_whole(self.speed, draws), torch.zeros(image.shape[-2:])
        # (radius in pixels, how many times rarer, how many times faster)
        layers = ((0.8, 1, 0.5), (1.8, 5, 1.0), (3.5, 25, 2.0))[: ("small", "medium", "large").index(self.size) + 1]
        for radius, rarer, faster in layers:
            flake = disk(radius) / disk(radius).max()
            flakes = convolved(_drops(image, density / rarer, draws)[None], flake)
            flakes = convolved(flakes, line(round(speed * faster) | 1, 90 + angle))[0].clamp(max=1)
            cover = cover + flakes * opacity * (1 - cover)
        return (image * (1 - cover) + cover).clamp(0, 1)
