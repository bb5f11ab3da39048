"""Random changes of a photograph that leave its depth, mask and camera right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """How strongly batches are changed; each photo's changes depend on (seed, epoch, index) alone.

    Attributes:
        flip: probability of mirroring.
        zoom: largest enlargement; a crop covers between 1 and 1 / zoom of the largest crop's sides. Depth stays as it
            is, since the focal length grows with the crop.
        rotation: degrees by which the camera is rolled at most, either way, about the principal point.
        brightness, contrast, saturation, gamma: factors are drawn from 1 - value to 1 + value.
        hue: turns of the colour circle at most, either way, in [0, 0.5].
        cut_depth: probability of CutDepth (Ishii and Yamashita 2021, arXiv 2107.07684), in DAR's form: a strip of full
            height shows the depth, as a share of the photo's largest, instead of the picture. Its left edge is drawn
            evenly, its width up to three quarters of what is right of that.
        cut_flip: probability of CutFlip (Shao et al. 2023, URCDC-Depth, arXiv 2302.08149): the parts above and below
            a line drawn between a fifth and four fifths of the height change places. No camera sees that, so the
            intrinsics become unknown.
    """

    flip: float = 0.5
    zoom: float = 1.0
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    gamma: float = 0.0
    hue: float = 0.0
    cut_depth: float = 0.0
    cut_flip: float = 0.0

    def __post_init__(self) -> None:
        factors = (self.brightness, self.contrast, self.saturation, self.gamma)
        if (
            not all(0 <= chance <= 1 for chance in (self.flip, self.cut_depth, self.cut_flip))
            or self.zoom < 1
            or not 0 <= self.rotation < 90
            or not all(0 <= value < 1 for value in factors)
            or not 0 <= self.hue <= 0.5
        ):
            raise ValueError(
                f"{self}: expected flip, cut_depth and cut_flip in [0, 1], zoom of 1 or more, rotation in [0, 90), "
                "hue in [0, 0.5] and the others in [0, 1)"
            )


TRAINING = Augmentation(
    flip=0.5, zoom=1.5, rotation=2.5, brightness=0.15, contrast=0.15, saturation=0.25, gamma=0.15, hue=0.03
)
"""A mild mixture, for training."""

DRAWS = 15
"""Uniform numbers that one photo takes: zoom, place across and down of the crop, then :func:`augment`'s."""


@dataclass
class DepthBatch:
    """Attributes:

    image: (n, 3, height, width) in [0, 1]. depth: (n, 1, height, width) metres. valid: bool, the same.
    intrinsics: (n, 3, 3), NaN where they are not known.
    """

    image: Tensor
    depth: Tensor
    valid: Tensor
    intrinsics: Tensor


def augment(batch: DepthBatch, setting: Augmentation, drawn: Tensor) -> DepthBatch:
    """Mirror, roll, recolour and cut up each photo of a batch.

    Args:
        drawn: float64 (n, 12) in [0, 1).
    """
    batch = _mirror(batch, drawn[:, 0] < setting.flip)
    if setting.rotation:
        batch = _roll(batch, (2 * drawn[:, 1] - 1).float() * setting.rotation)
    batch.image = _recolour(batch.image, setting, drawn[:, 2:7])
    if setting.cut_flip:
        batch = _swap_parts(batch, drawn[:, 7] < setting.cut_flip, drawn[:, 8])
    if setting.cut_depth:
        batch.image = _show_depth(batch, drawn[:, 9] < setting.cut_depth, drawn[:, 10], drawn[:, 11])
    return batch


def _mirror(batch: DepthBatch, chosen: Tensor) -> DepthBatch:
    if not bool(chosen.any()):
        return batch
    for name in ("image", "depth", "valid"):
        values = getattr(batch, name)
        setattr(batch, name, torch.where(chosen[:, None, None, None], values.flip(-1), values))
    mirrored = batch.intrinsics.clone()
    mirrored[chosen, 0, 2] = batch.image.shape[-1] - 1 - mirrored[chosen, 0, 2]
    batch.intrinsics = mirrored
    return batch


def _roll(batch: DepthBatch, degrees: Tensor) -> DepthBatch:
    """Turn about the principal point: the depths, measured along the axis, stay what they are."""
    from kornia.geometry.transform import get_rotation_matrix2d, warp_affine

    height, width = batch.image.shape[-2:]
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2])
    centre = batch.intrinsics[:, :2, 2]
    centre = torch.where(centre.isfinite(), centre, middle)
    matrix = get_rotation_matrix2d(centre, degrees, torch.ones_like(centre))
    size = (height, width)
    depth = warp_affine(batch.depth, matrix, size, mode="nearest", padding_mode="zeros")
    valid = warp_affine(batch.valid.float(), matrix, size, mode="nearest", padding_mode="zeros") > 0.5
    image = warp_affine(batch.image, matrix, size, mode="bilinear", padding_mode="reflection")
    return DepthBatch(image.clamp(0, 1), torch.where(valid, depth, 0), valid, batch.intrinsics)


def _swap_parts(batch: DepthBatch, chosen: Tensor, where: Tensor) -> DepthBatch:
    height = batch.image.shape[-2]
    lines = ((0.2 + 0.6 * where) * height).long().clamp(1, max(height - 1, 1))
    rows = torch.arange(height)[None] + torch.where(chosen, lines, 0)[:, None]
    taken = (rows % height)[:, None, :, None]

    def swapped(values: Tensor) -> Tensor:
        return values.gather(2, taken.expand_as(values))

    camera = torch.where(chosen[:, None, None], torch.nan, batch.intrinsics)
    return DepthBatch(swapped(batch.image), swapped(batch.depth), swapped(batch.valid), camera)


def _show_depth(batch: DepthBatch, chosen: Tensor, left: Tensor, share: Tensor) -> Tensor:
    width = batch.image.shape[-1]
    start = (left * width).floor()
    stop = start + ((width - start) * share * 0.75).floor().clamp(min=1)
    columns = torch.arange(width)[None]
    strip = (columns >= start[:, None]) & (columns < stop[:, None]) & chosen[:, None]
    depth = torch.where(batch.valid, batch.depth, 0)
    grey = depth / depth.amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(depth.dtype).tiny)
    return torch.where(strip[:, None, None], grey, batch.image)


def _recolour(image: Tensor, setting: Augmentation, drawn: Tensor) -> Tensor:
    from kornia import enhance

    def factors(column: int, strength: float) -> Tensor:
        return (1 + (2 * drawn[:, column] - 1) * strength).float()

    if setting.brightness:
        image = enhance.adjust_brightness_accumulative(image, factors(0, setting.brightness))
    if setting.contrast:
        image = enhance.adjust_contrast_with_mean_subtraction(image, factors(1, setting.contrast))
    if setting.saturation:
        image = enhance.adjust_saturation(image, factors(2, setting.saturation))
    if setting.gamma:
        image = enhance.adjust_gamma(image, factors(3, setting.gamma))
    if setting.hue:
        turns = (2 * drawn[:, 4] - 1).float() * setting.hue
        image = enhance.adjust_hue(image, turns * (2 * torch.pi))
    return image.clamp(0, 1)
