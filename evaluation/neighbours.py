"""Nearest training images of generated ones: shows whether a generator repeats what it was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nextscale.evaluation.classifier import Classifier, check_images
from nextscale.evaluation.distances import nearest


@dataclass(frozen=True)
class Neighbours:
    """The k nearest training images of N samples, nearest first.

    index (N, k) int64: position in the order the training images were read in. distance (N, k) float64.
    images (N, k, 3, H, W): the training images themselves, in [0, 1].
    """

    index: Tensor
    distance: Tensor
    images: Tensor


@dataclass(frozen=True)
class NearestImages:
    """Neighbours under two distances, because neither finds every copy.

    features: Euclidean distance of the network's features; finds the same content. pixels: root of the mean
    squared difference of the values in [0, 1]; finds the same picture.
    """

    features: Neighbours
    pixels: Neighbours


def nearest_neighbours(
    samples: Tensor, training: Iterable[Tensor | tuple[Tensor, Tensor]], classifier: Classifier, *, k: int = 1
) -> NearestImages:
    """The k training images nearest to every sample, in the features of `classifier` and in pixels.

    samples: (N, 3, H, W) in [0, 1]. training: batches of images of the same height and width, or of (images,
    labels); they are read once and only the nearest are kept, so a training set of any size passes. Raises
    ValueError where sizes differ or fewer than k images come.
    """
    check_images(samples)
    if k < 1:
        raise ValueError(f"k is {k}; expected 1 or more")
    sample_features = classifier(samples)[0].cpu()
    sample_pixels = samples.detach().cpu().float()
    by_features: Neighbours | None = None
    by_pixels: Neighbours | None = None
    read = 0
    for batch in training:
        images = batch if isinstance(batch, Tensor) else batch[0]
        check_images(images)
        if images.shape[2:] != samples.shape[2:]:
            raise ValueError(
                f"training images are {tuple(images.shape[2:])} and samples "
                f"{tuple(samples.shape[2:])} pixels; expected one size (resize one of them)"
            )
        features = classifier(images)[0].cpu()
        images = images.detach().cpu().float()
        by_features = _merge(by_features, _closest(sample_features, features, images, k, read), k)
        in_pixels = _closest(sample_pixels.flatten(1), images.flatten(1), images, k, read)
        by_pixels = _merge(by_pixels, in_pixels, k)
        read += len(images)
    if read < k or by_features is None or by_pixels is None:
        raise ValueError(f"{read} training images were given; {k} nearest ones take at least {k}")
    values = sample_pixels[0].numel() if len(samples) else 1
    rms = Neighbours(by_pixels.index, by_pixels.distance / values**0.5, by_pixels.images)
    return NearestImages(features=by_features, pixels=rms)


def _closest(queries: Tensor, references: Tensor, images: Tensor, k: int, first: int) -> Neighbours:
    index, distance = nearest(queries, references, min(k, len(references)))
    return Neighbours(index + first, distance, images[index])


def _merge(kept: Neighbours | None, new: Neighbours, k: int) -> Neighbours:
    if kept is None:
        return new
    distance = torch.cat([kept.distance, new.distance], dim=1)
    # A stable sort: of equally near images the one read first stays, whatever the batches are.
    distance, order = distance.sort(dim=1, stable=True)
    distance, order = distance[:, :k], order[:, :k]
    index = torch.cat([kept.index, new.index], dim=1).gather(1, order)
    rows = torch.arange(len(order))[:, None]
    return Neighbours(index, distance, torch.cat([kept.images, new.images], dim=1)[rows, order])
