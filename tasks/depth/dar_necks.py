"""From the feature pyramid of an image backbone to what DAR's decoder reads: one map of tokens, and one fine map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

GROUPS = 16


class Gather(nn.Module):
    """Three maps, each half the size of the one before, joined at the size of the last.

    Args:
        widths: channels of the maps, fine to coarse.
        outputs: channels of what comes out.
    """

    def __init__(self, widths: tuple[int, int, int], outputs: int) -> None:
        super().__init__()
        fine, middle, _ = widths
        self.fine = nn.Sequential(
            nn.Conv2d(fine, fine, 3, stride=2, padding=1),
            nn.GroupNorm(GROUPS, fine),
            nn.ReLU(),
            nn.Conv2d(fine, fine, 3, stride=2, padding=1),
        )
        self.middle = nn.Conv2d(middle, middle, 3, stride=2, padding=1)
        self.join = nn.Sequential(nn.Conv2d(sum(widths), outputs, 1), nn.GroupNorm(GROUPS, outputs), nn.ReLU())

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor, coarsest: Tensor) -> Tensor:
        """Maps, fine to coarse; the last is enlarged to the size of the one before it, which it is joined with."""
        coarse = torch.cat((coarse, F.interpolate(coarsest, scale_factor=2.0, mode="nearest")), dim=1)
        joined: Tensor = self.join(torch.cat((self.fine(fine), self.middle(middle), coarse), dim=1))
        return joined


class ResidualUnit(nn.Module):
    """ReLU, conv, ReLU, conv, plus the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(F.relu(x)))) + x


class Fusion(nn.Module):
    """A coarser path, brought to this level's size and joined with the level (Ranftl et al. 2021, DPT)."""

    def __init__(self, width: int, joins: bool) -> None:
        super().__init__()
        self.unit1 = ResidualUnit(width) if joins else None
        self.unit2 = ResidualUnit(width)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, path: Tensor, level: Tensor | None = None, size: Sequence[int] | None = None) -> Tensor:
        if size is not None and tuple(path.shape[-2:]) != tuple(size):
            path = F.interpolate(path, size=tuple(size), mode="bilinear", align_corners=True)
        if level is not None and self.unit1 is not None:
            path = path + self.unit1(level)
        projected: Tensor = self.project(self.unit2(path))
        return projected


class PatchPyramid(nn.Module):
    """Four maps of patch tokens -> a pyramid, fused from coarse to fine (DPT's neck, as in Depth Anything).

    Args:
        inputs: channels of the tokens.
        level_widths: of the four levels, fine to coarse: 4, 2, 1 and 1/2 times the grid of patches.
        width: of the pyramid.
        outputs: channels of the joined tokens.
        unread_layers: carry the layers of the published files that nothing reads.
    """

    def __init__(
        self, inputs: int, level_widths: Sequence[int], width: int, outputs: int, unread_layers: bool = False
    ) -> None:
        super().__init__()
        first, second, _, fourth = level_widths
        self.project = nn.ModuleList(nn.Conv2d(inputs, level, 1) for level in level_widths)
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, 4, stride=4),
                nn.ConvTranspose2d(second, second, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(fourth, fourth, 3, stride=2, padding=1),
            ]
        )
        self.even = nn.ModuleList(nn.Conv2d(level, width, 3, padding=1, bias=False) for level in level_widths)
        self.fuse = nn.ModuleList(Fusion(width, joins=index < 3) for index in range(4))
        self.gather = Gather((width, width, 2 * width), outputs)
        self.unread: nn.ModuleDict | None = None
        if unread_layers:
            self.unread = nn.ModuleDict(
                {
                    "unit": ResidualUnit(width),
                    "head1": nn.Conv2d(width, width // 2, 3, padding=1),
                    "head2": nn.Sequential(
                        nn.Conv2d(width // 2, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 1, 1), nn.ReLU()
                    ),
                }
            ).requires_grad_(False)

    def forward(
        self, maps: Sequence[Float[Tensor, "batch channels rows columns"]]
    ) -> tuple[Float[Tensor, "batch outputs rows columns"], Float[Tensor, "batch width fine_rows fine_columns"]]:
        """The joined tokens on the grid of patches, and the finest level before it is fused.

        Args:
            maps: of the last four blocks of the backbone, in their order; sides must be even.
        """
        levels = [
            even(resize(project(tokens)))
            for even, resize, project, tokens in zip(self.even, self.resize, self.project, maps, strict=True)
        ]
        paths = [self.fuse[3](levels[3])]
        for index in (2, 1, 0):
            # The coarser path was brought to its own level's size before; it is enlarged as it meets this one.
            paths.append(self.fuse[index](paths[-1], levels[index], levels[index].shape[-2:]))
        memory: Tensor = self.gather(*reversed(paths))
        return memory, levels[0]
