"""Binary spherical quantisation over scales: every token is a vector of bits, and no codebook is searched.

Han et al. 2024, "Infinity" (arXiv 2412.04431, section 3.2), after Zhao et al. 2024, "Binary Spherical Quantization"
(arXiv 2406.07548). Scale by scale, what is not yet explained is shrunk by area and each channel replaced by its sign,
at the length of a unit vector; the codes, enlarged linearly, are taken off the rest. What enters the transformer is the
sum so far, resized linearly to the next scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nextscale.core.quantizer import QuantizerOutput
from nextscale.core.schedule import ScaleSchedule


@dataclass(frozen=True)
class BitwiseQuantizerConfig:
    """Attributes:

    bits: per cell of the latent map; also its channels.
    patch: cells per token along each side: 2 where a tokenizer of stride 8 serves tokens of 16 pixels.
    commitment: weight of the squared distance between unit features and their codes, in training.
    entropy: weight of the entropy terms, in training: how undecided each bit is (which falls) less how evenly each bit
        takes its two values over the batch (which rises).
    diversity: weight of the latter within that.
    sharpness: of the soft assignment behind the entropies: a bit is 1 with probability
        sigmoid(4 sharpness u / sqrt(bits)) for a unit feature's channel u.
    """

    bits: int = 32
    patch: int = 1
    commitment: float = 0.25
    entropy: float = 0.1
    diversity: float = 1.0
    sharpness: float = 100.0

    def __post_init__(self) -> None:
        if self.bits < 1 or self.patch < 1:
            raise ValueError(f"a token needs bits and cells, got {self.bits} bits and a patch of {self.patch} cells")

    @property
    def token_bits(self) -> int:
        """Bits per token."""
        return self.bits * self.patch**2

    @property
    def vocabulary(self) -> int:
        """Values that bits take: two of each. Usage is counted over these."""
        return 2 * self.token_bits


class BitPyramid(nn.Module):
    """What pyramids of bits share, however a scale's codes are put in and taken out.

    A kind of pyramid says what enters at a scale and what a scale's codes add: ``begin``, ``contribution``,
    ``next_input`` (:class:`nextscale.core.sampling.ScalePyramid`).
    """

    begin: Callable[..., Tensor]
    contribution: Callable[..., Tensor]
    next_input: Callable[..., Tensor]

    def __init__(self, config: BitwiseQuantizerConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def input_channels(self) -> int:
        """Numbers per token of what enters the transformer."""
        return self.config.token_bits

    @property
    def vectors(self) -> Float[Tensor, "2 1"]:
        """What a bit stands for in a code, 0 and 1."""
        return torch.tensor([[-1.0], [1.0]]) / math.sqrt(self.config.bits)

    def codes(self, bits: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The numbers that bits stand for."""
        length = 1 / math.sqrt(self.config.bits)
        return bits.float().mul_(2 * length).sub_(length)

    def advance(self, total: Tensor, codes: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        """The sum after scale ``index``, given its codes."""
        added = self.contribution(codes, schedule, index)
        return added + total.to(added.device)

    # --- whole pyramids ----------------------------------------------------------------------------------

    def decode(self, tokens: Bool[Tensor, "batch length token_bits"], schedule: ScaleSchedule) -> list[Tensor]:
        """The sum after each scale, from the bits of all scales."""
        total = self.begin(len(tokens), schedule)
        totals = []
        for index, scale_tokens in enumerate(schedule.split(tokens)):
            total = self.advance(total, self.codes(scale_tokens), schedule, index)
            totals.append(total)
        return totals

    def inputs(self, totals: Sequence[Tensor], schedule: ScaleSchedule) -> Float[Tensor, "batch rest channels"]:
        """Teacher forcing: what enters at scales 1, 2, … in one sequence, from the sums of the scales before."""
        first = totals[0]
        parts = [first.new_zeros(len(first), 0, self.input_channels)]
        parts += [self.next_input(total, schedule, index + 1) for index, total in enumerate(totals[:-1])]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def teacher_inputs(
        self, tokens: Bool[Tensor, "batch length token_bits"], schedule: ScaleSchedule, scales: int | None = None
    ) -> Float[Tensor, "batch rest channels"]:
        """The inputs of scales 1, 2, … from the true bits.

        Args:
            scales: how many of the schedule's scales are in use; all by default.
        """
        total, totals = self.begin(len(tokens), schedule), []
        for index in range(len(schedule) if scales is None else scales):
            start, stop = schedule.ranges[index]
            total = self.advance(total, self.codes(tokens[:, start:stop]), schedule, index)
            totals.append(total)
        return self.inputs(totals, schedule)

    # --- training ----------------------------------------------------------------------------------------

    def snap(self, cells: Float[Tensor, "batch bits *places"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of one scale onto codes: unit features, their bits, their codes with the gradient of the unit
        features (straight-through), and the commitment and entropy terms."""
        cells = F.normalize(cells, dim=1)
        bits = cells > 0
        codes = self.codes(bits)
        terms = self.config.commitment * F.mse_loss(cells, codes) + self._entropy(cells)
        return cells, bits, cells + (codes - cells).detach(), terms

    def _entropy(self, cells: Float[Tensor, "batch bits *places"]) -> Float[Tensor, ""]:
        """Bits are independent under the soft assignment, so the entropy of a code is the sum of theirs."""
        scores = 4 * self.config.sharpness / math.sqrt(self.config.bits) * cells
        # By the scores, as the probabilities of decided bits are 0 or 1 in float32 and have no logarithm.
        size = scores.abs()
        undecided = (F.softplus(-size) + size * (-size).sigmoid()).sum(1).mean()
        ones = scores.sigmoid().transpose(0, 1).flatten(1).mean(1).clamp(1e-6, 1 - 1e-6)
        even = -(ones * ones.log() + (1 - ones) * (1 - ones).log()).sum()
        return self.config.entropy * (undecided - self.config.diversity * even)


class BitwiseQuantizer(BitPyramid):
    """Features <-> pyramid of bits. Has no weights; computes in float32 whatever the surrounding precision.

    Schedules are those of tokens; with a patch of p cells, maps of features have p times their sides. A token holds the
    bits of its p x p cells: bit c p^2 + p dy + dx is channel c of the cell at (dy, dx).
    """

    # --- maps and tokens ---------------------------------------------------------------------------------

    def grid(self, schedule: ScaleSchedule, index: int) -> tuple[int, int]:
        """(height, width) of scale ``index`` in cells."""
        height, width = schedule[index].grid
        return height * self.config.patch, width * self.config.patch

    def to_tokens(self, cells: Float[Tensor, "batch bits height width"]) -> Float[Tensor, "batch tokens token_bits"]:
        """A map as tokens in raster order."""
        return F.pixel_unshuffle(cells, self.config.patch).flatten(2).mT

    def to_cells(
        self, tokens: Float[Tensor, "batch tokens token_bits"], schedule: ScaleSchedule, index: int
    ) -> Float[Tensor, "batch bits height width"]:
        """The map of the tokens of scale ``index``."""
        return F.pixel_shuffle(tokens.mT.unflatten(-1, schedule[index].grid), self.config.patch)

    # --- single steps ------------------------------------------------------------------------------------

    def shrink(self, features: Tensor, schedule: ScaleSchedule, index: int, mode: str = "area") -> Tensor:
        """A map at the grid of scale ``index``: by area, or linearly as what enters the transformer is."""
        grid = self.grid(schedule, index)
        if tuple(features.shape[-2:]) == grid:
            return features
        return F.interpolate(features, size=grid, mode=mode)

    def begin(self, batch: int, schedule: ScaleSchedule) -> Tensor:
        """The sum of nothing: zeros (batch, bits, height, width) at the finest grid."""
        return torch.zeros(batch, self.config.bits, *self.grid(schedule, -1))

    def contribution(
        self, codes: Float[Tensor, "batch tokens token_bits"], schedule: ScaleSchedule, index: int
    ) -> Float[Tensor, "batch bits height width"]:
        """What the codes of scale ``index`` add to the sum: enlarged linearly."""
        return self.enlarge(self.to_cells(codes.float(), schedule, index), schedule)

    def enlarge(self, cells: Tensor, schedule: ScaleSchedule) -> Tensor:
        """A map at the finest grid."""
        return self.shrink(cells, schedule, -1, mode="bilinear")

    def next_input(
        self, total: Float[Tensor, "batch bits height width"], schedule: ScaleSchedule, index: int
    ) -> Float[Tensor, "batch tokens token_bits"]:
        """What enters the transformer at scale ``index``: the sum of all scales before it, on its grid."""
        return self.to_tokens(self.shrink(total, schedule, index, mode="bilinear"))

    # --- whole pyramids ----------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        features: Float[Tensor, "batch bits height width"],
        schedule: ScaleSchedule,
        scales: int | None = None,
        flips: Sequence[Tensor] = (),
    ) -> tuple[list[Bool[Tensor, "batch tokens token_bits"]], list[Tensor]]:
        """Bits of each scale, and the sum after each scale.

        Args:
            features: the encoder's output; its grid must be the schedule's finest, in cells.
            scales: stop after so many scales; all by default.
            flips: of the first scales, (batch, bits, height, width) each: bits that enter the sum turned over, so that
                later scales correct the mistake (section 3.4). The bits returned are those before their own scale's
                flips.

        Raises:
            ValueError: the grids differ.
        """
        if tuple(features.shape[-2:]) != self.grid(schedule, -1):
            raise ValueError(
                f"the features' grid is {tuple(features.shape[-2:])}, the schedule '{schedule}' ends at "
                f"{self.grid(schedule, -1)} cells: give a list whose last scale is the features' size"
            )
        rest = features.float()
        total = torch.zeros_like(rest)
        tokens, totals = [], []
        for index in range(len(schedule) if scales is None else scales):
            bits = self.shrink(rest, schedule, index) > 0
            tokens.append(self.to_tokens(bits))
            if index < len(flips):
                bits = bits ^ flips[index]
            added = self.enlarge(self.codes(bits), schedule)
            total, rest = total + added, rest - added
            totals.append(total)
        return tokens, totals

    def split_flips(
        self, flips: Bool[Tensor, "batch cells bits"], schedule: ScaleSchedule
    ) -> list[Bool[Tensor, "batch bits height width"]]:
        """Flips of all scales in one sequence, cells in raster order, as :meth:`encode` takes them."""
        grids = [self.grid(schedule, index) for index in range(len(schedule))]
        parts = flips.bool().split([height * width for height, width in grids], dim=1)
        return [part.mT.unflatten(-1, grid) for part, grid in zip(parts, grids, strict=True)]

    # --- training ----------------------------------------------------------------------------------------

    def forward(
        self, features: Tensor, schedule: ScaleSchedule, early: int | None = None
    ) -> tuple[QuantizerOutput, Tensor | None]:
        """The training pass: straight-through at every scale, with commitment and entropy terms, mean over scales.

        Args:
            early: give the sum after so many scales too.

        Returns:
            The output, whose tokens are numbers 2 k + v for bit k of value v, for counting; and the early sum.
        """
        early_total: Tensor | None = None
        with torch.autocast(features.device.type, enabled=False):
            rest = features.float()
            total, loss = torch.zeros_like(rest), rest.new_zeros(())
            tokens, rests = [], []
            for index in range(len(schedule)):
                cells, bits, codes, terms = self.snap(self.shrink(rest, schedule, index))
                loss = loss + terms
                added = self.enlarge(codes, schedule)
                total, rest = total + added, rest - added.detach()
                values = self.to_tokens(bits).long()
                tokens.append((values + 2 * torch.arange(values.shape[-1], device=values.device)).flatten(1))
                rests.append(cells.detach().movedim(1, -1).flatten(0, 2))
                if early == index + 1:
                    early_total = total
        return QuantizerOutput(total, loss / len(schedule), tokens, rests), early_total
