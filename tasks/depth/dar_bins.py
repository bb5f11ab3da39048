"""Ordinal intervals of depth: a range cut into bins, and cut again, ever finer, around each pixel's own.

DAR's "granularity": at every scale a pixel's depth is a mixture of the bins' centres; the bin that holds it, with its
neighbours, is the range that the next scale divides anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class OrdinalBins:
    """How a range of depths is divided.

    Attributes:
        min_depth, max_depth: of the whole range, in metres.
        count: bins at every scale.
        neighbours: bins kept on either side of a pixel's own when its range is divided anew.
        refined: the divided ranges give the next scale's centres (the paper). Else the first, uniform centres serve at
            every scale, as in the published code, which computes the others and reads them nowhere.
        last_edge: the range may reach to the last edge; the published code stops one before it.
        spacing: bins are of one width (the paper), or each is wider than the one before by one factor, which puts more
            of them where a metre counts more (spacing-increasing discretisation: Fu et al. 2018, DORN, equation 1).

    Raises:
        ValueError: the range is empty, or there are fewer than two bins.
    """

    min_depth: float = 1e-3
    max_depth: float = 10.0
    count: int = 16
    neighbours: int = 1
    refined: bool = True
    last_edge: bool = True
    spacing: Literal["uniform", "log"] = "uniform"

    def __post_init__(self) -> None:
        if not 0 < self.min_depth < self.max_depth:
            raise ValueError(
                f"depths from {self.min_depth:g} to {self.max_depth:g} m are no range; the first must be more than 0 "
                "and the second more than the first"
            )
        if self.count < 2 or self.neighbours < 0:
            raise ValueError(f"{self.count} bins and {self.neighbours} neighbours; expected 2 or more, and 0 or more")

    def first(self, like: Tensor) -> Float[Tensor, "1 edges 1 1"]:
        """The edges of the whole range's bins, for every pixel the same."""
        low, high = self.min_depth, self.max_depth
        if self.spacing == "log":
            low, high = math.log(low), math.log(high)
        steps = like.new_full((self.count + 1,), (high - low) / self.count, dtype=torch.float32)
        steps[0] = low
        return self._depths(steps.cumsum(0))[None, :, None, None]

    def _spaced(self, depth: Tensor) -> Tensor:
        """Depths on the scale on which bins are of one width."""
        return depth.log() if self.spacing == "log" else depth

    def _depths(self, spaced: Tensor) -> Tensor:
        return spaced.exp() if self.spacing == "log" else spaced

    def labels(
        self, depth: Float[Tensor, "batch 1 height width"], edges: Float[Tensor, "*batch edges height width"]
    ) -> Int[Tensor, "batch 1 height width"]:
        """The bin [e_j, e_j+1) that holds each pixel's depth; 0 where none does."""
        passed = (depth >= edges).sum(1, keepdim=True)
        return torch.where(passed <= self.count, passed - 1, 0).clamp_min(0)

    def divide(
        self, edges: Float[Tensor, "*batch edges height width"], labels: Int[Tensor, "batch 1 height width"]
    ) -> Float[Tensor, "batch edges height width"]:
        """The edges of ``count`` intervals over each pixel's bin and its neighbours, spaced alike."""
        edges = edges.expand(len(labels), -1, *labels.shape[-2:])
        left = edges.gather(1, (labels - self.neighbours).clamp_min(0))
        last = self.count if self.last_edge else self.count - 1
        right = edges.gather(1, (labels + self.neighbours + 1).clamp_max(last))
        width = (self._spaced(right) - self._spaced(left)).abs() / self.count
        start = self._spaced(left.clamp_min(self.min_depth))
        steps = torch.cat((start, width.expand(-1, self.count, -1, -1)), dim=1)
        return self._depths(steps.cumsum(1)).clamp(self.min_depth, self.max_depth)

    def trace(
        self, depths: Sequence[Float[Tensor, "batch 1 height width"]]
    ) -> tuple[list[Int[Tensor, "batch 1 height width"]], list[Float[Tensor, "*batch edges height width"]]]:
        """The labels of every scale's depths, and the edges that they are looked up in, divided from scale to scale."""
        edges, labels = [self.first(depths[0])], []
        for depth in depths:
            labels.append(self.labels(depth, edges[-1]))
            edges.append(self.divide(edges[-1], labels[-1]))
        return labels, edges[:-1]


def centres(edges: Float[Tensor, "*batch edges height width"]) -> Float[Tensor, "*batch bins height width"]:
    """The middle of each interval."""
    return 0.5 * (edges[:, :-1] + edges[:, 1:])
