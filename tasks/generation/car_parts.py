"""What CAR adds to a VAR: the control encoder, its maps, and the skips into the base's second half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class ControlEncoder(nn.Module):
    """Control picture -> one vector per token; the same for all scales.

    A convolution to the first width; for each further width one that keeps the size and one that halves it; a last
    one to the base's width. All 3 x 3, SiLU between them.
    """

    def __init__(self, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for old, new in pairwise(widths):
            self.blocks.append(nn.Conv2d(old, old, 3, padding=1))
            self.blocks.append(nn.Conv2d(old, new, 3, stride=2, padding=1))
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, picture: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch width tokens_h tokens_w"]:
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class Skip(nn.Module):
    """What enters a block of the base's second half: Linear(LN([x, control])), without a residual around it."""

    def __init__(self, width: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * width, eps=norm_eps)
        self.linear = nn.Linear(2 * width, width)

    def joined(self, x: Tensor, control: Tensor) -> Float[Tensor, "batch positions 2*width"]:
        """Both streams, normalised together in float32."""
        both = torch.cat((x, control.to(x.dtype)), dim=-1).float()
        weight, bias = self.norm.weight.float(), self.norm.bias.float()
        return F.layer_norm(both, self.norm.normalized_shape, weight, bias, self.norm.eps)

    def forward(self, x: Tensor, control: Tensor, strength: float = 1.0) -> Float[Tensor, "batch positions width"]:
        """Args:

        strength: 1: as published; below, the base's own stream is mixed in.
        """
        controlled = self.linear(self.joined(x, control).to(x.dtype)).to(x.dtype)
        return controlled if strength == 1 else torch.lerp(x, controlled, strength)


@dataclass(frozen=True)
class ControlFeatures:
    """The control encoder's maps of every scale, of distinct control pictures.

    Attributes:
        maps: one per scale, (distinct, width, height, width).
        rows: which of them each image takes; a single one serves all images.
    """

    maps: tuple[Float[Tensor, "distinct width height width"], ...]
    rows: Int[Tensor, " batch"]

    def at(self, index: int, rows: int) -> Float[Tensor, "rows width height width"]:
        """The maps of scale ``index``, one per image; where there are more rows, for every branch in turn.

        Raises:
            ValueError: there is another number of images.
        """
        if len(self.rows) == 1:
            return self.maps[index].expand(rows, -1, -1, -1)
        if rows % len(self.rows):
            raise ValueError(f"{len(self.rows)} control pictures were given for {rows} images; give one each, or one")
        return self.maps[index][self.rows].repeat(rows // len(self.rows), 1, 1, 1)
