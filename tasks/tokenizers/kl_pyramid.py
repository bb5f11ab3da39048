"""A latent map as a pyramid of continuous values: every scale is the whole map, averaged.

FlowAR's scales (Ren et al. 2024, arXiv 2412.15205, section 3.2; official code OliverRensu/FlowAR). A token is the
channels of one cell; nothing is quantised and nothing is left over, so no scale is taken off another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.schedule import ScaleSchedule


class LatentPyramid(nn.Module):
    """Latent map <-> latents of every scale; what enters the next scale is the last one, resized. It has no weights.

    Args:
        channels: numbers per cell, and so per token.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    # --- single steps ------------------------------------------------------------------------------------

    def begin(self, batch: int, schedule: ScaleSchedule) -> Tensor:
        """Nothing: zeros (batch, channels, height, width) on the first grid."""
        return torch.zeros(batch, self.channels, *schedule[0].grid)

    def advance(self, total: Tensor, codes: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        """The map of scale ``index``, (batch, channels, height, width): it takes the place of the one before."""
        return codes.float().mT.unflatten(-1, schedule[index].grid)

    def next_input(
        self, total: Float[Tensor, "batch channels height width"], schedule: ScaleSchedule, index: int
    ) -> Float[Tensor, "batch tokens channels"]:
        """What enters the transformer at scale ``index``: the map before it, enlarged, then averaged to its grid."""
        return F.interpolate(self.enlarged(total, schedule), size=schedule[index].grid, mode="area").flatten(2).mT

    def enlarged(self, total: Tensor, schedule: ScaleSchedule) -> Float[Tensor, "batch channels height width"]:
        """A scale's map on the finest grid, bicubically."""
        return F.interpolate(total, size=schedule.final.grid, mode="bicubic")

    # --- whole pyramids ----------------------------------------------------------------------------------

    def encode(
        self, features: Float[Tensor, "batch channels height width"], schedule: ScaleSchedule, scales: int | None = None
    ) -> tuple[list[Float[Tensor, "batch tokens channels"]], list[Tensor]]:
        """Latents of each scale, and the same as maps.

        Args:
            features: the latent map; its grid must be the schedule's finest.
            scales: stop after so many scales; all by default.

        Raises:
            ValueError: the grids differ.
        """
        if tuple(features.shape[-2:]) != schedule.final.grid:
            raise ValueError(
                f"the latent's grid is {tuple(features.shape[-2:])}, the schedule '{schedule}' ends at "
                f"{schedule.final.grid}: give a list whose last scale is the latent's size"
            )
        chosen = schedule.scales[:scales]
        maps = [F.interpolate(features.float(), size=scale.grid, mode="area") for scale in chosen]
        return [each.flatten(2).mT for each in maps], maps

    def decode(self, latents: Float[Tensor, "batch length channels"], schedule: ScaleSchedule) -> list[Tensor]:
        """The maps of all scales, (batch, channels, height, width) each on the finest grid."""
        return [self.enlarged(each, schedule) for each in self.maps(latents, schedule)]

    def maps(self, latents: Float[Tensor, "batch length channels"], schedule: ScaleSchedule) -> list[Tensor]:
        """The same at their own sizes."""
        parts = zip(schedule.split(latents), schedule.scales, strict=True)
        return [part.float().mT.unflatten(-1, scale.grid) for part, scale in parts]

    def teacher_inputs(
        self, latents: Float[Tensor, "batch length channels"], schedule: ScaleSchedule
    ) -> Float[Tensor, "batch rest channels"]:
        """Teacher forcing: the inputs of scales 1, 2, … from the true latents, in one sequence.

        Args:
            latents: of all scales.
        """
        maps = self.maps(latents, schedule)[:-1]
        inputs = [self.next_input(each, schedule, index + 1) for index, each in enumerate(maps)]
        return torch.cat([latents.new_zeros(len(latents), 0, self.channels), *inputs], dim=1)
