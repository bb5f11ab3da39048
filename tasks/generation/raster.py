"""Raster next-token prediction: the baseline that next-scale prediction is compared with.

One grid of tokens, each predicted from the class and the tokens before it, row by row (as in VQGAN, Esser et al. 2021,
arXiv 2012.09841, and LlamaGen, Sun et al. 2024, arXiv 2406.06525). It is a :class:`nextscale.tasks.generation.var.VAR`
whose scales are single cells: blocks, sampling loop, cache and files are the same, so that what differs between the two
is the order of prediction alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.attention import visibility_bias
from nextscale.core.quantizer import ResidualQuantizer
from nextscale.core.sampling import Branch, strength_of_each, weighed
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingTask
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

SYSTEM = "raster"


def raster_order(grid: ScaleSchedule) -> ScaleSchedule:
    """A scale for every cell of a one-scale list.

    Raises:
        ValueError: there are several scales.
    """
    if len(grid) != 1:
        raise ValueError(f"the tokenizer has the scales '{grid}'; raster order goes over a single one, such as '8'")
    return ScaleSchedule.squares(*[1] * grid.length)


class RasterPyramid:
    """A grid of codes that is filled cell by cell; what enters next is the code of the cell before."""

    def __init__(self, quantizer: ResidualQuantizer, grid: ScaleSchedule) -> None:
        self._quantizer, self._grid = quantizer, grid

    @property
    def vectors(self) -> Tensor:
        return self._quantizer.vectors

    def begin(self, batch: int, schedule: ScaleSchedule) -> Float[Tensor, "batch channels height width"]:
        return self._quantizer.begin(batch, self._grid)

    def advance(self, total: Tensor, codes: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        total = total.clone()
        total.flatten(2)[:, :, index] = codes[:, 0]
        return total

    def next_input(self, total: Tensor, schedule: ScaleSchedule, index: int) -> Float[Tensor, "batch 1 channels"]:
        return total.flatten(2)[:, :, index - 1 : index].mT


class Raster(VAR):
    """The transformer over one grid, token by token, together with the tokenizer.

    Args:
        config: its schedule is :func:`raster_order` of the tokenizer's.
        tokenizer: of one scale.
    """

    system: ClassVar[str] = SYSTEM
    tokenizer: ResidualVQ

    def __init__(self, config: VARConfig, tokenizer: ResidualVQ) -> None:
        if config.schedule != raster_order(tokenizer.config.schedule):
            raise ValueError(
                f"the schedule has {len(config.schedule)} scales, the tokenizer's grid {tokenizer.config.schedule} "
                f"{tokenizer.config.schedule.length} cells: give raster_order of it"
            )
        super().__init__(config, tokenizer)

    def make_places(self) -> None:
        width = self.config.transformer.width
        self.start_position = nn.Parameter(torch.empty(1, 1, width))
        self.position_embedding = nn.Parameter(torch.empty(1, self.config.schedule.length, width))

    def place(self, schedule: ScaleSchedule, start: int, stop: int) -> Float[Tensor, "1 positions width"]:
        return self.position_embedding[:, start:stop]

    def forward(
        self,
        inputs: Float[Tensor, "batch rest channels"],
        labels: Int[Tensor, " batch"],
        schedule: ScaleSchedule | None = None,
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of all tokens at once.

        Args:
            inputs: codes of all tokens but the last.
            labels: 0 to ``classes``; ``classes`` is "no class".
        """
        schedule = schedule or self.config.schedule
        x, condition = self.enter(inputs, labels, schedule)
        bias = visibility_bias(schedule.segments).to(x.device)  # a call per token would take longer
        x = self.transformer(x, self.transformer.modulate(condition), bias)
        return self.head(x, self.head.modulate(condition))

    def training_task(self) -> TrainingTask:
        from nextscale.tasks.generation.raster_training import RasterTraining

        return RasterTraining(self)

    def guided(self, labels: Int[Tensor, " batch"], strength: float | Sequence[float]) -> list[Branch]:
        """Guidance is as strong for all tokens, as in LlamaGen: none of them is coarser."""
        strengths = strength_of_each(strength, self.config.schedule)
        return weighed(labels, torch.full_like(labels, self.config.classes), strengths)

    @property
    def pyramid(self) -> RasterPyramid:
        return RasterPyramid(self.tokenizer.quantizer, self.tokenizer.config.schedule)

    def picture(self, total: Tensor) -> Float[Tensor, "batch 3 height width"]:
        return super().picture(self.tokenizer.quantizer.smooth(total, self.tokenizer.config.schedule, 0))

    @property
    def official_name(self) -> str:
        raise ValueError("raster is this library's baseline; there is no official layout to write it in")


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is such a model in an official layout: there is none."""
    return False
