"""Seeing a field of density and colour: rays, planes, and volume rendering in two passes.

Mildenhall et al. 2020 (NeRF) over three planes as Chan et al. 2022 (EG3D) have them, in SAR3D's form (Chen et al. 2024,
arXiv 2411.16856): planes hold (x, y), (y, z) and (z, x), samples lie between entering and leaving a box.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

PLANES = ((0, 1), (1, 2), (2, 0))
"""The axes along width and height of each plane."""

Field = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Raw density (batch, points, 1) and colour (batch, points, 3) at points (batch, points, 3)."""


@dataclass(frozen=True)
class RenderConfig:
    """Attributes:

    box: side of the centred cube that planes span.
    coarse, fine: samples of a ray in the first pass, spread evenly, and in the second, where the first found density;
        ``fine`` 0: one pass.
    near, far: where rays begin and end; None: where they enter and leave the box.
    disparity: spread the first samples evenly in 1 / distance.
    low, high: samples with a coordinate outside count as empty; None: none does.
    white: the background; False: black.
    """

    box: float = 0.9
    coarse: int = 64
    fine: int = 64
    near: float | None = None
    far: float | None = None
    disparity: bool = False
    low: float | None = -0.45
    high: float | None = 0.45
    white: bool = True

    def __post_init__(self) -> None:
        if self.coarse < 2 or self.fine < 0:
            raise ValueError(f"{self.coarse} and {self.fine} samples of a ray: expected at least 2, and at least 0")
        if (self.near is None) != (self.far is None) or (self.low is None) != (self.high is None):
            raise ValueError("near and far are given together or not at all, and so are low and high")


@dataclass(frozen=True, eq=False)
class Rendered:
    """Attributes:

    colour: in [-1, 1], on the background.
    depth: sum of weights times distances, not divided by the sum of weights.
    mask: 1.002 times the sum of weights, less 0.001.
    """

    colour: Float[Tensor, "batch rays 3"]
    depth: Float[Tensor, "batch rays 1"]
    mask: Float[Tensor, "batch rays 1"]


def camera_rays(cameras: Float[Tensor, "views 25"], size: int) -> tuple[Tensor, Tensor]:
    """Origins and unit directions, (views, size^2, 3), through the centres of pixels, row by row.

    Args:
        cameras: camera-to-world 4 x 4 (x right, y down, z forward), then the intrinsics 3 x 3 in units of the picture's
            side, row by row.
    """
    pose, intrinsics = cameras[:, :16].unflatten(1, (4, 4)), cameras[:, 16:25].unflatten(1, (3, 3))
    ticks = (torch.arange(size, device=cameras.device, dtype=cameras.dtype) + 0.5) / size
    v, u = (part.flatten() for part in torch.meshgrid(ticks, ticks, indexing="ij"))
    fx, skew, cx, fy, cy = (
        intrinsics[:, row, column, None] for row, column in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2))
    )
    y = (v - cy) / fy
    x = (u - cx - skew * y) / fx
    local = torch.stack((x, y, torch.ones_like(x)), dim=-1)
    directions = F.normalize(local @ pose[:, :3, :3].mT, dim=-1)
    return pose[:, None, :3, 3].expand_as(directions), directions


def pluecker(cameras: Float[Tensor, "views 25"], size: int) -> Float[Tensor, "views 6 size size"]:
    """Rays as six numbers: origin x direction, then direction."""
    origins, directions = camera_rays(cameras, size)
    both = torch.cat((torch.linalg.cross(origins, directions), directions), dim=-1)
    return both.mT.unflatten(-1, (size, size))


def box_limits(origins: Tensor, directions: Tensor, box: float) -> tuple[Tensor, Tensor]:
    """Distances (…, 1) at which rays enter and leave a centred cube of side ``box``; -1 and -2 where they miss it."""
    inverse = 1 / directions
    a, b = (-box / 2 - origins) * inverse, (box / 2 - origins) * inverse
    near = torch.minimum(a, b).amax(-1, keepdim=True)
    far = torch.maximum(a, b).amin(-1, keepdim=True)
    missed = near > far
    return near.masked_fill(missed, -1.0), far.masked_fill(missed, -2.0)


def sample_planes(
    planes: Float[Tensor, "batch features height width"], points: Float[Tensor, "batch points 3"], box: float
) -> Float[Tensor, "batch points features"]:
    """Features of points: of each plane a third of the channels, bilinear, zero outside."""
    places = torch.stack([points[..., list(axes)] for axes in PLANES], dim=1) * (2 / box)
    maps = planes.unflatten(1, (3, -1)).flatten(0, 1)
    found = F.grid_sample(maps, places.flatten(0, 1)[:, None].to(maps.dtype), align_corners=False)
    return found[:, :, 0].unflatten(0, (-1, 3)).flatten(1, 2).mT


@dataclass(frozen=True, eq=False)
class Noise:
    """Uniform numbers in [0, 1) that move the samples of both passes.

    Attributes:
        coarse: (batch, rays, samples) or, to be the same for all rays, anything that spreads to it; ``fine`` likewise.
    """

    coarse: Tensor
    fine: Tensor

    @classmethod
    def none(cls, config: RenderConfig, device: torch.device) -> Noise:
        """Samples stand in the middle of their parts: the same picture each time."""
        fine = (torch.arange(config.fine, device=device) + 0.5) / max(config.fine, 1)
        return cls(torch.full((1, 1, config.coarse), 0.5, device=device), fine[None, None])

    @classmethod
    def drawn(cls, config: RenderConfig, rays: Sequence[int], device: torch.device) -> Noise:
        """For training."""
        return cls(*(torch.rand(*rays, count, device=device) for count in (config.coarse, config.fine)))


