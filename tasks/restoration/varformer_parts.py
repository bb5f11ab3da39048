"""The building blocks of VarFormer: latent enhancement, window attention, and how a prior enters a feature map.

Wang et al. 2025 (arXiv 2412.21063); official code siywang541/Varformer, ``AIEM.py``, ``RAC.py``, ``var_vqgan_arch.py``.
Feature maps are (batch, channels, height, width).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.attention import attend
from nextscale.core.autoencoder import NORM_EPS

Map = Float[Tensor, "batch channels height width"]

ANCHOR = 4
"""Side of the cells of which :class:`AnchorAttention` makes one anchor each."""


class ChannelNorm(nn.Module):
    """Layer norm over the channels of every position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Map) -> Map:
        return F.layer_norm(x.movedim(1, -1), (len(self.weight),), self.weight, self.bias, NORM_EPS).movedim(-1, 1)


def gate(x: Map) -> Map:
    """The product of the two halves of the channels."""
    first, second = x.chunk(2, dim=1)
    return first * second


class Curves(nn.Module):
    """Groups of channels, each brightened by curves that the other groups predict, then convolved.

    A group clamped to [0, 1] goes ``curves`` times through u + a u (1 - u), a in (0, 1) for every position.
    """

    def __init__(self, channels: int, groups: int, curves: int) -> None:
        super().__init__()
        share = round(channels / groups)
        self.sizes = [share] * (groups - 1) + [channels - share * (groups - 1)]
        self.curves = curves
        self.predict = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels - size, size, 5, padding=2),
                nn.ReLU(),
                nn.Conv2d(size, size, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(size, curves, 1),
                nn.Sigmoid(),
            )
            for size in self.sizes
        )
        self.convs = nn.ModuleList(nn.Conv2d(size, size, 3, padding=1) for size in self.sizes)

    def forward(self, x: Map) -> Map:
        groups, outputs = x.split(self.sizes, dim=1), []
        for i, (predict, conv) in enumerate(zip(self.predict, self.convs, strict=True)):
            u = F.relu(groups[i]) - F.relu(groups[i] - 1)
            for a in predict(torch.cat(groups[:i] + groups[i + 1 :], dim=1)).split(1, dim=1):
                u = u + a * u * (1 - u)
            outputs.append(conv(u))
        return torch.cat(outputs, dim=1)


