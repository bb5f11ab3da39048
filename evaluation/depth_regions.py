"""The parts of a depth map that benchmarks compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Region:
    """Rows top:bottom and columns left:right of a map."""

    top: int
    bottom: int
    left: int
    right: int

    def cut(self, array: np.ndarray) -> np.ndarray:
        """The region of a map (..., height, width), as a view."""
        return array[..., self.top : self.bottom, self.left : self.right]

    def inside(self, height: int, width: int) -> Region:
        """What of the region lies inside a map of this size."""
        return Region(
            min(max(self.top, 0), height),
            min(max(self.bottom, 0), height),
            min(max(self.left, 0), width),
            min(max(self.right, 0), width),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.bottom - self.top, self.right - self.left


WINDOW = (352, 1216)
"""Height and width of the KITTI depth benchmark's maps."""


def benchmark_window(height: int, width: int) -> Region:
    """The 352 x 1216 window of the KITTI benchmark: at the bottom, centred across.

    Raises:
        ValueError: the map is smaller.
    """
    rows, columns = WINDOW
    if height < rows or width < columns:
        raise ValueError(f"a map of {height} x {width} does not hold the benchmark's window of {rows} x {columns}")
    top, left = height - rows, (width - columns) // 2
    return Region(top, height, left, left + columns)


def garg(height: int, width: int) -> Region:
    """Garg et al., ECCV 2016: rows 0.40810811 to 0.99189189, columns 0.03594771 to 0.96405229 of the size,
    truncated."""
    return _share(height, width, (0.40810811, 0.99189189, 0.03594771, 0.96405229))


def eigen_kitti(height: int, width: int) -> Region:
    """Eigen et al., NIPS 2014: rows 0.3324324 to 0.91351351, columns 0.0359477 to 0.96405229 of the size, truncated."""
    return _share(height, width, (0.3324324, 0.91351351, 0.0359477, 0.96405229))


def _share(height: int, width: int, shares: tuple[float, float, float, float]) -> Region:
    top, bottom, left, right = shares
    return Region(int(top * height), int(bottom * height), int(left * width), int(right * width))


def _fixed(top: int, bottom: int, left: int, right: int) -> Callable[[int, int], Region]:
    return lambda height, width: Region(top, bottom, left, right).inside(height, width)


CROPS: dict[str, Callable[[int, int], Region]] = {
    "garg": garg,
    "eigen_kitti": eigen_kitti,
    "eigen_nyu": _fixed(45, 471, 41, 601),
    "eigen_nyu_wide": _fixed(45, 472, 43, 608),
    "dorn_nyu": _fixed(21, 460, 25, 616),
    "monodepth2_training": _fixed(153, 371, 44, 1197),
}
"""Crops by name: (height, width) of the map -> region.

eigen_nyu: rows 45:471, columns 41:601 of 480 x 640 (Eigen et al.; most papers). eigen_nyu_wide: the training crop of
BTS, which some repositories also evaluate on. dorn_nyu: DORN's. monodepth2_training: what monodepth2 watches while
training, of 375 x 1242. Fixed ones are cut at the map's edges.
"""


def crop(name: str | None, height: int, width: int) -> Region:
    """A region by the name of its crop; None for the whole map. Raises ValueError for an unknown name."""
    if name is None:
        return Region(0, height, 0, width)
    if name not in CROPS:
        raise ValueError(f"unknown crop {name!r}; known: {', '.join(CROPS)}")
    return CROPS[name](height, width)
