"""G3PT's pyramid: sets of binary tokens that grow, put in and taken out of a set of latents by queries.

Zhang et al. 2024, "G3PT" (arXiv 2409.06322, "cross-scale querying transformer"). What VAR does with pooling and
interpolation is done here by attention, as the latents have no grid: a scale's queries read what is not explained yet,
each answer becomes bits, and the latents' queries read the codes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nextscale.core.quantizer import Float32Module
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.shapes.g3pt_queries import QueryAttention
from nextscale.tasks.tokenizers.bitwise_quantizer import BitPyramid, BitwiseQuantizerConfig


@dataclass
class SetQuantizerOutput:
    """What the quantiser's training pass gives.

    Attributes:
        totals: the sum after each scale, with the gradient of the bits (straight-through).
        loss: commitment and entropy terms, mean over scales.
        tokens: bits of each scale.
    """

    totals: list[Float[Tensor, "batch latents width"]]
    loss: Float[Tensor, ""]
    tokens: list[Bool[Tensor, "batch tokens bits"]]


class CrossScaleQuantizer(Float32Module, BitPyramid):
    """Latents <-> pyramid of unordered tokens of bits. In float32 whatever the surrounding precision.

    One flipped bit would change all scales after it, so weights and arithmetic stay exact. Both attentions are shared
    by all scales; each scale has queries of its own, whose number is its number of tokens. Permuting a scale's queries
    permutes its tokens and changes nothing else.

    Attributes:
        queries: of all scales in one sequence: they read the latents, and tell the codes of a scale apart.
        latent_queries: what tells the latents apart; they read the codes.
        gain: how much each channel of a scale counts in the sum.
    """

    def __init__(
        self, config: BitwiseQuantizerConfig, width: int, heads: int, latents: int, schedule: ScaleSchedule
    ) -> None:
        super().__init__(config)
        self.width, self.schedule = width, schedule
        self.queries = nn.Parameter(torch.zeros(schedule.length, width))
        self.latent_queries = nn.Parameter(torch.zeros(latents, width))
        self.down, self.up = QueryAttention(width, heads), QueryAttention(width, heads)
        self.to_bits, self.from_codes = nn.Linear(width, config.bits), nn.Linear(config.bits, width)
        self.gain = nn.Parameter(torch.full((len(schedule), width), 1 / len(schedule)))

    @property
    def input_channels(self) -> int:
        return self.width

    @property
    def codebook(self) -> Float[Tensor, "vocabulary bits"]:
        """The code of every token number; bit i of a number is bit i of its token."""
        places = torch.arange(self.config.bits)
        return self.codes((torch.arange(2**self.config.bits)[:, None] >> places & 1).bool()).to(self.gain.device)

    def numbers(self, bits: Bool[Tensor, "*batch bits"]) -> Tensor:
        """Token numbers, the sum over i of 2^i [bit i]."""
        return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)

    def bits_of(self, numbers: Tensor) -> Bool[Tensor, "*batch bits"]:
        """Bits of token numbers."""
        return (numbers[..., None] >> torch.arange(self.config.bits, device=numbers.device) & 1).bool()

    # --- single steps ------------------------------------------------------------------------------------

    def begin(self, batch: int, schedule: ScaleSchedule) -> Float[Tensor, "batch latents width"]:
        """The sum of nothing: zeros."""
        return torch.zeros(batch, *self.latent_queries.shape, device=self.gain.device)

    def next_input(
        self, total: Float[Tensor, "batch latents width"], schedule: ScaleSchedule, index: int
    ) -> Float[Tensor, "batch tokens width"]:
        """What the queries of scale ``index`` read of latents: of their sum, what enters the transformer there."""
        start, stop = self.schedule.ranges[index]
        with torch.autocast(total.device.type, enabled=False):
            asked = self.queries[start:stop].expand(len(total), -1, -1)
            return self.down(asked, total.float() + self.latent_queries)

    def contribution(
        self, codes: Float[Tensor, "batch tokens bits"], schedule: ScaleSchedule, index: int
    ) -> Float[Tensor, "batch latents width"]:
        """What the codes of scale ``index`` add to the latents."""
        start, stop = self.schedule.ranges[index]
        with torch.autocast(codes.device.type, enabled=False):
            told = self.from_codes(codes.to(self.gain.device).float()) + self.queries[start:stop]
            return self.up(self.latent_queries.expand(len(codes), -1, -1), told) * self.gain[index]

    # --- whole pyramids ----------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        features: Float[Tensor, "batch latents width"],
        schedule: ScaleSchedule,
        scales: int | None = None,
        flips: Sequence[Bool[Tensor, "batch tokens bits"]] = (),
    ) -> tuple[list[Bool[Tensor, "batch tokens bits"]], list[Tensor]]:
        """Bits of each scale, and the sum after each scale.

        Args:
            scales: stop after so many scales; all by default.
            flips: of the first scales: bits that enter the sum turned over, so that later scales correct the mistake.
                The bits returned are those before their own scale's flips.
        """
        rest, total = features.float(), self.begin(len(features), schedule)
        tokens, totals = [], []
        for index in range(len(schedule) if scales is None else scales):
            bits = self.answers(rest, schedule, index) > 0
            tokens.append(bits)
            taken = bits ^ flips[index] if index < len(flips) else bits
            added = self.contribution(self.codes(taken), schedule, index)
            total, rest = total + added, rest - added
            totals.append(total)
        return tokens, totals

    def answers(self, rest: Tensor, schedule: ScaleSchedule, index: int) -> Float[Tensor, "batch tokens bits"]:
        """What the signs of are the bits of scale ``index``."""
        read = self.next_input(rest, schedule, index)
        with torch.autocast(read.device.type, enabled=False):
            return self.to_bits(read)

    def forward(self, features: Float[Tensor, "batch latents width"], schedule: ScaleSchedule) -> SetQuantizerOutput:
        """The training pass: straight-through at every scale."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            total, loss = torch.zeros_like(features), features.new_zeros(())
            totals, tokens = [], []
            for index in range(len(schedule)):
                answers = self.answers(features - total.detach(), schedule, index)
                _, bits, codes, terms = self.snap(answers.mT)
                total, loss = total + self.contribution(codes.mT, schedule, index), loss + terms
                totals.append(total)
                tokens.append(bits.mT)
        return SetQuantizerOutput(totals, loss / len(schedule), tokens)
