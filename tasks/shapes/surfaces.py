"""Surfaces of fields that can be evaluated anywhere: grids refined where the surface is, and marching cubes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Evaluate = Callable[[Float[Tensor, "points 3"]], Float[Tensor, " points"]]
CHUNK = 2**18
"""Points evaluated at once."""


def grid_values(
    evaluate: Evaluate,
    points: int,
    half: float,
    level: float,
    *,
    stride: int = 4,
    device: torch.device | str = "cpu",
) -> tuple[Float[Tensor, "x y z"], int]:
    """A field on a cube's grid, evaluated where its surface can be.

    Every ``stride``-th point is evaluated first; then every point of half that stride, but only in those blocks that
    the surface passes and in the blocks around them, and so on to every point. The rest keep the value of their block,
    which lies on the same side of ``level``: the cost grows with the surface. What is smaller than a block and touches
    none of its corners is not found.

    Args:
        points: along each side, from -``half`` to ``half``.
        stride: 1 evaluates all points.

    Returns:
        The values, and how many points were evaluated.
    """
    ticks = torch.linspace(-half, half, points, device=device)
    places = _places(points, stride, device)
    first = ticks[places]
    values = _in_chunks(evaluate, torch.cartesian_prod(first, first, first)).view((len(places),) * 3)
    count = values.numel()
    while stride > 1:
        passed = _passed(values > level)
        stride = stride // 2 if stride % 2 == 0 else 1
        finer = _places(points, stride, device)
        block_of = (torch.searchsorted(places, finer, right=True) - 1).clamp(max=len(places) - 2)
        index = torch.meshgrid(block_of, block_of, block_of, indexing="ij")
        known = torch.isin(finer, places)
        every = torch.meshgrid(*(known.nonzero()[:, 0],) * 3, indexing="ij")
        coarse, values = values, values[:-1, :-1, :-1][index]
        values[every] = coarse
        wanted = passed[index]
        wanted[every] = False
        chosen = wanted.nonzero()
        values[wanted] = _in_chunks(evaluate, ticks[finer[chosen]])
        count += len(chosen)
        places = finer
    return values, count


def _places(points: int, stride: int, device: torch.device | str) -> Tensor:
    """Every ``stride``-th of the points and the last: the last block may be shorter."""
    return torch.arange(0, points + stride - 1, stride, device=device).clamp(max=points - 1).unique()


def _passed(inside: Bool[Tensor, "x y z"]) -> Bool[Tensor, "blocks blocks blocks"]:
    """Blocks with corners on both sides, and the blocks that touch them."""
    some = F.max_pool3d(inside[None].float(), 2, 1)[0] > 0
    every = F.max_pool3d((~inside)[None].float(), 2, 1)[0] == 0
    return F.max_pool3d((some & ~every)[None].float(), 3, 1, padding=1)[0] > 0


def _in_chunks(evaluate: Evaluate, points: Float[Tensor, "points 3"]) -> Float[Tensor, " points"]:
    if not len(points):
        return points.new_zeros(0)
    return torch.cat([evaluate(part) for part in points.split(CHUNK)])


def marching_cubes(values: Float[Tensor, "x y z"], half: float, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Vertices within [-``half``, ``half``] and faces of the surface around what is above ``level``, wound so that
    normals point away from it; both empty if there is none."""
    from skimage.measure import marching_cubes as march

    grid = values.detach().float().cpu().numpy()
    if not grid.min() < level < grid.max():
        return np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64)
    vertices, faces, _, _ = march(grid, level)
    return ((vertices / (grid.shape[0] - 1) * 2 - 1) * half).astype(np.float32), faces[:, ::-1].astype(np.int64)
