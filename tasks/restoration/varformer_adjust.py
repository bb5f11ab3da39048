"""VarFormer's adjustment: a decoded feature map is aligned with the frozen decoder's by deformable convolution.

Official code siywang541/Varformer, ``mainDecoder.py`` (``TWAM`` and ``TextureWarpingModule``). Feature maps are (batch,
channels, height, width).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.autoencoder import NORM_EPS
from nextscale.tasks.restoration.varformer_parts import ChannelNorm, Map


class ChannelAttention(nn.Module):
    """Two maps give to each other what attention between their channels finds; both gifts start at zero.

    One softmax serves both directions: of unit-length channels of ``x`` over those of ``guide``.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.norm_x, self.norm_guide = ChannelNorm(channels), ChannelNorm(channels)
        self.query, self.key = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.value_x, self.value_guide = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Map, guide: Map) -> tuple[Map, Map]:
        query = F.normalize(self._split(self.query(self.norm_x(x))), dim=-1)
        key = F.normalize(self._split(self.key(self.norm_guide(guide))), dim=-1)
        weights = (query @ key.mT * self.scale).softmax(-1)
        to_x = (weights @ self._split(self.value_guide(guide))).reshape(x.shape)
        to_guide = (weights @ self._split(self.value_x(x))).reshape(x.shape)
        return x + self.beta * to_x, guide + self.gamma * to_guide

    def _split(self, x: Map) -> Float[Tensor, "batch heads channels positions"]:
        return x.flatten(2).unflatten(1, (self.heads, -1))


def deform_conv(
    x: Map,
    offsets: Float[Tensor, "batch groups*taps*2 height width"],
    weights: Float[Tensor, "batch groups*taps height width"],
    kernel: Float[Tensor, "outputs channels side side"],
    bias: Float[Tensor, " outputs"],
) -> Float[Tensor, "batch outputs height width"]:
    """Modulated deformable convolution (Zhu et al. 2019, arXiv 1811.11168), stride 1, padding side // 2.

    Args:
        offsets: of every tap of every group of channels, down and right in turn, in pixels.
        weights: of every tap of every group.
    """
    batch, channels, height, width = x.shape
    side = kernel.shape[-1]
    taps = side * side
    groups = weights.shape[1] // taps
    # Places in float32 whatever the precision: half of it would move them by whole pixels.
    shift = offsets.float().reshape(batch * groups, taps, 2, height, width)
    tap = torch.arange(side, device=x.device) - side // 2
    down = tap.repeat_interleave(side)[:, None, None] + torch.arange(height, device=x.device)[:, None] + shift[:, :, 0]
    right = tap.repeat(side)[:, None, None] + torch.arange(width, device=x.device) + shift[:, :, 1]
    # Centres of pixels in the units of grid_sample without aligned corners: -1 and 1 are the picture's edges.
    grid = torch.stack(((2 * right + 1) / width - 1, (2 * down + 1) / height - 1), dim=-1)
    parts = x.reshape(batch * groups, channels // groups, height, width)
    sampled = F.grid_sample(
        parts.float(), grid.flatten(1, 2), mode="bilinear", padding_mode="zeros", align_corners=False
    ).to(x.dtype)
    weighted = sampled.unflatten(2, (taps, height)) * weights.reshape(batch * groups, 1, taps, height, width)
    columns = weighted.reshape(batch, channels * taps, height * width)
    return (kernel.flatten(1) @ columns).unflatten(-1, (height, width)) + bias[:, None, None]


class DeformableConv(nn.Module):
    """:func:`deform_conv` of a map, with offsets and weights from another; offsets start at zero, weights at 1 / 2."""

    def __init__(self, channels: int, groups: int, side: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, side, side))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.offset = nn.Conv2d(channels, 3 * groups * side * side, side, padding=side // 2)
        bound = (channels * side * side) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Map, cause: Map) -> Map:
        found = self.offset(cause)
        taps = found.shape[1] // 3
        offsets, weights = found.split((2 * taps, taps), dim=1)
        return deform_conv(x, offsets, weights.sigmoid(), self.weight, self.bias)


class Warp(nn.Module):
    """Warps a map as a guide and the warp of the level before suggest.

    Args:
        channels, guide: of the two maps.
        groups: of channels that move together.
        previous: channels of what the level before hands on; 0: there is none.
    """

    def __init__(self, channels: int, guide: int, groups: int, previous: int, norm_groups: int) -> None:
        super().__init__()
        self.compare = nn.Sequential(
            nn.Conv2d(channels + guide, channels, 1),
            nn.GroupNorm(norm_groups, channels, NORM_EPS),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            nn.GroupNorm(norm_groups, channels, NORM_EPS),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 1),
        )
        self.refine = nn.Sequential(
            nn.Conv2d(channels + previous, channels, 3, padding=1),
            nn.GroupNorm(norm_groups, channels, NORM_EPS),
            nn.SiLU(),
        )
        self.conv = DeformableConv(channels, groups)

    def forward(self, x: Map, guide: Map, previous: Map | None = None) -> tuple[Map, Map]:
        """The warped map, and what the next level's warp starts from.

        Args:
            previous: what the level before handed on, at this level's size.
        """
        cause = self.compare(torch.cat((guide, x), dim=1))
        if previous is not None:
            cause = torch.cat((cause, previous), dim=1)
        cause = self.refine(cause)
        return self.conv(x, cause), cause


class Adjustment(nn.Module):
    """Channel attention with the frozen decoder's map, then the warp; above the middle, joined with what was there.

    Args:
        heads: of the channel attention.
        join: whether the warped map is joined with the map, instead of taking its place.
    """

    def __init__(self, channels: int, heads: int, previous: int, norm_groups: int, join: bool) -> None:
        super().__init__()
        self.attention = ChannelAttention(channels, heads)
        self.warp = Warp(channels, channels, 4, previous, norm_groups)
        self.join = nn.Conv2d(2 * channels, channels, 1) if join else None

    def forward(self, h: Map, guide: Map, previous: Map | None = None) -> tuple[Map, Map]:
        """The adjusted map, and what the next level's adjustment starts from.

        Args:
            guide: the frozen decoder's map of the same size.
            previous: what the last adjustment handed on, at half this size.
        """
        if previous is not None:
            # Offsets are in pixels, of which there are twice as many now.
            previous = F.interpolate(previous, scale_factor=2, mode="bilinear", align_corners=False) * 2
        h, guide = self.attention(h, guide)
        warped, handed_on = self.warp(h, guide, previous)
        return (warped if self.join is None else self.join(torch.cat((h, warped), dim=1))), handed_on
