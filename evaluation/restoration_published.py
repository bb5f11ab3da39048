"""Published figures of restoration, to stand beside one's own, each with where it was read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Attributes:

    system: what was measured.
    psnr, ssim: decibels, and in [-1, 1].
    source: where the figure is from and what is uncertain about it.
    """

    system: str
    psnr: float
    ssim: float
    source: str


_TABLE = "table of the VarFormer paper (arXiv 2412.21063v2), from a summary of it; check against the paper"
_ONE_EACH = f"{_TABLE}; one model per task"

PUBLISHED: dict[str, tuple[Published, ...]] = {
    "rain": (
        Published("VarFormer", 31.33, 0.913, _TABLE),
        Published("DiffUIR", 31.14, 0.907, _TABLE),
        Published("AirNet", 25.44, 0.743, _TABLE),
        Published("Restormer", 33.96, 0.935, _ONE_EACH),
    ),
    "motion blur": (
        Published("VarFormer", 30.99, 0.956, _TABLE),
        Published("DiffUIR", 29.88, 0.874, _TABLE),
        Published("AirNet", 27.14, 0.832, _TABLE),
        Published("Restormer", 32.92, 0.961, _ONE_EACH),
    ),
    "low light": (
        Published("VarFormer", 25.13, 0.917, _TABLE),
        Published("DiffUIR", 25.02, 0.901, _TABLE),
        Published("AirNet", 18.49, 0.767, _TABLE),
        Published("Restormer", 20.41, 0.806, _ONE_EACH),
    ),
    "haze": (
        Published("VarFormer", 32.96, 0.956, _TABLE),
        Published("DiffUIR", 32.74, 0.944, _TABLE),
        Published("AirNet", 25.48, 0.944, _TABLE),
        Published("Restormer", 30.87, 0.969, _ONE_EACH),
    ),
}
"""By the task of :class:`nextscale.datasets.paired_layouts.Layout`; means over that task's test sets.

VarFormer's own options measure images squashed to 256 x 256 pixels with a border of 4 left out; figures at full size
are not comparable with it.
"""
