"""From pictures of an object, seen from several sides with depth and rays, to one map of features.

The encoder of SAR3D's tokenizer (Chen et al. 2024, arXiv 2411.16856): a convolutional encoder per view, attention
between views where they are smallest, and a convolution over all of them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.attention import attend
from nextscale.core.autoencoder import NORM_EPS, AutoencoderConfig, Encoder

CHANNELS = 10
"""Of one view: red, green, blue, six of the rays, depth."""

COLOUR_MEAN, COLOUR_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""By which colours in [0, 1] are normalised."""


@dataclass(frozen=True)
class ViewsConfig:
    """Attributes:

    count: views of one object.
    heads, head_size: of the attention between them.
    depth: blocks of that attention.
    """

    count: int = 6
    heads: int = 8
    head_size: int = 64
    depth: int = 1


def encoder_input(
    colours: Float[Tensor, "views 3 height width"],
    rays: Float[Tensor, "views 6 height width"],
    depth: Float[Tensor, "views 1 height width"],
) -> Float[Tensor, "views 10 height width"]:
    """What the encoder reads.

    Args:
        colours: in [0, 1].
        rays: of :func:`nextscale.tasks.shapes.sar3d_rendering.pluecker`.
        depth: in the units of the scene, 0 for the background.
    """
    mean, deviation = (colours.new_tensor(part)[:, None, None] for part in (COLOUR_MEAN, COLOUR_DEVIATION))
    return torch.cat(((colours - mean) / deviation, rays, depth), dim=1)


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values have no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.projection(attend(q, k, v, q.shape[-1] ** -0.5).flatten(2))


class ViewBlock(nn.Module):
    """Attention over the tokens of all views, attention within each view, and a gated feed-forward network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.across = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.within = nn.LayerNorm(width), Attention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.expand, self.contract = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "views tokens width"], count: int) -> Float[Tensor, "views tokens width"]:
        """``count``: views of one object, which follow each other."""
        together = x.reshape(-1, count * x.shape[1], x.shape[2])
        x = (together + self.across(self.norm1(together))).view_as(x)
        x = x + self.within(self.norm2(x))
        value, gate = self.expand(self.norm3(x)).chunk(2, dim=-1)
        return x + self.contract(value * F.gelu(gate))


class ViewAttention(nn.Module):
    """Blocks over the cells of all views of an object, plus the input."""

    def __init__(self, channels: int, groups: int, config: ViewsConfig) -> None:
        super().__init__()
        width, self.count = config.heads * config.head_size, config.count
        self.norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.enter = nn.Conv2d(channels, width, 1)
        self.blocks = nn.ModuleList(ViewBlock(width, config.heads) for _ in range(config.depth))
        self.leave = nn.Conv2d(width, channels, 1)
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Float[Tensor, "views channels height width"]) -> Float[Tensor, "views channels height width"]:
        tokens = self.enter(self.norm(x)).flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens, self.count)
        return x + self.leave(tokens.mT.unflatten(2, x.shape[2:]))


class ViewEncoder(Encoder):
    """Views -> one latent map per object."""

    def __init__(self, config: AutoencoderConfig, views: ViewsConfig) -> None:
        super().__init__(config)
        self.views = views
        channels, latent = config.channels * config.multipliers[-1], config.latent_channels
        attention = ViewAttention(channels, config.norm_groups, views)
        block1, block2 = self.middle[0], self.middle[-1]
        self.middle = nn.Sequential(OrderedDict(block1=block1, attention=attention, block2=block2))
        self.fusion = nn.Conv2d(views.count * latent, latent, 3, padding=1)

    def forward(self, image: Float[Tensor, "views channels height width"]) -> Float[Tensor, "objects latent h w"]:
        """Encode.

        Args:
            image: the views of every object follow each other.

        Raises:
            ValueError: the views are not those of whole objects.
        """
        if len(image) % self.views.count:
            raise ValueError(f"{len(image)} views are not {self.views.count} of each object")
        maps = super().forward(image)
        return self.fusion(maps.unflatten(0, (-1, self.views.count)).flatten(1, 2))
