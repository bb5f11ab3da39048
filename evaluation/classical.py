"""Restoration without learning: what a network has to beat. scikit-image's denoisers and deconvolution, tone curves,
and the dark-channel prior, all behind one call, images (3, height, width) in [0, 1] in and out.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor

Colours = np.ndarray
"""(height, width, 3), float32 in [0, 1]."""


def unchanged(image: Colours) -> Colours:
    """The degraded image itself."""
    return image


def _sigma(image: Colours) -> float:
    """Standard deviation of the noise, estimated from the finest wavelets (Donoho and Johnstone 1994)."""
    from skimage.restoration import estimate_sigma

    if min(image.shape[:2]) < 4:
        return 0.0
    found = float(estimate_sigma(image, channel_axis=-1, average_sigmas=True))
    return found if np.isfinite(found) else 0.0


def nlm(image: Colours, h: float = 0.8, patch: int = 5, reach: int = 6) -> Colours:
    """Non-local means (Buades et al. 2005), of patches of ``patch`` pixels, up to ``reach`` pixels away.

    Args:
        h: strength, times the estimated noise.
    """
    from skimage.restoration import denoise_nl_means

    if min(image.shape[:2]) < 4:
        return image
    sigma = _sigma(image)
    return np.asarray(
        denoise_nl_means(image, patch, reach, h=max(h * sigma, 1e-6), sigma=sigma, fast_mode=True, channel_axis=-1)
    )


def tv(image: Colours, weight: float = 1.0) -> Colours:
    """Total variation (Chambolle 2004).

    Args:
        weight: strength, times the estimated noise.
    """
    from skimage.restoration import denoise_tv_chambolle

    return np.asarray(denoise_tv_chambolle(image, weight=max(weight * _sigma(image), 1e-6), channel_axis=-1))


def wavelet(image: Colours, strength: float = 1.0) -> Colours:
    """Wavelets, soft thresholds by BayesShrink (Chang et al. 2000), of luma and colour differences.

    Args:
        strength: times the estimated noise.
    """
    from skimage.restoration import denoise_wavelet

    if min(image.shape[:2]) < 4:
        return image
    sigma = max(strength * _sigma(image), 1e-6)
    # In luma and colour differences the noise is estimated anew, unless it is told.
    options = {"sigma": [sigma] * 3} if strength != 1 else {}
    return np.asarray(
        denoise_wavelet(image, convert2ycbcr=True, channel_axis=-1, method="BayesShrink", rescale_sigma=True, **options)
    )


def wiener(image: Colours, psf: np.ndarray | None = None, sigma: float = 1.5) -> Colours:
    """Unsupervised Wiener deconvolution (Orieux et al. 2010).

    Args:
        psf: the blur's kernel; a Gaussian of ``sigma`` pixels unless given.
    """
    from skimage.restoration import unsupervised_wiener

    def sharpened(channel: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        # With the sampler's start fixed an image always gives the same.
        return np.asarray(unsupervised_wiener(channel, kernel, clip=False, rng=np.random.default_rng(0))[0])

    return _deconvolved(image, psf, sigma, sharpened)


def lucy(image: Colours, psf: np.ndarray | None = None, sigma: float = 1.5, steps: int = 20) -> Colours:
    """Richardson-Lucy deconvolution; the arguments as of :func:`wiener`."""
    from skimage.restoration import richardson_lucy

    def sharpened(channel: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        return np.asarray(richardson_lucy(channel + 1e-3, kernel, steps)) - 1e-3

    return _deconvolved(image, psf, sigma, sharpened)


def _deconvolved(
    image: Colours,
    psf: np.ndarray | None,
    sigma: float,
    sharpened: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Colours:
    """Channel by channel, the picture mirrored at its borders: these methods take it for periodic."""
    if psf is None:
        place = np.arange(-int(3 * sigma + 1), int(3 * sigma + 1) + 1)
        psf = np.exp(-(place[:, None] ** 2 + place**2) / (2 * sigma**2))
        psf = psf / psf.sum()
    border = max(24, 2 * max(psf.shape))
    padded = np.pad(image.astype(np.float64), ((border, border), (border, border), (0, 0)), "symmetric")
    sharp = np.stack([sharpened(padded[..., channel], psf) for channel in range(3)], -1)
    return sharp[border:-border, border:-border]


def gamma(image: Colours, gamma: float = 0.4, gain: float = 1.0) -> Colours:
    """The tone curve gain x^gamma, brighter with gamma below 1."""
    return gain * image**gamma


def clahe(image: Colours, clip: float = 0.01, tiles: int = 8) -> Colours:
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994) of the value, ``tiles`` along a side."""
    from skimage.exposure import equalize_adapthist

    size = tuple(max(side // tiles, 1) for side in image.shape[:2])
    return np.asarray(equalize_adapthist(image, kernel_size=size, clip_limit=clip))


def dcp(image: Colours, omega: float = 0.95, window: int = 15, radius: int = 30, floor: float = 0.1) -> Colours:
    """Dark-channel prior (He, Sun and Tang 2009), its transmission refined by a guided filter.

    Args:
        omega: share of the haze that is taken away.
        window: of the dark channel, in pixels. radius: of the guided filter.
        floor: smallest transmission.
    """
    dark = ndimage.minimum_filter(image.min(-1), window)
    brightest = dark.ravel().argsort()[-max(dark.size // 1000, 1) :]
    candidates = image.reshape(-1, 3)[brightest]
    airlight = candidates[candidates.sum(1).argmax()].clip(0.05)
    seen = 1 - omega * ndimage.minimum_filter((image / airlight).min(-1), window)
    seen = _guided(image.mean(-1), seen, radius, 1e-3).clip(floor, 1)[..., None]
    return (image - airlight) / seen + airlight


def _guided(guide: np.ndarray, values: np.ndarray, radius: int, smoothing: float) -> np.ndarray:
    """The guided filter (He et al. 2010), equations 5, 6 and 8."""

    def mean(x: np.ndarray) -> np.ndarray:
        return ndimage.uniform_filter(x.astype(np.float64), 2 * radius + 1, mode="reflect")

    centre, level = mean(guide), mean(values)
    slope = (mean(guide * values) - centre * level) / (mean(guide * guide) - centre**2 + smoothing)
    return mean(slope) * guide + mean(level - slope * centre)


METHODS: dict[str, Callable[..., Colours]] = {
    "none": unchanged,
    "nlm": nlm,
    "tv": tv,
    "wavelet": wavelet,
    "wiener": wiener,
    "lucy": lucy,
    "gamma": gamma,
    "clahe": clahe,
    "dcp": dcp,
}
"""By name; their keyword arguments are their options."""

GRIDS: dict[str, dict[str, Sequence[float]]] = {
    "none": {},
    "nlm": {"h": (0.4, 0.6, 0.8, 1.0), "patch": (3, 5)},
    "tv": {"weight": (0.5, 1.0, 1.5, 2.0)},
    "wavelet": {"strength": (0.7, 1.0, 1.5, 2.0)},
    "wiener": {},
    "lucy": {"steps": (5, 10, 20, 40)},
    "gamma": {"gamma": (0.3, 0.4, 0.5, 0.6, 0.8), "gain": (1.0, 1.2)},
    "clahe": {"clip": (0.005, 0.01, 0.02, 0.04), "tiles": (2, 8)},
    "dcp": {"omega": (0.6, 0.8, 0.95), "floor": (0.1, 0.3)},
}
"""Options among which :func:`tuned` chooses."""


@dataclass(frozen=True)
class Classical:
    """A classical method, used as a model: ``Classical("nlm").restore(image)``.

    Attributes:
        method: a name of :data:`METHODS`.
        options: of the method; the others have its defaults.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"there is no classical method {self.method!r}; there are {', '.join(METHODS)}")
        known = list(inspect.signature(METHODS[self.method]).parameters)[1:]
        if unknown := [name for name in self.options if name not in known]:
            raise ValueError(f"{self.method} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")

    @classmethod
    def parse(cls, text: str) -> Classical:
        """From text such as ``nlm`` or ``nlm:h=0.6,patch=3``.

        Raises:
            ValueError: the method or an option is unknown, or a value is no number.
        """
        name, _, rest = text.partition(":")
        options: dict[str, float] = {}
        for part in filter(None, rest.split(",")):
            key, _, value = part.partition("=")
            try:
                options[key] = int(value) if value.lstrip("-").isdigit() else float(value)
            except ValueError:
                raise ValueError(f"{part!r} is no option of {name}; expected NAME=NUMBER") from None
        return cls(name, options)

    def __str__(self) -> str:
        options = ",".join(f"{name}={value:g}" for name, value in self.options.items() if not np.ndim(value))
        return f"{self.method}:{options}" if options else self.method

    def restore(self, image: Float[Tensor, "3 height width"]) -> Float[Tensor, "3 height width"]:
        """An image in [0, 1]; the result is clipped to [0, 1]."""
        colours = image.detach().cpu().float().permute(1, 2, 0).numpy().clip(0, 1)
        restored = METHODS[self.method](colours, **self.options)
        return torch.from_numpy(np.ascontiguousarray(restored.transpose(2, 0, 1), np.float32)).clamp(0, 1)


def tuned(
    method: str,
    pairs: Iterable[tuple[Tensor, Tensor]],
    fixed: Mapping[str, Any] | None = None,
) -> Classical:
    """The method with the options of :data:`GRIDS` that give the highest mean PSNR.

    Args:
        pairs: degraded and clean images, (3, height, width) in [0, 1]; not those it is then measured on.
        fixed: options that are not searched, such as ``psf``.
    """
    pairs, grid, fixed = list(pairs), GRIDS[method], dict(fixed or {})
    candidates = [
        Classical(method, {**dict(zip(grid, values, strict=True)), **fixed})
        for values in itertools.product(*grid.values())
    ]
    if len(candidates) == 1:
        return candidates[0]

    def quality(candidate: Classical) -> float:
        errors = [(candidate.restore(degraded) - clean).square().mean().item() for degraded, clean in pairs]
        return float(np.mean(-10 * np.log10(np.maximum(errors, 1e-12))))

    return max(candidates, key=quality)
