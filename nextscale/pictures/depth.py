"""Depth maps as files: 16-bit PNG, and coloured pictures."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

DEEPEST = 65535
"""Largest value of a 16-bit PNG."""

COLOURMAP = "Spectral"
"""Near is red, far is blue."""


def depth_png(depth: Any, scale: float) -> bytes:
    """A 16-bit grey PNG: value = depth x scale, rounded, at most 65535; what is not positive and finite is 0.

    depth: floats (height, width), a tensor or an array. scale: steps per unit; 256 per metre is KITTI's, 1000 per
    metre most indoor data sets', 65535 takes relative depth in [0, 1] whole. A positive depth is at least 1, as 0
    stands for unknown. Raises ValueError for another shape, or a scale that is not positive.
    """
    values = _plain(depth)
    if not scale > 0:
        raise ValueError(f"the scale is {scale}; expected more than 0")
    known = np.isfinite(values) & (values > 0)
    steps = np.where(known, (values * np.float32(scale) + np.float32(0.5)).clip(1, DEEPEST), 0).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(steps).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def depth_picture(depth: Any, colourmap: str = COLOURMAP, near: float | None = None, far: float | None = None) -> Any:
    """A coloured picture of a depth map, uint8 (3, height, width); unknown pixels are black.

    colourmap: one of matplotlib's, by name. near, far: depths of its two ends; unless given, the 2nd and the 98th
    percentile. Raises ValueError for an unknown colourmap.
    """
    import matplotlib

    values = _plain(depth)
    if colourmap not in matplotlib.colormaps:
        raise ValueError(f"matplotlib has no colourmap {colourmap!r}; it has Spectral, turbo, viridis, magma, gray, …")
    known = np.isfinite(values) & (values > 0)
    if known.any() and (near is None or far is None):
        every = max(1, values.size // 1_000_000)  # of a large photo, a million pixels tell the percentiles
        some = values.reshape(-1)[::every][known.reshape(-1)[::every]]
        some = some if some.size else values[known]
        low, high = np.percentile(some, (2, 98))
        near, far = (low if near is None else near), (high if far is None else far)
    near, far = near or 0.0, far or 1.0
    table = (matplotlib.colormaps[colourmap](np.arange(256), bytes=True)[:, :3]).astype(np.uint8)
    share = (np.where(known, values, near) - np.float32(near)) / np.float32(max(far - near, 1e-12))
    picture = table[(share.clip(0, 1) * 255).round().astype(np.uint8)]
    picture[~known] = 0
    return picture.transpose(2, 0, 1)


def _plain(depth: Any) -> np.ndarray:
    values = np.asarray(depth.detach().cpu().float() if hasattr(depth, "detach") else depth, np.float32)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"the depth map has shape {values.shape}; expected (height, width)")
    return values
