"""What a benchmark does to a prediction and its ground truth before errors are taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .depth import STANDARD, DepthMetricError, EmptyMaskError, depth_metrics
from .depth_alignment import Affine, align
from .depth_maps import Interpolation, resize_map
from .depth_regions import WINDOW, benchmark_window, crop

Kind = Literal["depth", "disparity"]
"""What a prediction holds: distance along the axis, or its inverse (of any scale)."""


class ProtocolError(ValueError):
    """A prediction or ground truth that a protocol does not take."""


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate a prediction; the fields stand in the order in which they are applied.

    Attributes:
        border: pixels cut off each side of truth and prediction.
        truth_size: (height, width) to which the ground truth is resized (nearest); None keeps it.
        window: the KITTI benchmark's 352 x 1216 window. "cut": truth and prediction are both reduced to it, so the
            crop's fractions are of the window. "paste": the prediction is reduced to it, clamped, and pasted into
            zeros of the full size, so the crop's fractions are of the full map.
        interpolation: how a prediction of another size is brought to the ground truth's; None refuses one. A
            disparity is resized as such.
        truth_range: metres that count: low < g < high.
        include_high: g = high counts too.
        crop: of ``depth_regions.CROPS``, of which only pixels inside count; None for all.
        scale: factor for every prediction (5.4 metres of baseline for monodepth2's stereo models).
        alignment: of ``depth_alignment.ALIGNMENTS``, fitted over the pixels that count.
        clamp: metres to which predictions are cut; None leaves them.
        clamp_first: cut before the alignment instead of after it. Then infinity becomes the upper and NaN the lower
            bound, as in BTS's evaluation; elsewhere either is refused where it counts.
        metrics: of ``depth.METRICS``, in this order.
        source: where the protocol is written down.
    """

    border: int = 0
    truth_size: tuple[int, int] | None = None
    window: Literal["cut", "paste"] | None = None
    interpolation: Interpolation | None = "bilinear"
    truth_range: tuple[float, float] = (0.0, math.inf)
    include_high: bool = False
    crop: str | None = None
    scale: float = 1.0
    alignment: str = "none"
    clamp: tuple[float, float] | None = None
    clamp_first: bool = False
    metrics: Sequence[str] = STANDARD
    source: str = ""


@dataclass(frozen=True)
class Comparison:
    """A prediction brought onto its ground truth.

    Attributes:
        truth: (height, width) metres.
        prediction: the same, aligned and clamped; float64.
        mask: bool, the pixels that count.
        alignment: what was fitted.
    """

    truth: np.ndarray
    prediction: np.ndarray
    mask: np.ndarray
    alignment: Affine

    @property
    def pixels(self) -> int:
        """How many count."""
        return int(np.count_nonzero(self.mask))


def compare(
    truth: np.ndarray,
    prediction: np.ndarray,
    protocol: Protocol,
    *,
    valid: np.ndarray | None = None,
    kind: Kind = "depth",
) -> Comparison:
    """Bring a prediction onto its ground truth by a protocol.

    Args:
        truth: (height, width) metres; 0, negative, infinite or NaN where nothing was measured.
        prediction: (height', width'): metres or relative depth; or disparity, by ``kind``.
        valid: bool (height, width): what the data set counts as measured beside that.

    Raises:
        EmptyMaskError: no pixel is left.
        ProtocolError: a map is of no shape or size that the protocol takes, or predictions that count are NaN,
            infinite (without a clamp that comes first), or as disparities not positive.
        AlignmentError: the prediction cannot be aligned.
    """
    truth, measured, prediction = _prepare(truth, prediction, protocol, valid)
    height, width = truth.shape
    shown = prediction
    if protocol.window == "paste":
        region = benchmark_window(height, width)
        if shown.shape == truth.shape:
            shown = region.cut(shown)
    size = (height, width) if protocol.window != "paste" else WINDOW
    shown = _fit(shown, size, protocol)
    depth = _depth(shown, kind) * protocol.scale
    if protocol.clamp is not None and protocol.clamp_first:
        low, high = protocol.clamp
        depth = np.clip(np.nan_to_num(depth, nan=low, posinf=high, neginf=low), low, high)
    if protocol.window == "paste":
        whole = np.zeros((height, width))
        region.cut(whole)[:] = depth
        depth = whole
    mask = _mask(truth, measured, protocol)
    true, predicted = truth[mask], depth[mask]
    if not true.size:
        raise EmptyMaskError(
            f"no pixel to compare: of {truth.size} pixels, {int(measured.sum())} were measured, and none of them "
            f"lies in {_range(protocol)} and the crop {protocol.crop or 'of the whole map'}"
        )
    if wrong := int((~np.isfinite(predicted)).sum()):
        raise ProtocolError(
            f"{wrong} of {true.size} predictions that count are infinite or NaN"
            + (" (disparities of 0 or less, or NaN)" if kind == "disparity" else "")
            + "; correct them, or use a protocol that clamps first"
        )
    fitted = align(true, predicted, protocol.alignment)
    if fitted != Affine():
        depth = fitted(depth)
    if protocol.clamp is not None and not protocol.clamp_first:
        depth = np.clip(depth, *protocol.clamp)
    return Comparison(truth, depth, mask, fitted)


