"""What recipes share: naming a data set in a configuration, and the stream of batches made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.training import Batch, Trainer, TrainingConfig
from nextscale.datasets.draws import uniforms_of
from nextscale.datasets.images import ImageDataset, open_images
from nextscale.datasets.loader import make_loader
from nextscale.datasets.sampler import EpochSampler

Load = Callable[..., Any]
"""Reads a model: of its file or folder, and, where a file's own tokenizer is to be replaced, another tokenizer."""


@dataclass(frozen=True)
class Examples:
    """Pictures of how far a run has come.

    Attributes:
        rows: (caption, images (3, height, width) in [0, 1]).
        headings: one per column.
    """

    rows: Sequence[tuple[str, Sequence[Tensor]]]
    headings: Sequence[str] | None = None


@dataclass(frozen=True)
class ImageData:
    """A set of images.

    Attributes:
        source: folder, class folders, parquet or webdataset shards, or a pattern of them.
        validation: held-out images, in the same forms.
        size: side of the square crops, in pixels.
        flip: mirror at random.
        resize_ratio: the shorter side is resized to this times ``size`` before the crop.
    """

    source: str
    validation: str | None = None
    size: int = 256
    flip: bool = False
    resize_ratio: float = 1.125

    def open_training(self, seed: int, labels: bool) -> ImageDataset:
        return open_images(
            self.source, size=self.size, flip=self.flip, resize_ratio=self.resize_ratio, seed=seed, labels=labels
        )

    def open_validation(self, labels: bool) -> ImageDataset | None:
        """Centre crops of the held-out images, without augmentation."""
        if self.validation is None:
            return None
        return open_images(
            self.validation, size=self.size, crop="center", resize_ratio=self.resize_ratio, labels=labels
        )


def stream(dataset: Any, config: TrainingConfig) -> Callable[[int, int], Iterator[Batch]]:
    """The endless micro-batches a :class:`nextscale.core.training.Trainer` takes.

    Every batch also carries ``uniform``, float32 in [0, 1) per sample, drawn from (seed, epoch, sample): what
    a task draws per sample is the same on any number of processes and after any interruption.
    """

    def batches(start: int, micro_batch: int) -> Iterator[Batch]:
        from accelerate import PartialState

        state = PartialState()

        def sampler() -> EpochSampler:
            return EpochSampler(
                len(dataset),
                batch_size=micro_batch,
                rank=state.process_index,
                world_size=state.num_processes,
                seed=config.seed,
                start_batch=start,
            )

        pin = torch.cuda.is_available()
        loader = make_loader(dataset, sampler(), workers=config.workers, pin_memory=pin)
        for keys, batch in zip(sampler(), loader, strict=False):
            epochs, indices = np.array(keys, dtype=np.int64).T
            # The fourth number: the first three already decide a sample's view, mirroring and crop.
            batch["uniform"] = torch.from_numpy(uniforms_of(config.seed, epochs, indices, 4)[:, 3]).float()
            yield batch

    return batches


def trainer(config: TrainingConfig, task: Any, dataset: Any, hooks: Any = None) -> Trainer:
    """A trainer of ``task`` on ``dataset``."""
    return Trainer(config, task, stream(dataset, config), len(dataset), hooks)


def tokenizer_of(model: Any) -> Any:
    """The model itself where it is a tokenizer, else the tokenizer inside it."""
    return getattr(model, "tokenizer", model)
