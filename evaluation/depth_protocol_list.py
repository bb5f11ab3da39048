"""The protocols of published evaluators, by name."""

from __future__ import annotations

import math

from .depth import STANDARD
from .depth_protocols import Protocol, ProtocolError, changed

_BTS = "Lee et al., BTS, arXiv 1907.10326; github.com/cleinc/bts, utils/eval_with_pngs.py"
_MONODEPTH2 = "Godard et al., ICCV 2019; github.com/nianticlabs/monodepth2, evaluate_depth.py"
_DAR = "Wang et al., DAR; github.com/wjh892521292/DAR, validation of the training script (as AdaBins and many others)"
_MARIGOLD = "Ke et al., Marigold, CVPR 2024; github.com/prs-eth/Marigold, script/evaluate.py"
_DEPTHART = "DepthART, IJCAI 2025; github.com/bulatko/DepthART"


def bts(dataset: str, crop: str | None, window: bool = False, low: float = 1e-3, high: float | None = None) -> Protocol:
    """BTS's evaluation of ``kitti`` or ``nyu``: low < g < high, predictions clamped to the same first.

    Args:
        crop: "garg", "eigen" (the data set's own) or None.
        window: predictions cover the KITTI benchmark's window only.
        high: metres; 80 for KITTI and 10 for NYU, unless given.
    """
    if dataset not in ("kitti", "nyu"):
        raise ProtocolError(f"unknown data set {dataset!r}; BTS evaluates kitti and nyu")
    name = f"eigen_{dataset}" if crop == "eigen" else crop
    cap = (80.0 if dataset == "kitti" else 10.0) if high is None else high
    return Protocol(
        window="paste" if window else None,
        interpolation=None,
        truth_range=(low, cap),
        crop=name,
        clamp=(low, cap),
        clamp_first=True,
        source=_BTS,
    )


MONODEPTH2 = {
    "eigen": Protocol(
        truth_range=(1e-3, 80.0),
        crop="garg",
        alignment="median",
        clamp=(1e-3, 80.0),
        metrics=("abs_rel", "sq_rel", "rmse", "rmse_log", "d1", "d2", "d3"),
        source=_MONODEPTH2,
    ),
    "eigen_benchmark": Protocol(
        truth_range=(0.0, math.inf),
        alignment="median",
        clamp=(1e-3, 80.0),
        metrics=("abs_rel", "sq_rel", "rmse", "rmse_log", "d1", "d2", "d3"),
        source=_MONODEPTH2,
    ),
}
"""monodepth2's by its split: raw laser points (eigen) or the improved ground truth (eigen_benchmark)."""


def _dar(crop: str, high: float, window: bool = False) -> Protocol:
    return Protocol(
        window="cut" if window else None,
        truth_range=(1e-3, high),
        crop=crop,
        clamp=(1e-3, high),
        clamp_first=True,
        source=_DAR,
    )


def _marigold(crop: str | None, low: float, high: float, window: bool = False) -> Protocol:
    return Protocol(
        window="cut" if window else None,
        truth_range=(low, high),
        crop=crop,
        alignment="scale_shift",
        clamp=(max(low, 1e-6), high),
        source=_MARIGOLD,
    )


def _depthart(low: float, high: float, size: tuple[int, int] | None = (256, 256), border: int = 0) -> Protocol:
    return Protocol(
        border=border,
        truth_size=size,
        interpolation="bilinear_corners",
        truth_range=(low, high),
        include_high=True,
        alignment="median_of_ratios",
        # Nothing is clamped, so a prediction of 0 is possible, of which there is no logarithm.
        metrics=("abs_rel", "sq_rel", "mae", "mse", "d1", "d2", "d3", "d102", "d105", "d110"),
        source=_DEPTHART,
    )


def _plain(alignment: str) -> Protocol:
    # Fits with a shift can turn depths negative, and inverted ones infinite.
    clamped = alignment in ("scale_shift", "inverse_scale_shift")
    return Protocol(alignment=alignment, clamp=(1e-3, 1e4) if clamped else None, source="every measured pixel")


PROTOCOLS: dict[str, Protocol] = {
    "bts-kitti": bts("kitti", "garg", window=True),
    "bts-kitti-50": bts("kitti", "garg", window=True, high=50.0),
    "bts-kitti-eigen": bts("kitti", "eigen", window=True),
    "bts-nyu": bts("nyu", "eigen"),
    "dar-kitti": _dar("garg", 80.0, window=True),
    "dar-kitti-eigen": _dar("eigen_kitti", 80.0, window=True),
    "dar-nyu": _dar("eigen_nyu", 10.0),
    "dar-sunrgbd": _dar("eigen_nyu", 10.0),
    "kitti-server": Protocol(
        interpolation=None,
        metrics=("silog", "sq_rel", "abs_rel", "irmse"),
        source="KITTI depth prediction benchmark, development kit",
    ),
    "monodepth2-eigen": MONODEPTH2["eigen"],
    "monodepth2-eigen-stereo": changed(MONODEPTH2["eigen"], scale=5.4, alignment="none"),
    "monodepth2-benchmark": MONODEPTH2["eigen_benchmark"],
    "monodepth2-benchmark-stereo": changed(MONODEPTH2["eigen_benchmark"], scale=5.4, alignment="none"),
    "marigold-kitti": _marigold("eigen_kitti", 1e-5, 80.0, window=True),
    "marigold-nyu": _marigold("eigen_nyu", 1e-3, 10.0),
    "marigold-eth3d": _marigold(None, 1e-5, math.inf),
    "marigold-diode": _marigold(None, 0.6, 350.0),
    "marigold-hypersim": _marigold(None, 1e-5, 65.0),
    "depthart-nyu": _depthart(1e-8, 10.0, border=8),
    "depthart-eth3d": _depthart(1e-4, 72.0),
    "depthart-tum": _depthart(1e-2, 10.0),
    "depthart-ibims": _depthart(1e-2, 50.0, size=None),
    "diode": Protocol(
        interpolation=None,
        metrics=("mae", "rmse", "abs_rel", "log10", "log10_rmse", "d1", "d2", "d3"),
        source="Vasiljevic et al., DIODE, arXiv 1908.00463; github.com/diode-dataset/diode-devkit, metrics.py",
    ),
    "ibims": Protocol(
        truth_range=(1e-2, 50.0),
        include_high=True,
        metrics=STANDARD,
        source="Koch et al., ECCV Workshops 2018: metric depth, before planes and boundaries",
    ),
    "metric": _plain("none"),
    "median": _plain("median"),
    "scale-shift": _plain("scale_shift"),
    "inverse-scale-shift": _plain("inverse_scale_shift"),
    "log-scale-shift": _plain("log_scale_shift"),
}
"""Protocols by name; any field can be replaced (``depth_protocols.changed``)."""


def protocol(name: str) -> Protocol:
    """A protocol by name. Raises ProtocolError for an unknown one."""
    if name not in PROTOCOLS:
        raise ProtocolError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