def evaluate_map(
    truth: np.ndarray,
    prediction: np.ndarray,
    protocol: Protocol,
    *,
    valid: np.ndarray | None = None,
    kind: Kind = "depth",
) -> dict[str, float]:
    """Errors of one image by a protocol: {metric: value}. See :func:`compare` for arguments and errors."""
    return score(compare(truth, prediction, protocol, valid=valid, kind=kind), protocol.metrics)


def score(compared: Comparison, metrics: Sequence[str]) -> dict[str, float]:
    """Errors over the pixels that count."""
    mask = compared.mask
    return depth_metrics(compared.truth[mask], compared.prediction[mask], metrics)


def _prepare(
    truth: np.ndarray, prediction: np.ndarray, protocol: Protocol, valid: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, where it was measured, and the prediction, reduced to the part the protocol looks at."""
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    for name, array in (("ground truth", truth), ("prediction", prediction)):
        if array.ndim != 2 or not array.size or array.dtype.kind not in "fiu":
            raise ProtocolError(f"the {name} is {array.dtype} of shape {array.shape}; expected numbers (height, width)")
    with np.errstate(invalid="ignore"):
        measured = (truth > 0) & (truth < math.inf)
    if valid is not None:
        if valid.shape != truth.shape:
            raise ProtocolError(f"the mask has shape {valid.shape}, the ground truth {truth.shape}; expected one shape")
        measured = measured & (np.asarray(valid) > 0)
    if protocol.window == "cut":
        region = benchmark_window(*truth.shape)
        if prediction.shape == truth.shape:
            prediction = region.cut(prediction)
        truth, measured = region.cut(truth), region.cut(measured)
    if border := protocol.border:
        if min(truth.shape) <= 2 * border:
            raise ProtocolError(f"a ground truth of {truth.shape} leaves nothing without {border} pixels on each side")
        inner = (slice(border, -border), slice(border, -border))
        if prediction.shape == truth.shape:
            prediction = prediction[inner]
        truth, measured = truth[inner], measured[inner]
    if protocol.truth_size is not None:
        truth = resize_map(truth.astype(np.float64), protocol.truth_size, "nearest")
        measured = resize_map(measured, protocol.truth_size, "nearest")
    return truth, measured, prediction


def _fit(prediction: np.ndarray, size: tuple[int, int], protocol: Protocol) -> np.ndarray:
    if prediction.shape == size:
        return prediction.astype(np.float64)
    if protocol.interpolation is None:
        raise ProtocolError(
            f"the prediction is {prediction.shape[0]} x {prediction.shape[1]}, the protocol compares "
            f"{size[0]} x {size[1]} and resizes nothing; save predictions at the ground truth's size"
        )
    return resize_map(prediction.astype(np.float64), size, protocol.interpolation)


def _depth(prediction: np.ndarray, kind: Kind) -> np.ndarray:
    if kind == "depth":
        return prediction
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(prediction > 0, 1 / np.where(prediction > 0, prediction, 1), np.nan)


def _mask(truth: np.ndarray, measured: np.ndarray, protocol: Protocol) -> np.ndarray:
    low, high = protocol.truth_range
    with np.errstate(invalid="ignore"):
        inside = (truth > low) & ((truth <= high) if protocol.include_high else (truth < high))
    region = crop(protocol.crop, *truth.shape)
    mask = np.zeros(truth.shape, bool)
    region.cut(mask)[:] = True
    return mask & inside & measured


def _range(protocol: Protocol) -> str:
    low, high = protocol.truth_range
    return f"({low:g}, {high:g}{']' if protocol.include_high else ')'} metres"


def changed(protocol: Protocol, **fields: Any) -> Protocol:
    """A protocol with other fields. Raises ProtocolError for one that there is not."""
    if unknown := sorted(set(fields) - set(Protocol.__dataclass_fields__)):
        raise ProtocolError(
            f"a protocol has no {', '.join(unknown)}; it has {', '.join(Protocol.__dataclass_fields__)}"
        )
    return replace(protocol, **fields)


__all__ = [
    "Comparison",
    "DepthMetricError",
    "EmptyMaskError",
    "Kind",
    "Protocol",
    "ProtocolError",
    "changed",
    "compare",
    "evaluate_map",
    "score",
]