class LatentBlock(nn.Module):
    """Enhances a degraded image's latent before it is quantised: two gated branches, each starting at zero.

    Args:
        groups, curves: of :class:`Curves`.
        expansion: inner width of both branches in units of ``channels``, an even number.
    """

    def __init__(self, channels: int, groups: int = 4, curves: int = 3, expansion: tuple[int, int] = (2, 2)) -> None:
        super().__init__()
        first, second = (channels * times for times in expansion)
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, first, 1)
        self.conv2 = nn.Conv2d(first, first, 3, padding=1, groups=first)
        self.pooled = nn.Conv2d(first, first // 2, 1)
        self.near = nn.Conv2d(first, first, 5, padding=2, groups=first)
        self.far = nn.Conv2d(first, first, 7, padding=9, dilation=3, groups=first)
        self.large = nn.Conv2d(first, first // 2, 1)
        self.conv3 = nn.Conv2d(first // 2, channels, 1)
        self.conv4 = nn.Conv2d(channels, second, 1)
        self.curves = Curves(second // 2, groups, curves)
        self.conv5 = nn.Conv2d(second // 2, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Map) -> Map:
        h = self.conv2(self.conv1(self.norm1(x)))
        h = self.pooled(h.mean((2, 3), keepdim=True)) * self.large(self.far(self.near(h))) * gate(h)
        y = x + self.beta * self.conv3(h)
        return y + self.gamma * self.conv5(self.curves(gate(self.conv4(self.norm2(y)))))


# --- attention in windows -----------------------------------------------------------------------------


@lru_cache(maxsize=16)
def relative_positions(window: int) -> Tensor:
    """int64 (window^2, window^2): the row of the bias table for each pair of positions in a window."""
    with torch.inference_mode(False):
        ys, xs = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
        down, right = (axis[:, None] - axis + window - 1 for axis in (ys, xs))
        return down * (2 * window - 1) + right


@lru_cache(maxsize=64)
def shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """float32 (windows, window^2, window^2): -100 between positions that only the cyclic shift brought together."""
    with torch.inference_mode(False):

        def region(side: int) -> Tensor:
            place = torch.arange(side)
            return (place >= side - window).long() + (place >= side - shift)

        regions = region(height)[:, None] * 3 + region(width)
        rows = regions.view(height // window, window, width // window, window).transpose(1, 2).reshape(-1, window**2)
        return (rows[:, None] != rows[:, :, None]).float() * -100.0


class WindowBlock(nn.Module):
    """Self-attention within windows and a feed-forward network, both after a layer norm (Liu et al. 2021, Swin).

    Args:
        side: shorter side of the map that it is made for; where that is no longer than the window, the window becomes
            the map and nothing is shifted.
        shifted: windows lie half a window further down and right, cyclically.
    """

    def __init__(self, width: int, heads: int, window: int, side: int, shifted: bool, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.window, self.heads = min(window, side), heads
        self.shift = window // 2 if shifted and side > window else 0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.bias_table = nn.Parameter(torch.empty((2 * self.window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = int(width * mlp_ratio)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Tensor:
        x = x + self._attend(self.norm1(x))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))

    def _attend(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        window, shift = self.window, self.shift
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        grid = (batch, height // window, window, width // window, window)
        rows = x.view(*grid, channels).transpose(2, 3).reshape(-1, window**2, channels)
        q, k, v = self.qkv(rows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias_table[relative_positions(window).to(x.device)].permute(2, 0, 1)
        scores = torch.matmul(q * (channels // self.heads) ** -0.5, k.mT) + bias
        if shift:
            mask = shift_mask(height, width, window, shift).to(scores)
            scores = (scores.unflatten(0, (batch, -1)) + mask[:, None]).flatten(0, 1)
        out = self.projection(torch.matmul(scores.softmax(-1), v).transpose(1, 2).flatten(2))
        out = out.view(batch, grid[1], grid[3], window, window, channels).transpose(2, 3).reshape(x.shape)
        return out.roll((shift, shift), (1, 2)) if shift else out


class WindowGroup(nn.Module):
    """Window blocks, every second one shifted, and a convolution, around which the input is added.

    Args:
        side: as of :class:`WindowBlock`.
        unused: hold the convolution of published files that has no inputs, and is never run.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        side: int,
        *,
        depth: int = 2,
        window: int = 4,
        mlp_ratio: float = 4.0,
        unused: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"window attention of width {width} does not divide into {heads} heads")
        self.blocks = nn.Sequential(
            *(WindowBlock(width, heads, window, side, i % 2 == 1, mlp_ratio) for i in range(depth))
        )
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.patch = nn.ParameterDict()
        if unused:
            self.patch["weight"] = nn.Parameter(torch.zeros(width, 0, 4, 4))
            self.patch["bias"] = nn.Parameter(torch.zeros(width))

    def forward(self, x: Map) -> Map:
        return self.conv(self.blocks(x.movedim(1, -1)).movedim(-1, 1)) + x


def window_groups(
    width: int, heads: int, side: int, *, groups: int = 2, depth: int = 2, window: int = 4, unused: bool = False
) -> nn.Sequential:
    """Window groups, one after the other; the arguments are :class:`WindowGroup`'s."""
    sizes = {"depth": depth, "window": window}
    return nn.Sequential(*(WindowGroup(width, heads, side, **sizes, unused=unused) for _ in range(groups)))


# --- how a prior enters -------------------------------------------------------------------------------


class Selector(nn.Module):
    """Weighs the prior's scales by what a feature map shows, and brings their mixture to the map's size.

    Args:
        guide, width: channels of the map and of what is returned.
        scales, codes: of the prior.
        factor: how often larger the map is than the prior.
        windows: of :func:`window_groups`.
        weigh_first: weigh before the instance norm, as published, which all but undoes the weights: it brings every
            channel back to variance 1. False: after it.
    """

    def __init__(
        self,
        guide: int,
        width: int,
        scales: int,
        codes: int,
        factor: int,
        heads: int,
        side: int,
        *,
        weigh_first: bool = False,
        **windows: Any,
    ) -> None:
        super().__init__()
        self.groups = window_groups(guide, heads, side, **windows)
        self.conv1x1 = nn.Conv2d(guide, scales, 1)
        self.conv_out = nn.Conv2d(scales * codes, width, 1)
        self.factor, self.weigh_first = factor, weigh_first
        self.upsample = nn.Conv2d(width, width, 3, padding=1) if factor > 1 else None

    def forward(self, x: Map, prior: Float[Tensor, "batch scales codes h w"]) -> Map:
        weights = self.conv1x1(self.groups(x)).mean((2, 3)).softmax(1)[..., None, None, None]
        if self.weigh_first:
            mixture = _instance_norm((weights * prior).flatten(1, 2))
        else:
            # By the number of scales, so that equal weights leave the normalised prior as it is.
            mixture = (weights * weights.shape[1] * _instance_norm(prior)).flatten(1, 2)
        out = self.conv_out(mixture)
        if self.upsample is not None:
            out = self.upsample(F.interpolate(out, scale_factor=self.factor, mode="nearest"))
        return cast(Tensor, out)


def _instance_norm(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last two axes."""
    variance, mean = torch.var_mean(x, (-2, -1), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5)


class Mixer(nn.Module):
    """m h + (1 - m) prior, m for every position by window attention over both (:func:`window_groups`)."""

    def __init__(self, width: int, heads: int, side: int, **windows: Any) -> None:
        super().__init__()
        self.groups = window_groups(2 * width, heads, side, **windows)
        self.conv1x1 = nn.Conv2d(2 * width, 2, 1)

    def logits(self, h: Map, prior: Map) -> Float[Tensor, "batch 2 height width"]:
        """Of h and of the prior, before the softmax."""
        return cast(Tensor, self.conv1x1(self.groups(torch.cat((h, prior), dim=1))))

    def forward(self, h: Map, prior: Map) -> Map:
        own, other = self.logits(h, prior).softmax(1).split(1, dim=1)
        return own * h + other * prior


class AnchorAttention(nn.Module):
    """h + attention to the prior through anchors: queries of h, anchors of both, keys and values of the prior.

    Anchors are cells of 4 x 4, so that no score is taken between all pairs of positions.
    """

    def __init__(self, width: int, prior_width: int, norm_groups: int) -> None:
        super().__init__()
        self.norm_q, self.q = nn.GroupNorm(norm_groups, width, NORM_EPS), nn.Conv2d(width, width, 1)
        self.norm_kv = nn.GroupNorm(norm_groups, prior_width, NORM_EPS)
        self.kv = nn.Conv2d(prior_width, 2 * width, 1)
        self.norm_a = nn.GroupNorm(norm_groups, width + prior_width, NORM_EPS)
        self.a = nn.Conv2d(width + prior_width, width, ANCHOR, stride=ANCHOR)
        self.projection = nn.Conv2d(width, width, 1)

    def forward(self, h: Map, prior: Map) -> Map:
        query = _one_head(self.q(self.norm_q(h)))
        key, value = (_one_head(part) for part in self.kv(self.norm_kv(prior)).chunk(2, dim=1))
        anchors = _one_head(self.a(self.norm_a(torch.cat((h, prior), dim=1))))
        scale = 1 / math.sqrt(h.shape[1])
        gathered = attend(anchors, key, value, scale)
        out = attend(query, anchors, gathered, scale)
        return h + self.projection(out.squeeze(2).mT.unflatten(-1, h.shape[-2:]))


def _one_head(x: Map) -> Float[Tensor, "batch positions 1 channels"]:
    return x.flatten(2).mT.unsqueeze(2)
