"""Rotary positions on a grid: one half of each head turns by the row, the other by the column.

Su et al. 2021, "RoFormer" (arXiv 2104.09864), in two dimensions. Where a token of a coarse map stands is a system's own
choice (counted on a reference grid, or spread over a fixed span), so positions are given as numbers, not as indices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """By how much each pair of neighbouring channels turns at each position; float32.

    Attributes:
        cos, sin: of the angles. A system may blend them from other positions', so their squares need not sum to 1.
    """

    cos: Float[Tensor, "positions pairs"]
    sin: Float[Tensor, "positions pairs"]

    def __len__(self) -> int:
        return len(self.cos)

    def __getitem__(self, positions: slice) -> Self:
        return type(self)(self.cos[positions], self.sin[positions])

    def to(self, device: torch.device) -> Self:
        return type(self)(self.cos.to(device), self.sin.to(device))


def angles(positions: Float[Tensor, " positions"], head_size: int, base: float) -> Float[Tensor, "positions quarter"]:
    """Angles of one axis: position times base^(-4 m / head size) for m below a quarter of the head size."""
    pairs = torch.arange(0, head_size // 2, 2, device=positions.device)[: head_size // 4].float()
    return torch.outer(positions.float(), 1 / base ** (pairs / (head_size // 2)))


def grid_rotation(
    first: Float[Tensor, " positions"], second: Float[Tensor, " positions"], head_size: int, base: float = 10_000.0
) -> Rotation:
    """The rotation of tokens on a grid.

    Args:
        first, second: where each token stands, along the axis that turns the first half of the channels (the row in
            Infinity and FlowAR, the column in STAR) and along the other.

    Raises:
        ValueError: the head size is not a multiple of four.
    """
    if head_size % 4:
        raise ValueError(f"rotary positions on a grid need heads of a multiple of 4 channels, got {head_size}")
    turns = torch.cat((angles(first, head_size, base), angles(second, head_size, base)), dim=-1)
    return Rotation(turns.cos(), turns.sin())


def rotate(
    x: Float[Tensor, "batch positions heads size"], rotation: Rotation
) -> Float[Tensor, "batch positions heads size"]:
    """Turn each pair (2 m, 2 m + 1) of channels; in float32, given back in the precision it came in.

    Lengths stay as they are, so it makes no difference whether queries and keys are normalised before or after.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass over the memory instead of seven.
        turns = torch.complex(rotation.cos, rotation.sin)[:, None]
        return torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns).flatten(-2).to(x.dtype)
    a, b = pairs.unbind(-1)
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