def render(
    field: Field,
    origins: Float[Tensor, "batch rays 3"],
    directions: Float[Tensor, "batch rays 3"],
    config: RenderConfig,
    noise: Noise | None = None,
    chunk: int | None = None,
) -> Rendered:
    """What rays see of a field.

    Args:
        noise: None: samples stand in the middle of their parts.
        chunk: rays computed at once, for memory; None: all.
    """
    noise = noise or Noise.none(config, origins.device)
    shape = directions.shape[:2]
    first = _spread(origins, directions, config, noise.coarse)
    fine_noise = noise.fine.expand(*shape, config.fine)
    parts = []
    for start in range(0, shape[1], chunk or shape[1]):
        stop = start + (chunk or shape[1])
        rays = (origins[:, start:stop], directions[:, start:stop])
        parts.append(_march(field, rays, first[:, start:stop], fine_noise[:, start:stop], config))
    colour, depth, weight = (torch.cat(part, dim=1) for part in list(zip(*parts, strict=True))[:3])
    least, most = min(float(part[3].min()) for part in parts), max(float(part[3].max()) for part in parts)
    depth = depth.nan_to_num(math.inf).clamp(least, most)
    return Rendered(colour, depth, weight * 1.002 - 0.001)


def _spread(origins: Tensor, directions: Tensor, config: RenderConfig, noise: Tensor) -> Float[Tensor, "b r samples"]:
    """Distances of the first pass."""
    near: Tensor
    far: Tensor
    if config.near is None or config.far is None:
        near, far = box_limits(origins, directions, config.box)
        hit = far > near
        if hit.any():
            entries = near[hit]
            near, far = torch.where(hit, near, entries.min()), torch.where(hit, far, entries.max())
    else:
        near, far = (torch.full_like(directions[..., :1], limit) for limit in (config.near, config.far))
    steps = torch.arange(config.coarse, device=near.device, dtype=near.dtype) / (config.coarse - 1)
    if config.disparity:
        places = steps + noise / (config.coarse - 1)
        return 1 / (1 / near * (1 - places) + 1 / far * places)
    return near + steps * (far - near) + noise * ((far - near) / (config.coarse - 1))


def _march(
    field: Field, rays: tuple[Tensor, Tensor], depths: Tensor, noise: Tensor, config: RenderConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Colour, depth and weight of some rays, and the distances sampled."""
    density, colour = _look(field, rays, depths, config)
    if config.fine:
        with torch.no_grad():
            weights = _weights(density, depths)
            more = _draw(depths, weights, noise)
        density_more, colour_more = _look(field, rays, more, config)
        depths, order = torch.cat((depths, more), dim=-1).sort(dim=-1)
        density = torch.cat((density, density_more), dim=-1).gather(-1, order)
        joined = torch.cat((colour, colour_more), dim=-2)
        colour = joined.gather(-2, order[..., None].expand_as(joined))
    weights = _weights(density, depths)
    between = (depths[..., 1:] + depths[..., :-1]) / 2
    seen = (weights[..., None] * (colour[..., 1:, :] + colour[..., :-1, :]) / 2).sum(-2)
    total = weights.sum(-1, keepdim=True)
    seen = seen + 1 - total if config.white else seen
    depth = (weights * between).sum(-1, keepdim=True)
    return seen * 2 - 1, depth, total, depths


def _look(field: Field, rays: tuple[Tensor, Tensor], depths: Tensor, config: RenderConfig) -> tuple[Tensor, Tensor]:
    """Density (batch, rays, samples) and colour (batch, rays, samples, 3)."""
    origins, directions = rays
    points = origins[:, :, None] + depths[..., None] * directions[:, :, None]
    density, colour = (part.unflatten(1, depths.shape[1:]) for part in field(points.flatten(1, 2)))
    density = density[..., 0]
    if config.low is not None and config.high is not None:
        inside = ((points >= config.low) & (points <= config.high)).all(-1)
        density = torch.where(inside, density, torch.finfo(density.dtype).min / 3)
        colour = torch.where(inside[..., None], colour, 0)
    return density, colour


def _weights(density: Tensor, depths: Tensor) -> Float[Tensor, "batch rays intervals"]:
    """How much each interval between samples counts: what it absorbs of what reaches it."""
    absorbed = F.softplus((density[..., 1:] + density[..., :-1]) / 2 - 1) * depths.diff(dim=-1)
    alpha = 1 - torch.exp(-absorbed)
    passed = torch.cat((torch.ones_like(alpha[..., :1]), 1 - alpha + 1e-10), dim=-1).cumprod(-1)
    return alpha * passed[..., :-1]


def _draw(depths: Tensor, weights: Tensor, noise: Tensor) -> Float[Tensor, "batch rays samples"]:
    """Distances distributed as the smoothed weights of the first pass are."""
    flat = weights.flatten(0, 1)[:, None]
    smooth = F.avg_pool1d(F.max_pool1d(flat, 2, 1, padding=1), 2, 1)[:, 0] + 0.01
    edges = ((depths[..., 1:] + depths[..., :-1]) / 2).flatten(0, 1)
    density = smooth[:, 1:-1] + 1e-5
    reached = F.pad((density / density.sum(-1, keepdim=True)).cumsum(-1), (1, 0))
    u = noise.flatten(0, 1).contiguous()
    above = torch.searchsorted(reached, u, right=True)
    below, above = (above - 1).clamp_min(0), above.clamp_max(density.shape[-1])
    low, high = reached.gather(1, below), reached.gather(1, above)
    width = torch.where(high - low < 1e-5, 1.0, high - low)
    start, stop = edges.gather(1, below), edges.gather(1, above)
    return (start + (u - low) / width * (stop - start)).unflatten(0, depths.shape[:2])
