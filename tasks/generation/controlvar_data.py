"""Pairs of control pictures and images to train on: controls made on the fly, or read from trees beside the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.datasets.draws import uniforms_of
from nextscale.datasets.images import ImageDataset
from nextscale.tasks.generation.controls import Extraction, extract_batch

MADE_WITHOUT_WEIGHTS = ("canny", "hed", "sketch")
"""Kinds that need no learned detector."""

FIRST_DRAW = 4
"""Of the numbers drawn for a sample, those before belong to the image's augmentation and the class dropout."""


@dataclass(frozen=True)
class Kinds:
    """Which controls there are.

    Attributes:
        extractions: those made of each image.
        folders: trees of ready-made pictures by type, in the images' order and under their names, of the images' shape.
    """

    extractions: tuple[Extraction, ...] = ()
    folders: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        names = self.names
        if not names:
            raise ValueError("there is no control to train with: name kinds to extract, or folders of control pictures")
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"control type {repeated[0]!r} is given twice")
        for how in self.extractions:
            if how.kind not in MADE_WITHOUT_WEIGHTS:
                raise ValueError(
                    f"{how.kind} controls need a model and are not made while training: make the pictures beforehand "
                    f"and give their folder; on the fly there are {', '.join(MADE_WITHOUT_WEIGHTS)}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        return (*(how.kind for how in self.extractions), *(self.folders or {}))


class PairDataset:
    """Images with a control each; the control's type is drawn for every sample from (seed, epoch, sample).

    Args:
        images: the images, with labels.
        controls: a data set of control pictures for each folder of ``kinds``, opened as the images are, so that it
            crops and mirrors alike.

    Raises:
        ValueError: a control tree does not hold the images' names.
    """

    def __init__(
        self,
        images: ImageDataset,
        kinds: Kinds,
        controls: Sequence[ImageDataset],
        *,
        seed: int = 0,
    ) -> None:
        if not isinstance(images, ImageDataset):
            raise ValueError("images with controls are read in any order: they cannot be streamed")
        self.images, self.kinds, self.controls = images, kinds, controls
        self._seed = seed
        self.size, self.classes, self.labels, self.num_classes = (
            images.size,
            images.classes,
            images.labels,
            images.num_classes,
        )
        for name, tree in zip(kinds.folders or {}, controls, strict=True):
            _check_names(images, tree, name)

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, keys: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        """A batch: that of the images, and ``control`` (batch, 3, size, size) in [-1, 1]; ``type``, places in the
        names of ``kinds``; ``type_uniform`` in [0, 1); ``image_first``, drawn for the whole batch."""
        batch = self.images.fetch(keys)
        pairs = np.array([key if isinstance(key, tuple) else (0, key) for key in keys], np.int64)
        drawn = uniforms_of(self._seed, pairs[:, 0], pairs[:, 1], FIRST_DRAW + 3)[:, FIRST_DRAW:]
        count = len(self.kinds.names)
        chosen = torch.from_numpy((drawn[:, 0] * count).astype(np.int64))
        control = torch.empty_like(batch["image"])
        for number in range(count):
            rows = (chosen == number).nonzero()[:, 0]
            if not len(rows):
                continue
            if number < len(self.kinds.extractions):
                how = self.kinds.extractions[number]
                control[rows] = extract_batch((batch["image"][rows] + 1) / 2, how) * 2 - 1
            else:
                tree = self.controls[number - len(self.kinds.extractions)]
                control[rows] = self._read(tree, [keys[i] for i in rows.tolist()], batch, rows)
        return {
            **batch,
            "control": control,
            "type": chosen,
            "type_uniform": torch.from_numpy(drawn[:, 1]).float(),
            "image_first": bool(drawn[0, 2] < 0.5),
        }

    def _read(self, tree: ImageDataset, keys: Sequence[Any], batch: dict[str, Any], rows: Tensor) -> Tensor:
        """Control pictures of some rows of a batch.

        Raises:
            ValueError: a picture of a pair cannot be read: another control would be paired with the image.
        """
        found = tree.fetch(keys)
        if wrong := (found["index"] != batch["index"][rows]).nonzero()[:, 0].tolist():
            name = self.images.name(int(batch["index"][rows[wrong[0]]]))
            raise ValueError(
                f"of the pair of {name} one picture cannot be read: remove both, or replace the damaged one"
            )
        pictures: Tensor = found["image"]
        return pictures


def _check_names(images: ImageDataset, controls: ImageDataset, kind: str) -> None:
    def stem(name: str) -> str:
        return name.rsplit(".", 1)[0]

    if len(images) != len(controls):
        raise ValueError(f"there are {len(images)} images and {len(controls)} {kind} controls: one for each is needed")
    for index in range(len(images)):
        if stem(images.name(index)) != stem(controls.name(index)):
            raise ValueError(
                f"image {images.name(index)} has {controls.name(index)} in its place among the {kind} controls: give a "
                "tree with the same folders and names"
            )
