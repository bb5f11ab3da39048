"""Photos and depth maps alike as pictures, for a tokenizer of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nextscale.core.training import Batch
from nextscale.datasets.depth import DepthDataset
from nextscale.tasks.depth.depthart_normalizer import DepthNormalizer
from nextscale.tasks.depth.sets import DepthSet

Key = int | tuple[int, int]


@dataclass(frozen=True)
class DepthPictures:
    """Attributes:

    pairs: photos with depth.
    normalizer: how depth becomes a grey picture.
    """

    pairs: DepthSet
    normalizer: DepthNormalizer = field(default_factory=DepthNormalizer)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.pairs.size

    def training_images(self, seed: int, labels: bool) -> PictureSet:
        """All pictures; ``labels`` are not asked for, and not there."""
        return PictureSet(self.pairs.open_training(seed), self.normalizer)

    def open_validation(self, labels: bool) -> PictureSet | None:
        """The held-out ones, without augmentation."""
        pairs = self.pairs.open_validation()
        return None if pairs is None else PictureSet(pairs, self.normalizer)


class PictureSet:
    """All photos of some pairs and all their depth maps: number 2 i is photo i, 2 i + 1 its depth."""

    def __init__(self, pairs: DepthDataset, normalizer: DepthNormalizer) -> None:
        self.pairs, self.normalizer, self.size = pairs, normalizer, pairs.size

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def fetch(self, keys: Sequence[Key]) -> Batch:
        """A batch: ``image`` (n, 3, height, width) in [-1, 1]."""
        places = [key if isinstance(key, tuple) else (0, key) for key in keys]
        batch = self.pairs.fetch([(epoch, number // 2) for epoch, number in places])
        images = batch["image"].clone()
        grey = torch.tensor([number % 2 == 1 for _, number in places])
        if grey.any():
            images[grey] = self.normalizer.target(batch["depth"][grey], batch["valid"][grey]).expand(-1, 3, -1, -1)
        return {"image": images}
