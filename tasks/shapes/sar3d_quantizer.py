"""Three maps of an object as one pyramid of tokens: the scales of all planes are quantised with one codebook.

SAR3D (Chen et al. 2024, arXiv 2411.16856), whose published tokenizer searches by angle. Maps of planes are stacked with
the plane fastest: row 3 b + p is plane p of object b. The tokens of a scale are those of planes 0, 1 and 2.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.quantizer import QuantizerConfig, QuantizerOutput, ResidualQuantizer
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.shapes.sar3d_planes import PLANES

Insertion = Literal["unit", "raw", "mixed"]
"""Which vector stands for a token: the code at length 1, as it is, or at length 1 but for the last scale."""


class TriplaneQuantizer(ResidualQuantizer):
    """Features of planes <-> token pyramid.

    Args:
        published: encode with codes as they are, train with them at length 1 but for the last scale, and decode and
            sample with them at length 1, as the official code does; else at length 1 throughout, so that the residual
            that was encoded is the one that is decoded.

    Attributes:
        insertion: of the tokens that are looked up.
    """

    def __init__(self, config: QuantizerConfig, published: bool = False) -> None:
        super().__init__(config)
        self.published = published
        self.insertion: Insertion = "unit"
        with torch.no_grad():  # codes begin on the unit sphere
            self.codebook.weight.copy_(F.normalize(self.codebook.weight, dim=-1))

    def inserting(self, insertion: Insertion) -> TriplaneQuantizer:
        """The same quantiser, weights shared, with other vectors for its tokens."""
        other = copy.copy(self)
        other.insertion = insertion
        return other

    @property
    def vectors(self) -> Float[Tensor, "vocabulary channels"]:
        """What symbols stand for, float32."""
        codes = self.codebook.weight.float()
        return F.normalize(codes, dim=-1) if self.insertion == "unit" else codes

    def begin(self, batch: int, schedule: ScaleSchedule, like: Tensor | None = None) -> Tensor:
        """The sum of nothing, for the planes of ``batch`` objects."""
        return super().begin(batch * PLANES, schedule, like)

    def contribution(
        self, codes: Float[Tensor, "batch tokens channels"], schedule: ScaleSchedule, index: int
    ) -> Float[Tensor, "planes channels height width"]:
        """What the codes of a scale add to the sum of every plane."""
        if self.insertion == "mixed" and index < len(schedule) - 1:
            codes = F.normalize(codes, dim=-1)
        height, width = schedule[index].grid
        return super().contribution(codes.reshape(-1, height * width, codes.shape[-1]), schedule, index)

    def next_input(
        self, total: Float[Tensor, "planes channels height width"], schedule: ScaleSchedule, index: int
    ) -> Float[Tensor, "batch tokens channels"]:
        """What enters the transformer at scale ``index``, plane after plane."""
        return super().next_input(total, schedule, index).unflatten(0, (-1, PLANES)).flatten(1, 2)

    @torch.no_grad()
    def encode(
        self,
        features: Float[Tensor, "planes channels height width"],
        schedule: ScaleSchedule,
        scales: int | None = None,
    ) -> tuple[list[Int[Tensor, "batch tokens"]], list[Tensor]]:
        """Tokens of each scale, and the sum after each scale."""
        with_codes = self.inserting("raw" if self.published else "unit")
        tokens, totals = ResidualQuantizer.encode(with_codes, features, schedule, scales)
        return [each.unflatten(0, (-1, PLANES)).flatten(1) for each in tokens], totals

    def forward(self, features: Tensor, schedule: ScaleSchedule) -> QuantizerOutput:
        """The training pass; see :meth:`nextscale.core.quantizer.ResidualQuantizer.forward`."""
        with_codes = self.inserting("mixed" if self.published else "unit")
        output = ResidualQuantizer.forward(with_codes, features, schedule)
        output.tokens = [each.unflatten(0, (-1, PLANES)).flatten(1) for each in output.tokens]
        return output
