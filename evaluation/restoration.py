"""How close a restored image is to the truth, as the restoration literature measures it.

Two papers' PSNR and SSIM of the same image may differ by decibels and by 0.07 because of rounding, borders, the
colours compared and the window; a :class:`Protocol` names one such set of choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from nextscale.evaluation.lpips import LPIPS

Channel = Literal["rgb", "y"]
Window = Literal["gaussian", "uniform"]


@dataclass(frozen=True)
class Protocol:
    """Attributes:

    rounds: the restored image is rounded to 8 bits first, as if it had been saved; else only clipped to [0, 1].
    window: of SSIM. ``gaussian``: 11 x 11, sigma 1.5, population variances (Wang et al. 2004); ``uniform``:
        7 x 7, sample variances, scikit-image's defaults. Either leaves out the border that its window does not fit in.
    source: code that measures so.
    """

    name: str
    rounds: bool
    window: Window
    source: str

    @property
    def smallest(self) -> int:
        """Side in pixels, after cropping, that SSIM needs."""
        return 11 if self.window == "gaussian" else 7


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("basicsr", True, "gaussian", "BasicSR's metrics on 8-bit images; also VarFormer, DiffUIR, Restormer"),
        Protocol("airnet", False, "uniform", "AirNet, PromptIR, AdaIR: scikit-image's defaults on floats"),
        Protocol("skimage", True, "uniform", "scikit-image's defaults on 8-bit images"),
    )
}


@dataclass(frozen=True)
class Figures:
    """Attributes:

    psnr: decibels; ``inf`` where the images are equal.
    ssim: in [-1, 1].
    lpips: distance of VGG16's features; None where no weights were given.
    """

    psnr: float
    ssim: float
    lpips: float | None = None


def measure(
    image: Any,
    truth: Any,
    protocol: Protocol | str = "basicsr",
    *,
    channel: Channel = "rgb",
    crop: int = 0,
    lpips: LPIPS | None = None,
) -> Figures:
    """Compare a restored image with the truth.

    Args:
        image, truth: RGB (3, height, width), floats in [0, 1] (what lies outside is clipped) or uint8; tensors or
            arrays.
        channel: ``rgb``, or ``y``: the luma of ITU-R BT.601 in [16, 235], not rounded; the peak stays 255.
        crop: pixels left out at every border, of LPIPS too.
        lpips: adds LPIPS, always of RGB.

    Raises:
        ValueError: the shapes differ, the image is too small after cropping, or a name is unknown.
    """
    protocol = find_protocol(protocol)
    if channel not in ("rgb", "y"):
        raise ValueError(f"channel is {channel!r}, expected 'rgb' or 'y'")
    a, b = _pixels(image, protocol.rounds), _pixels(truth, protocol.rounds)
    if a.shape != b.shape:
        raise ValueError(f"the image is {_size(a)} pixels and the truth {_size(b)}; they have to be of one size")
    if crop < 0 or min(a.shape[:2]) - 2 * crop < protocol.smallest:
        raise ValueError(
            f"an image of {_size(a)} pixels with {crop} cropped at each border is too small: {protocol.name} needs "
            f"{protocol.smallest} x {protocol.smallest} to be left"
        )
    a, b = (values[crop : len(values) - crop, crop : values.shape[1] - crop] for values in (a, b))
    distance = None if lpips is None else _lpips(a, b, lpips)
    peak = 255.0 if protocol.rounds else 1.0
    if channel == "y":
        a, b = luma(a), luma(b)
    return Figures(psnr(a, b, peak), ssim(a, b, peak, protocol.window), distance)


def find_protocol(protocol: Protocol | str) -> Protocol:
    """Raises:

    ValueError: no protocol is called so.
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"there is no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


def psnr(image: np.ndarray, truth: np.ndarray, peak: float) -> float:
    """20 log10(peak / root mean squared error) in decibels; ``inf`` where both are equal.

    Args:
        image, truth: of one shape, in [0, peak].
    """
    if image.dtype == np.uint8:
        image, truth = image.astype(np.float64), truth.astype(np.float64)
    # Of float32, the rest is float32 too, as in BasicSR: the sixth decimal depends on it.
    error = np.mean((image - truth) ** 2)
    return math.inf if error == 0 else float(20 * np.log10(peak / np.sqrt(error)))


def ssim(image: np.ndarray, truth: np.ndarray, peak: float, window: Window) -> float:
    """Mean structural similarity (Wang et al. 2004), of colours the mean over channels.

    Args:
        image, truth: (height, width, 3) or (height, width), in [0, peak].
    """
    from skimage.metrics import structural_similarity

    if window == "gaussian":
        image, truth = image.astype(np.float64), truth.astype(np.float64)
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    colours = -1 if image.ndim == 3 else None
    options = gaussian if window == "gaussian" else {}
    return float(structural_similarity(image, truth, data_range=peak, channel_axis=colours, **options))


def luma(image: np.ndarray) -> np.ndarray:
    """(65.481 R + 128.553 G + 24.966 B) + 16 of colours in [0, 1]: [16, 235], not rounded (ITU-R BT.601).

    Args:
        image: (height, width, 3), uint8 or float32 in [0, 1].

    Returns:
        (height, width) float32: in [16, 235] of uint8, in [16, 235] / 255 of floats.
    """
    colours = image.astype(np.float32) / np.float32(255) if image.dtype == np.uint8 else image
    # Kept as float32 on the scale of [0, 1] in between, as BasicSR does: the sixth decimal of decibels depends on it.
    y = ((colours @ np.array([65.481, 128.553, 24.966]) + 16) / 255).astype(np.float32)
    return y * np.float32(255) if image.dtype == np.uint8 else y


def _pixels(image: Any, rounds: bool) -> np.ndarray:
    """(height, width, 3): uint8 where ``rounds``, else float32 in [0, 1]."""
    values = image.detach().cpu().float().numpy() if hasattr(image, "detach") and image.is_floating_point() else image
    values = values.cpu().numpy() if hasattr(values, "cpu") else np.asarray(values)
    if values.ndim != 3 or values.shape[0] != 3:
        raise ValueError(f"the image is {values.shape}, expected RGB (3, height, width)")
    values = values.transpose(1, 2, 0)
    if values.dtype == np.uint8:
        return values if rounds else values.astype(np.float32) / np.float32(255)
    if not np.issubdtype(values.dtype, np.floating) or not np.isfinite(values).all():
        raise ValueError(f"the image holds {values.dtype} or values that are not finite; expected floats or uint8")
    values = values.astype(np.float32).clip(0, 1)
    return (values * np.float32(255)).round().astype(np.uint8) if rounds else values


def _lpips(image: np.ndarray, truth: np.ndarray, lpips: LPIPS) -> float:
    import torch

    def signed(values: np.ndarray) -> torch.Tensor:
        scale = 255 if values.dtype == np.uint8 else 1
        return torch.from_numpy(values.astype(np.float32) / scale * 2 - 1).permute(2, 0, 1)[None]

    with torch.inference_mode():
        return float(lpips(signed(image), signed(truth)))


def _size(values: np.ndarray) -> str:
    return f"{values.shape[1]} x {values.shape[0]}"


def mean_figures(figures: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Means over images, name by name, of the values that are there and finite; None where there is none."""
    means: dict[str, float | None] = {}
    for name in dict.fromkeys(name for each in figures for name in each):
        values = [float(value) for each in figures if (value := each.get(name)) is not None and math.isfinite(value)]
        means[name] = sum(values) / len(values) if values else None
    return means
