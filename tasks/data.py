"""What recipes share: naming a data set in a configuration, and the stream of batches made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.training import Batch, Trainer, TrainingConfig
from nextscale.datasets.draws import uniforms_of
from nextscale.datasets.images import ImageDataset, open_images
from nextscale.datasets.loader import make_loader
from nextscale.datasets.sampler import EpochSampler
from nextscale.datasets.stream_shards import StreamShards, is_stream, open_stream_shards
from nextscale.datasets.streaming import StreamedImages, open_stream

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
        source: folder, class folders, lists (.jsonl), parquet or webdataset shards, or a pattern of them.
        validation: held-out images, in the same forms.
        size: side of the square crops, in pixels.
        flip: mirror at random.
        resize_ratio: the shorter side is resized to this times ``size`` before the crop.
        streaming: read webdataset shards as streams, without an index of all images; None: where ``source`` is URLs,
            commands (``pipe:``) or an index of shards (.json), which can be read in no other way.
        lanes: when streaming, parts of an epoch that are read side by side; give a multiple of every number of
            processes that the run may go on with. None: up to 24.
        shuffle_buffer: when streaming, images that each lane draws the next one from; None: 200.
    """

    source: str
    validation: str | None = None
    size: int = 256
    flip: bool = False
    resize_ratio: float = 1.125
    streaming: bool | None = None
    lanes: int | None = None
    shuffle_buffer: int | None = None

    @property
    def streamed(self) -> bool:
        """Whether the training images are streamed."""
        return is_stream(self.source) if self.streaming is None else self.streaming

    def training_images(self, seed: int, labels: bool) -> ImageDataset | StreamedImages:
        """The training images, indexed or streamed."""
        if not self.streamed:
            return self.open_training(seed, labels)
        return open_stream(stream_shards(self.source), labels=labels, **self.streaming_options(seed))

    def streaming_options(self, seed: int) -> dict[str, Any]:
        """What :func:`nextscale.datasets.streaming.open_stream` is told of how to read."""
        view = {"size": self.size, "flip": self.flip, "resize_ratio": self.resize_ratio}
        return {**view, "seed": seed, "lanes": self.lanes, "buffer": self.shuffle_buffer}

    def open_training(self, seed: int, labels: bool) -> ImageDataset:
        """The training images, in any order.

        Raises:
            ValueError: they can only be streamed.
        """
        if self.streamed:
            raise ValueError(
                f"{self.source} can only be streamed, and here images are read in any order: "
                "give a folder, or local shards without data.streaming"
            )
        return open_images(
            self.source, size=self.size, flip=self.flip, resize_ratio=self.resize_ratio, seed=seed, labels=labels
        )

    def open_validation(self, labels: bool) -> ImageDataset | None:
        """Centre crops of the held-out images, without augmentation."""
        if self.validation is None:
            return None
        if is_stream(self.validation):
            raise ValueError(
                f"{self.validation} can only be streamed: give held-out images in a folder or local shards"
            )
        return open_images(
            self.validation, size=self.size, crop="center", resize_ratio=self.resize_ratio, labels=labels
        )


@lru_cache(maxsize=8)
def stream_shards(source: str) -> StreamShards:
    """The shards to stream. The first process counts their samples, where they have no index, for all.

    Raises:
        ValueError: there are none.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return open_stream_shards(source)
    from accelerate.utils import broadcast_object_list

    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [open_stream_shards(source)]
        except (ValueError, OSError) as error:  # all must hear of it, or they would wait for ever
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    shards: StreamShards = found[0]
    return shards


def stream(dataset: Any, config: TrainingConfig) -> Callable[[int, int], Iterator[Batch]]:
    """The endless micro-batches a :class:`nextscale.core.training.Trainer` takes.

    Where a dataset has ``groups``, a number for each sample, a batch holds samples of one group.

    Every batch also carries ``uniform``, float32 in [0, 1) per sample, and ``seeds``, whole numbers from which a task
    draws more (:func:`nextscale.core.random.sample_draws`), both of (seed, epoch, sample): what is drawn for a
    sample is the same on any number of processes and after any interruption.
    """

    def batches(start: int, micro_batch: int) -> Iterator[Batch]:
        from accelerate import PartialState

        state = PartialState()
        pin = torch.cuda.is_available()
        if isinstance(dataset, StreamedImages):
            rank, processes = state.process_index, state.num_processes
            for batch in dataset.batches(
                start, micro_batch, rank=rank, processes=processes, workers=config.workers, pin_memory=pin
            ):
                batch["seeds"] = ((batch["uniform"].double() + batch["epoch"]) * 2**24).long().tolist()
                yield batch

        def sampler() -> EpochSampler:
            return EpochSampler(
                len(dataset),
                batch_size=micro_batch,
                rank=state.process_index,
                world_size=state.num_processes,
                seed=config.seed,
                groups=getattr(dataset, "groups", None),
                start_batch=start,
            )

        loader = make_loader(dataset, sampler(), workers=config.workers, pin_memory=pin)
        for keys, batch in zip(sampler(), loader, strict=False):
            epochs, indices = np.array(keys, dtype=np.int64).T
            # From the fourth number on: the first three already decide a sample's view, mirroring and crop.
            drawn = uniforms_of(config.seed, epochs, indices, 5)
            batch["uniform"] = torch.from_numpy(drawn[:, 3]).float()
            batch["seeds"] = (drawn[:, 4] * 2.0**53).astype(np.int64).tolist()
            yield batch

    return batches


def trainer(config: TrainingConfig, task: Any, dataset: Any, hooks: Any = None) -> Trainer:
    """A trainer of ``task`` on ``dataset``."""
    return Trainer(config, task, stream(dataset, config), len(dataset), hooks)


def tokenizer_of(model: Any) -> Any:
    """The model itself where it is a tokenizer, else the tokenizer inside it."""
    return getattr(model, "tokenizer", model)
