"""What a VARGPT's decoder is conditioned on: two constants, so all that depends on them is computed once for ever."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from nextscale.tasks.generation.vargpt import VARGPT

CONDITIONAL, DROPPED = 0, 1
"""The two conditions that a decoder knows: its label, and the label's absence."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """All that depends on the two conditions alone, of each.

    Attributes:
        starts: what stands at the first token.
        blocks: modulation of every block.
        head: modulation of the head.
    """

    starts: Float[Tensor, "rows width"]
    blocks: Float[Tensor, "depth rows 6 width"]
    head: Float[Tensor, "rows 2 width"]

    def of(self, rows: Int[Tensor, " batch"]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Starts, modulations of the blocks and of the head, of each row of a batch."""
        return self.starts[rows], [block[rows][:, None] for block in self.blocks.unbind()], self.head[rows][:, None]


def put_constants(model: VARGPT, found: Conditions | None) -> None:
    """Put constants, without values where none are given, in the place of the maps that they come from."""
    decoder: Any = model.decoder
    sizes = model.config.decoder.transformer
    shapes = ((2, sizes.width), (sizes.depth, 2, 6, sizes.width), (2, 2, sizes.width))
    values = [torch.empty(s) for s in shapes] if found is None else [found.starts, found.blocks, found.head]
    for name, value in zip(("starts", "blocks", "head"), values, strict=True):
        model.register_parameter(f"folded_{name}", nn.Parameter(value.clone(), requires_grad=False))
    decoder.transformer.shared_modulation = None
    for block in decoder.transformer.blocks:
        block.modulation = None
        if hasattr(block, "modulation_offset"):
            del block.modulation_offset
    for name in ["class_embedding"] if model.config.var is not None else ["pool", "text_norm", "memory"]:
        setattr(decoder, name, None)
    decoder.head.modulation = None
    if model.config.infinity is not None:
        model.start_embedding = None
