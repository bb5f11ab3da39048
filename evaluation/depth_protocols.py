"""What a benchmark does to a prediction and its ground truth before errors are taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
        mask: bool, the pixels that count.
        true, predicted: float64 (n,), the depths of these, the predicted ones aligned and clamped.
        alignment: what was fitted.
    """

    truth: np.ndarray
    mask: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    alignment: Affine
    _whole: Callable[[], np.ndarray]

    @property
    def pixels(self) -> int:
        """How many count."""
        return self.true.size

    @cached_property
    def prediction(self) -> np.ndarray:
        """float64 (height, width), aligned and clamped: also where it does not count, where it may be NaN."""
        return self._whole()


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
    mask = _mask(truth, measured, protocol)
    # Only where it counts: evaluating a set is mostly this arithmetic.
    true = truth[mask].astype(np.float64)
    if not true.size:
        raise EmptyMaskError(
            f"no pixel to compare: of {truth.size} pixels, {int(measured.sum())} were measured, and none of them "
            f"lies in {_range(protocol)} and the crop {protocol.crop or 'of the whole map'}"
        )
    shown, beside = _placed(prediction, truth.shape, protocol)
    predicted = _entered(shown[mask], kind, protocol)
    if beside is not None:
        predicted[beside[mask]] = 0
    if not np.isfinite(predicted).all():
        raise ProtocolError(
            f"{int((~np.isfinite(predicted)).sum())} of {true.size} predictions that count are infinite or NaN"
            + (" (disparities of 0 or less, or NaN)" if kind == "disparity" else "")
            + "; correct them, or use a protocol that clamps first"
        )
    fitted = align(true, predicted, protocol.alignment)

    def whole() -> np.ndarray:
        depth = _entered(shown.reshape(-1), kind, protocol).reshape(shown.shape)
        return _finished(depth if beside is None else np.where(beside, 0, depth), fitted, protocol)

    return Comparison(truth, mask, true, _finished(predicted, fitted, protocol), fitted, whole)


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
    return depth_metrics(compared.true, compared.predicted, metrics)


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


def _placed(prediction: np.ndarray, shape: tuple[int, int], protocol: Protocol) -> tuple[np.ndarray, np.ndarray | None]:
    """The prediction in the ground truth's size, and where it is beside the window (None: nowhere)."""
    if protocol.window != "paste":
        return _fit(prediction, shape, protocol), None
    region = benchmark_window(*shape)
    inside = _fit(region.cut(prediction) if prediction.shape == shape else prediction, WINDOW, protocol)
    whole, beside = np.zeros(shape, inside.dtype), np.ones(shape, bool)
    region.cut(whole)[:], region.cut(beside)[:] = inside, False
    return whole, beside


def _fit(prediction: np.ndarray, size: tuple[int, int], protocol: Protocol) -> np.ndarray:
    if prediction.shape == size:
        return prediction
    if protocol.interpolation is None:
        raise ProtocolError(
            f"the prediction is {prediction.shape[0]} x {prediction.shape[1]}, the protocol compares "
            f"{size[0]} x {size[1]} and resizes nothing; save predictions at the ground truth's size"
        )
    return resize_map(prediction.astype(np.float64), size, protocol.interpolation)


def _entered(prediction: np.ndarray, kind: Kind, protocol: Protocol) -> np.ndarray:
    """Depths (n,) as they come to the alignment, a float64 array of their own."""
    depth = prediction.astype(np.float64)
    if kind == "disparity":
        with np.errstate(divide="ignore", invalid="ignore"):
            depth = np.where(depth > 0, 1 / np.where(depth > 0, depth, 1), np.nan)
    if protocol.scale != 1:
        depth *= protocol.scale
    if protocol.clamp is not None and protocol.clamp_first:
        low, high = protocol.clamp
        depth[np.isnan(depth)] = low
        np.clip(depth, low, high, out=depth)
    return depth


def _finished(depth: np.ndarray, fitted: Affine, protocol: Protocol) -> np.ndarray:
    """Aligned, and clamped where the clamp comes last."""
    if fitted != Affine():
        depth = fitted(depth)
    if protocol.clamp is not None and not protocol.clamp_first:
        depth = np.clip(depth, *protocol.clamp)
    return depth


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
