"""Resizing depth maps as evaluators do, and merging the prediction of a photo with that of its mirror image."""

from __future__ import annotations

from typing import Literal

import numpy as np

Interpolation = Literal["bilinear", "bilinear_corners", "nearest"]
"""bilinear: pixel centres at halves, edges repeated (OpenCV's, and torch's align_corners False). bilinear_corners:
corner pixels stay (align_corners True). nearest: rounded down (torch's and OpenCV's)."""


def resize_map(depth: np.ndarray, size: tuple[int, int], how: Interpolation = "bilinear") -> np.ndarray:
    """Resize (height, width), or (n, height, width), to ``size`` (height, width); of the input's type.

    A boolean map is resized by ``nearest`` only.
    """
    import torch

    depth = np.asarray(depth)
    if depth.ndim not in (2, 3) or not depth.size:
        raise ValueError(f"a map of shape {depth.shape}; expected (height, width) or (n, height, width)")
    if depth.shape[-2:] == tuple(size):
        return depth
    if how != "nearest" and depth.dtype.kind != "f":
        raise ValueError(f"a map of {depth.dtype} cannot be interpolated; give floats, or resize by nearest")
    real = depth if depth.dtype in (np.float32, np.float64) else depth.astype(np.float32)
    planes = torch.from_numpy(np.ascontiguousarray(real)).reshape(1, -1, *depth.shape[-2:])
    if how == "nearest":
        resized = torch.nn.functional.interpolate(planes, size, mode="nearest")
    else:
        corners = how == "bilinear_corners"
        resized = torch.nn.functional.interpolate(planes, size, mode="bilinear", align_corners=corners)
    result: np.ndarray = resized.reshape(*depth.shape[:-2], *size).numpy().astype(depth.dtype, copy=False)
    return result


def merge_mirrored(plain: np.ndarray, mirrored: np.ndarray, how: Literal["mean", "edges"] = "mean") -> np.ndarray:
    """Merge the map of an image with that of its mirror image.

    Args:
        plain: (..., height, width) of the image.
        mirrored: the same of the mirrored image, still mirrored.
        how: mean: of both (DAR). edges: of both, but in the outer 5 % of columns fading into the one of which that
            side is not the blind one (monodepth2, for disparities of a stereo-trained network): with x from 0 to 1
            across, a = 1 - clip(20 (x - 0.05), 0, 1) for the mirrored and a reversed for the plain one.
    """
    if plain.shape != mirrored.shape:
        raise ValueError(f"maps of {plain.shape} and, of the mirror image, {mirrored.shape}; expected the same shape")
    turned = mirrored[..., ::-1]
    if how == "mean":
        mean: np.ndarray = (plain + turned) / 2
        return mean
    across = np.linspace(0, 1, plain.shape[-1])
    left = 1 - np.clip(20 * (across - 0.05), 0, 1)
    right = left[::-1]
    merged: np.ndarray = right * plain + left * turned + (1 - left - right) * (plain + turned) / 2
    return merged
