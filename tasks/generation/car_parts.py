"""What CAR adds to a VAR: its sizes, the control encoder, its maps, and the skips into the base's second half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.controls import Extraction
from nextscale.tasks.generation.var import VARConfig


@dataclass(frozen=True)
class CARConfig:
    """Attributes:

    base: configuration of the frozen model that the adapter belongs to.
    widths: of the control encoder, from full resolution down; each step halves the resolution, and the last must
        reach the base's tokens.
    extraction: how the control pictures are made of photographs; None: not known.
    label_drop: probability that a label is replaced by "no class" in training; the control never is.
    guidance: strength to sample with where none is asked for; it is on the class, not on the control.
    """

    base: VARConfig
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    extraction: Extraction | None = None
    label_drop: float = 0.1
    guidance: float = 4.0

    def __post_init__(self) -> None:
        if self.base.transformer.depth % 2:
            raise ValueError(
                f"the base has {self.base.transformer.depth} blocks; CAR needs an even number, since one control block "
                "answers for two of them"
            )
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths are {self.widths}; the control encoder needs at least one, all positive")

    @property
    def control_type(self) -> str | None:
        """What the control shows, such as ``"canny"``."""
        return self.extraction.kind if self.extraction is not None else None

    @property
    def classes(self) -> int:
        return self.base.classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.base.class_names

    @property
    def schedule(self) -> ScaleSchedule:
        return self.base.schedule

    @property
    def vocabulary(self) -> int:
        return self.base.vocabulary


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


NORM_EPS = 1e-6
"""Of the skips' norms, whatever the blocks have."""


class Skip(nn.Module):
    """What enters a block of the base's second half: Linear(LN([x, control])), without a residual around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * width, eps=NORM_EPS)
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
    """The control encoder's maps of every scale.

    Attributes:
        maps: one per scale, (pictures, width, height, width); one picture serves all images.
        rows: which picture each image takes; None: the images have one each, in order.
    """

    maps: Sequence[Float[Tensor, "pictures width height width"]]
    rows: Int[Tensor, " batch"] | None = None

    def at(self, index: int, rows: int) -> Float[Tensor, "rows width height width"]:
        """The maps of scale ``index``, one per image; where there are more rows, for every branch in turn.

        Raises:
            ValueError: there is another number of images.
        """
        maps = self.maps[index] if self.rows is None else self.maps[index][self.rows]
        if rows % len(maps):
            raise ValueError(f"{len(maps)} control pictures were given for {rows} images; give one each, or one")
        return maps.repeat(rows // len(maps), 1, 1, 1)


def distinct(pictures: Float[Tensor, "pictures 3 height width"]) -> tuple[list[int], list[int]]:
    """Places of the pictures that differ, and for every picture the place among those of its equal."""
    seen: dict[bytes, int] = {}
    kept: list[int] = []
    rows = []
    for number, picture in enumerate(pictures.detach().cpu().float()):
        key = picture.contiguous().numpy().tobytes()
        if key not in seen:
            seen[key] = len(kept)
            kept.append(number)
        rows.append(seen[key])
    return kept, rows
