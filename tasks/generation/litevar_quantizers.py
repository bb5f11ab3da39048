"""The published simulation of low precision: numbers are rounded to few levels and computed with as before.

LiteVAR (arXiv 2411.17178) measures quality so. Nothing becomes smaller or faster by it; for that see
:mod:`nextscale.tasks.generation.litevar_packing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SMALLEST_SCALE = 1e-4
"""Takes the place of a scale of 0: all numbers of a range are equal."""

Kind = Literal["group", "axis", "static", "channel", "weight_group", "channel_quantile", "tensor"]


def to_levels(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """x rounded to 2^bits levels: q = clamp(round(x / scale - z), 0, 2^bits - 1), then (q + z) scale.

    scale = (high - low) / 2^bits and z = low / scale. As there are 2^bits steps but one level fewer above the lowest,
    the largest number comes out one step too small.
    """
    scale = (high - low) / 2**bits
    scale = torch.where(scale == 0, SMALLEST_SCALE, scale)
    zero = low / scale
    return ((x / scale - zero).round().clamp(0, 2**bits - 1) + zero) * scale


@dataclass(frozen=True)
class Quantizer:
    """One way to choose the ranges.

    Attributes:
        kind: ``group``, ``weight_group``: every run of ``group`` numbers of the flattened array; ``axis``: along
            ``axis``; ``channel``: every row of a weight; ``channel_quantile``: every row, from its 1st to its 99th
            percentile; ``tensor``: the whole; ``static``: 0 to 1.
    """

    kind: Kind
    bits: int
    group: int | None = None
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.bits < 1:
            raise ValueError(f"a quantiser of {self.bits} bits was asked for, expected at least 1")
        needed = {"group": "group", "weight_group": "group", "axis": "axis"}.get(self.kind)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"a quantiser of kind {self.kind!r} needs {needed}=")

    def __call__(self, x: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """Raises:

        ValueError: the kind is unknown, or runs of ``group`` do not divide the array.
        """
        if self.kind in ("group", "weight_group"):
            if x.numel() % (self.group or 1):
                raise ValueError(f"{x.numel()} numbers do not divide into groups of {self.group}")
            runs = x.reshape(-1, self.group or 1)
            return to_levels(runs, runs.amin(1, True), runs.amax(1, True), self.bits).view_as(x)
        if self.kind == "axis":
            assert self.axis is not None
            return to_levels(x, x.amin(self.axis, True), x.amax(self.axis, True), self.bits)
        if self.kind == "static":
            return to_levels(x, x.new_zeros(()), x.new_ones(()), self.bits)
        if self.kind == "tensor":
            return to_levels(x, x.min(), x.max(), self.bits)
        rows = x.flatten(1)
        if self.kind == "channel":
            low, high = rows.amin(1, True), rows.amax(1, True)
        elif self.kind == "channel_quantile":
            count = rows.shape[1]
            low = rows.kthvalue(max(int(0.01 * count), 1), dim=1, keepdim=True).values
            high = rows.kthvalue(max(int(0.99 * count), 1), dim=1, keepdim=True).values
        else:
            raise ValueError(f"there is no quantiser of kind {self.kind!r}")
        return to_levels(rows, low, high, self.bits).view_as(x)


@dataclass(frozen=True)
class Simulation:
    """Bits of a simulated run.

    Attributes:
        weight: one range per output channel.
        activation: of a layer's inputs, one range per row.
        attention: of queries, keys, values and attention probabilities; None leaves attention alone.
        keep: linear layers whose name contains one of these stay as they are.
    """

    weight: int = 8
    activation: int = 8
    attention: int | None = 8
    keep: Sequence[str] = ("feed_forward.contract",)

    def __post_init__(self) -> None:
        for name in ("weight", "activation", "attention"):
            bits = getattr(self, name)
            if bits is not None and bits < 1:
                raise ValueError(f"{name} is {bits} bits, expected at least 1")


PUBLISHED = {
    1: Simulation(8, 8),
    2: Simulation(4, 4),
    3: Simulation(6, 6),
    4: Simulation(4, 8),
    5: Simulation(4, 6),
    10: Simulation(8, 8, attention=None, keep=()),
}
"""The settings of the published code's ``--quant``."""


class SimulatedLinear(nn.Module):
    """A linear layer of rounded weights and rounded inputs; the bias stays as it is."""

    def __init__(self, layer: nn.Linear, weight_bits: int, activation_bits: int) -> None:
        super().__init__()
        weight = Quantizer("channel", weight_bits)(layer.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        self._inputs = Quantizer("group", activation_bits, group=layer.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._inputs(x), self.weight, self.bias)
