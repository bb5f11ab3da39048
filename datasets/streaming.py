"""Training images from shards that are streamed: never indexed, never fetched whole.

Which sample comes when is laid down by `stream_plan`; this file reads it: a shuffle buffer for each lane
(webdataset's, its draws from seed, epoch and lane), decoding, batches, in this process or put together from the parts
that workers read. webdataset's own division of shards over nodes and workers gives whole shards away, so that epochs
end unequal wherever counts do not divide; here they cannot.

What is broken changes nothing for the rest: in the places of samples that a shard does not give, those of the
shards that follow it in the epoch are seen; in the place of an image that cannot be decoded, the next one of its lane.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, Literal, cast

import numpy as np

from .decoding import CENTRE, Planes, decode, square, to_signed
from .draws import uniforms, uniforms_of
from .errors import ImageError, LabelError, UnreadableImagesError
from .images import MAX_UNREADABLE, Key
from .loader import pinned
from .shards import LABELS, Side
from .stream_lanes import Encoded, Lanes
from .stream_plan import Range, StreamPlan, lanes_of
from .stream_shards import NO_SIDE, StreamShards, open_stream_shards

BUFFER = 200
"""Samples that the shuffle buffer of a lane holds, as files."""


def open_stream(
    source: str | StreamShards,
    *,
    size: int,
    crop: Literal["random", "center"] = "random",
    flip: bool = False,
    resize_ratio: float = 1.125,
    seed: int = 0,
    labels: bool = True,
    lanes: int | None = None,
    buffer: int | None = None,
) -> "StreamedImages":
    """Open webdataset shards to be streamed: a pattern of URLs, commands or local names, or an index (.json).

    Images are cropped and mirrored as by `open_images`, with the same draws for the same sample. `lanes`: shares of
    an epoch that are read side by side; a multiple of every number of processes that a run may go on with. `buffer`:
    samples in each lane's shuffle buffer; 1: no shuffling of samples.

    Raises SourceError, NoImagesError, ValueError, OSError.
    """
    shards = open_stream_shards(source) if isinstance(source, str) else source
    view = View(size, crop, flip, resize_ratio)
    side = LABELS if labels else NO_SIDE
    return StreamedImages(shards, view, side, seed=seed, lanes=lanes, buffer=BUFFER if buffer is None else buffer)


@dataclass(frozen=True)
class View:
    """How a square is cut from an image, see `open_images`."""

    size: int
    crop: Literal["random", "center"]
    flip: bool
    resize_ratio: float

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size {self.size} must be at least 1 pixel")
        if self.resize_ratio != 0 and not 1 <= self.resize_ratio < 100:
            raise ValueError(
                f"resize_ratio {self.resize_ratio} must be at least 1, so that the crop fits, or 0 for no resizing"
            )

    def of(self, planes: Planes, drawn: Sequence[float]) -> np.ndarray:
        """(3, size, size) of an image. Raises ImageError where it is too small and not to be resized."""
        if not self.resize_ratio and min(planes[0].size) < self.size:
            raise ImageError(f"is {planes[0].size[0]} x {planes[0].size[1]}, smaller than {self.size} (resize_ratio 0)")
        across, down = drawn[1:] if self.crop == "random" else (CENTRE, CENTRE)
        flip = self.flip and drawn[0] < 0.5
        return square(planes, self.size, ratio=self.resize_ratio, flip=flip, across=across, down=down)


@dataclass(frozen=True, slots=True)
class Made:
    """A sample as it is seen."""

    epoch: int
    sample: Encoded
    label: int
    pixels: np.ndarray


class StreamedImages:
    """Images of shards that are read as streams, made by `open_stream`.

    `batches` is what trainings read. `fetch` reads single samples by their number, for pictures of a run: slowly, each
    shard from its beginning.
    """

    def __init__(
        self, shards: StreamShards, view: View, side: Side, *, seed: int, lanes: int | None, buffer: int
    ) -> None:
        self.size, self.shards = view.size, shards
        self.labels: np.ndarray | None = None
        self.classes: tuple[str, ...] | None = None
        self.num_classes = 0
        if buffer < 1:
            raise ValueError(f"the shuffle buffer is {buffer}; expected at least 1 sample")
        lanes_of(len(shards.urls), 1, lanes)  # refuses an impossible number at once
        self._view, self._seed, self._lanes = view, seed, lanes
        self._source = Lanes(shards, side, seed=seed, buffer=buffer)

    def __len__(self) -> int:
        return sum(self.shards.counts)

    def plan(self, processes: int) -> StreamPlan:
        """The order of all samples, for so many processes."""
        counts = self.shards.counts
        return StreamPlan(counts, lanes_of(len(counts), processes, self._lanes), self._seed)

    # --- classes -----------------------------------------------------------------------------------------

    def name_classes(self, classes: int | None, names: Sequence[str] | None) -> None:
        """Say what classes there are: labels are numbers below `classes`, or one of `names`.

        Raises LabelError.
        """
        if classes is None and not names:
            raise LabelError("shards that are streamed do not say how many classes there are: give classes")
        if names and classes is not None and classes != len(names):
            raise LabelError(f"{len(names)} class names were given for {classes} classes")
        self.classes = tuple(names) if names else None
        self.num_classes = classes or len(names or ())

    def require_labels(self) -> "StreamedImages":
        """Returns the dataset itself. Raises LabelError before `name_classes`."""
        if not self.num_classes:
            self.name_classes(None, None)
        return self

    def as_one_class(self) -> "StreamedImages":
        """All samples are of class 0. Returns the dataset itself."""
        self._source.side, self.classes, self.num_classes = NO_SIDE, None, 1
        return self

    def _label(self, text: str) -> int:
        """Raises ImageError for what is no class."""
        if self._source.side == NO_SIDE:
            return 0 if self.num_classes == 1 else -1
        if self._source.side != LABELS:
            if not text:
                raise ImageError("has no text beside it")
            return -1
        if self.classes is not None and text in self.classes:
            return self.classes.index(text)
        if not text.isdecimal() or (self.num_classes and int(text) >= self.num_classes):
            known = f"one of the {self.num_classes} classes" if self.num_classes else "a class number"
            raise ImageError(f"has the label {text!r}, which is not {known}")
        return int(text)

    # --- batches -----------------------------------------------------------------------------------------

    def batches(
        self,
        start: int,
        micro_batch: int,
        *,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """The endless batches of one process from a number on; the same number always gives the same batch.

        A batch is that of `ImageDataset.fetch`, with `epoch` int64 (B,) and `uniform` float32 (B,) in [0, 1), drawn of
        seed, epoch and sample. `skipped` names images that cannot be read, and
        shards with the sample at which they break off. `workers` change nothing but who reads.

        Raises ShardError (no shard can be read any more), UnreadableImagesError.
        """
        plan = self.plan(processes)
        workers = min(workers, plan.lanes // processes)
        if workers < 1:
            parts = self._parts(plan, start, micro_batch, rank, processes, 0, 1)
        else:
            from torch.utils.data import DataLoader

            reader: Any = _PartReader(self, plan, start, micro_batch, rank, processes, workers)
            # Keys go to workers in turn, and come back in order: as many parts as workers are a batch.
            parts = iter(DataLoader(reader, batch_size=None, sampler=cast(Any, _Turns(workers)), num_workers=workers))
        while True:
            batch = _joined([next(parts) for _ in range(max(workers, 1))], micro_batch)
            yield pinned(batch) if pin_memory else batch

    def _parts(
        self, plan: StreamPlan, start: int, micro_batch: int, rank: int, processes: int, worker: int, workers: int
    ) -> Iterator[dict[str, Any]]:
        """Of every batch the rows that lie in the lanes of one worker."""
        lanes: dict[tuple[int, int], Iterator[Made]] = {}
        for batch in count(start):
            located = [plan.locate((batch * micro_batch + row) * processes + rank) for row in range(micro_batch)]
            rows = [row for row, (_, lane, _) in enumerate(located) if lane // processes % workers == worker]
            yield self._collated(rows, (self._next(plan, lanes, *located[row]) for row in rows))

    def _next(
        self, plan: StreamPlan, lanes: dict[tuple[int, int], Iterator[Made]], epoch: int, lane: int, place: int
    ) -> Made:
        """The sample of a place, of its lane in `lanes`, which is opened if need be."""
        if (epoch, lane) not in lanes:
            lanes[epoch, lane] = self._lane(plan, epoch, lane, place)
        made = next(lanes[epoch, lane])
        if place == plan.length(lane) - 1:
            del lanes[epoch, lane]
        return made

    def _collated(self, rows: list[int], samples: Iterable[Made]) -> dict[str, Any]:
        """A batch of as many samples as rows."""
        import torch

        images = np.empty((len(rows), 3, self.size, self.size), np.float32)
        made = []
        for place, sample in zip(images, samples, strict=True):
            to_signed(sample.pixels, place)  # at once, while it is in the processor's cache
            made.append((sample.epoch, sample.label, sample.sample))
        skipped, self._source.reports = tuple(self._source.reports), []
        if not made:
            return {"rows": rows, "skipped": skipped}
        epochs = np.array([epoch for epoch, _, _ in made], np.int64)
        planned = np.array([one.planned for _, _, one in made], np.int64)
        # The fourth number, as of images that are indexed: the first three decide mirroring and crop.
        drawn = uniforms_of(self._seed, epochs, planned, 4)[:, 3]
        batch = {
            "rows": rows,
            "image": torch.from_numpy(images),
            "label": torch.tensor([label for _, label, _ in made]),
            "index": torch.tensor([one.index for _, _, one in made]),
            "epoch": torch.from_numpy(epochs),
            "uniform": torch.from_numpy(drawn).float(),
            "name": [one.name for _, _, one in made],
            "skipped": skipped,
        }
        return self._described(batch, [one.text for _, _, one in made])

    def _described(self, batch: dict[str, Any], texts: list[str]) -> dict[str, Any]:
        """The batch with what is made of the texts beside its images."""
        return batch

    # --- one lane ----------------------------------------------------------------------------------------

    def _lane(self, plan: StreamPlan, epoch: int, lane: int, start: int) -> Iterator[Made]:
        """Exactly the samples of a lane, from one on, shuffled and decoded."""
        planned: list[int] = []
        for sample in self._source.shuffled(plan, epoch, lane, start):
            planned.append(sample.planned)
            for made in self._made(epoch, sample, planned):
                planned.pop(0)
                yield made
        if planned:  # the lane ended with images that cannot be read
            last = plan.ranges(epoch, lane)[-1]
            for sample in self._source.following(plan, epoch, last.place):
                for made in self._made(epoch, sample, planned):
                    planned.pop(0)
                    yield made
                if not planned:
                    return

    def _made(self, epoch: int, sample: Encoded, planned: list[int]) -> Iterator[Made]:
        """The sample in each of the places that wait for one; nothing if it cannot be used, which is reported."""
        try:
            label = self._label(sample.text)
            planes = decode(sample.data)
            for number in list(planned):
                drawn = uniforms(self._seed, epoch, number, 3)
                placed = Encoded(number, sample.index, sample.name, sample.text, b"")
                yield Made(epoch, placed, label, self._view.of(planes, drawn))
        except ImageError as error:
            self._source.report(sample.name, f"passed over {sample.name}: it {error}")
            if len(planned) >= MAX_UNREADABLE:
                raise UnreadableImagesError(
                    f"{len(planned)} samples in a row cannot be read, the last one {sample.name}: it {error}. "
                    "Check that the shards hold images and were copied whole."
                ) from None

    # --- single samples ----------------------------------------------------------------------------------

    def fetch(self, keys: Sequence[Key]) -> dict[str, Any]:
        """A batch of samples by their numbers, or (epoch, number), counted through the shards as they are listed."""
        plan, made = self.plan(1), []
        reader: Iterator[Encoded] = iter(())
        here, place = -1, -1  # the sample that the reader gives next, and its shard
        for key in keys:
            epoch, number = key if isinstance(key, tuple) else (0, int(key))
            if not 0 <= number < len(self):
                raise IndexError(f"sample {number} of {len(self)}")
            shard = plan.shard_of(number)
            if shard != place or number < here:
                first = plan.first_of(shard)
                part = Range(0, shard, number - first, plan.counts[shard])
                reader, place = self._source.range_of(plan, part), shard
            there = (sample for sample in reader if sample.index >= number)
            behind = self._source.following(plan, epoch, plan.order(epoch).index(shard))
            for sample in chain(there, behind):
                if found := list(self._made(epoch, sample, [number])):
                    made += found
                    here = sample.index + 1
                    break
        batch = self._collated(list(range(len(made))), made)
        del batch["rows"]
        return batch


class _PartReader:
    """What workers of a DataLoader read: the next part of the worker whose number is the key."""

    def __init__(self, images: StreamedImages, *options: Any) -> None:
        self._images, self._options = images, options
        self._open: dict[int, Iterator[dict[str, Any]]] = {}

    def __getitem__(self, worker: int) -> dict[str, Any]:
        if worker not in self._open:
            plan, start, micro_batch, rank, processes, workers = self._options
            made = self._images._parts(plan, start, micro_batch, rank, processes, worker, workers)
            self._open[worker] = made
        return next(self._open[worker])


@dataclass(frozen=True)
class _Turns:
    """0, 1, …, workers - 1, for ever."""

    workers: int

    def __iter__(self) -> Iterator[int]:
        return (number % self.workers for number in count())


def _joined(parts: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """One batch of what workers read of it."""
    import torch

    skipped = tuple(name for part in parts for name in part["skipped"])
    filled = [part for part in parts if part["rows"]]
    if len(filled) == 1:
        batch = {**filled[0], "skipped": skipped}
        del batch["rows"]
        return batch
    batch = {"skipped": skipped}
    for key, first in filled[0].items():
        if isinstance(first, torch.Tensor):
            joined = first.new_empty((rows, *first.shape[1:]))
            for part in filled:
                joined[part["rows"]] = part[key]
            batch[key] = joined
        elif key not in ("rows", "skipped"):
            values = {row: value for part in filled for row, value in zip(part["rows"], part[key], strict=True)}
            batch[key] = [values[row] for row in range(rows)]
    return batch
