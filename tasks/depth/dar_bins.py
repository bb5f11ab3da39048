"""Ordinal intervals of depth: a range cut into bins, and cut again, ever finer, around each pixel's own.

DAR's "granularity": at every scale a pixel's depth is a mixture of the bins' centres; the bin that holds it, with its
neighbours, is the range that the next scale divides anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    Raises:
        ValueError: the range is empty, or there are fewer than two bins.
    """

    min_depth: float = 1e-3
    max_depth: float = 10.0
    count: int = 16
    neighbours: int = 1
    refined: bool = True
    last_edge: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.min_depth < self.max_depth:
            raise ValueError(
                f"depths from {self.min_depth:g} to {self.max_depth:g} m are no range; the first must be more than 0 "
                "and the second more than the first"
            )
        if self.count < 2 or self.neighbours < 0:
            raise ValueError(f"{self.count} bins and {self.neighbours} neighbours; expected 2 or more, and 0 or more")

    def uniform(self, like: Tensor) -> Float[Tensor, "1 edges 1 1"]:
        """The first edges: of equal intervals, for every pixel the same."""
        width = (self.max_depth - self.min_depth) / self.count
        steps = like.new_full((self.count + 1,), width, dtype=torch.float32)
        steps[0] = self.min_depth
        return steps.cumsum(0)[None, :, None, None]

    def labels(
        self, depth: Float[Tensor, "batch 1 height width"], edges: Float[Tensor, "*batch edges height width"]
    ) -> Int[Tensor, "batch 1 height width"]:
        """The bin [e_j, e_j+1) that holds each pixel's depth; 0 where none does."""
        passed = (depth >= edges).sum(1, keepdim=True)
        return torch.where(passed <= self.count, passed - 1, 0).clamp_min(0)

    def divide(
        self, edges: Float[Tensor, "*batch edges height width"], labels: Int[Tensor, "batch 1 height width"]
    ) -> Float[Tensor, "batch edges height width"]:
        """The edges of ``count`` equal intervals over each pixel's bin and its neighbours."""
        edges = edges.expand(len(labels), -1, *labels.shape[-2:])
        left = edges.gather(1, (labels - self.neighbours).clamp_min(0))
        last = self.count if self.last_edge else self.count - 1
        right = edges.gather(1, (labels + self.neighbours + 1).clamp_max(last))
        width = (right - left).abs() / self.count
        steps = torch.cat((left.clamp_min(self.min_depth), width.expand(-1, self.count, -1, -1)), dim=1)
        return steps.cumsum(1).clamp(self.min_depth, self.max_depth)

    def trace(
        self, depths: Sequence[Float[Tensor, "batch 1 height width"]]
    ) -> tuple[list[Int[Tensor, "batch 1 height width"]], list[Float[Tensor, "*batch edges height width"]]]:
        """The labels of every scale's depths, and the edges that they are looked up in, divided from scale to scale."""
        edges, labels = [self.uniform(depths[0])], []
        for depth in depths:
            labels.append(self.labels(depth, edges[-1]))
            edges.append(self.divide(edges[-1], labels[-1]))
        return labels, edges[:-1]


def centres(edges: Float[Tensor, "*batch edges height width"]) -> Float[Tensor, "*batch bins height width"]:
    """The middle of each interval."""
    return 0.5 * (edges[:, :-1] + edges[:, 1:])
