"""Images for training: folders, class folders, webdataset and parquet shards, opened by one call."""

import logging
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .blobs import FolderStore, Names, Store
from .decoding import CENTRE, Planes, decode, image_size, square, to_signed
from .draws import uniforms
from .errors import ImageError, ImageSizeError, LabelError, NoImagesError, UnreadableImagesError, listed
from .shards import NO_LABEL, open_shards
from .sources import find

Key = int | tuple[int, int]
"""A sample's number, or (epoch, number)."""

MAX_UNREADABLE = 32
"""Unreadable samples in a row that are passed over before the dataset is given up."""

CACHE_LIMIT = 512 * 2**20
"""Bytes of decoded pixels that are kept in memory when all images have the model's size already."""

_UNKNOWN, _KEPT, _NOT_KEPT = 0, 1, 2

_log = logging.getLogger(__name__)


def open_images(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    size: int,
    crop: Literal["random", "center"] = "random",
    flip: bool = False,
    resize_ratio: float = 1.125,
    seed: int = 0,
    labels: bool = True,
    keep: bool = True,
) -> "ImageDataset":
    """Open a set of images; what kind it is shows from what is there.

    `source` is one of
    - a folder of images, also in sub-folders beside images at the top (no labels);
    - a folder of class folders: the class is the folder's place in sorted order (ImageNet: point at
    ROOT/train);
    - lists of images, an object of JSON in each line (.jsonl; `nextscale.datasets.caption_lists`), no labels;
    - webdataset shards (.tar, .tar.gz, .tgz) or parquet files: a folder of them, a file, a pattern with
    `{0000..0004}`
      or `*`, or a list. A sample of a tar is KEY.jpg|jpeg|png|webp with KEY.cls (text) or KEY.json (`label`
      or `cls`); a parquet file has a column `image`, `img`, `jpg`, `png`, … (bytes, or Hugging Face's struct)
      and `label` or `cls`.
    A mixture is refused.

    Pre-processing is VAR's: optional horizontal flip, the shorter side resized to round(resize_ratio * size)
    by Lanczos, a random or central crop, values in [-1, 1]. `resize_ratio` 1.0 samples nothing anew in images
    that are size x size already; 0 turns resizing off, and then every image must be at least size x size.
    Labels are used where the source has them (`require_labels` insists); `labels=False` ignores them. `keep`: hold up
    to CACHE_LIMIT bytes of decoded pixels, where no resize is due, for images that are read more than once.

    Raises SourceError, NoImagesError, EmptyClassError, ShardError, LabelError, ImageSizeError (all
    ValueError; each lists all problems of its kind), OSError.
    """
    if size < 1:
        raise ValueError(f"size {size} must be at least 1 pixel")
    if crop not in ("random", "center"):
        raise ValueError(f"crop {crop!r} must be 'random' or 'center'")
    if resize_ratio != 0 and not 1 <= resize_ratio < 100:
        raise ValueError(f"resize_ratio {resize_ratio} must be at least 1, so that the crop fits, or 0 for no resizing")
    found = find(source, labels=labels)
    store: Store
    numbers, classes = None, None
    if found.kind == "image":
        names = Names(found.files)
        store = FolderStore(found.root, names)
        if found.labels is not None:
            numbers, classes = np.array(found.labels, np.int64), found.classes
    else:
        store, names, texts, classes = open_shards([Path(name) for name in found.files], found.kind, labels=labels)
        if labels:
            numbers, classes = _numbers(texts, names, classes)
        else:
            classes = None
    if not len(names):
        raise NoImagesError(f"no image in {listed(found.files)}")
    dataset = ImageDataset(
        store, names, numbers, classes, size=size, crop=crop, flip=flip, resize_ratio=resize_ratio, seed=seed, keep=keep
    )
    if not resize_ratio:
        dataset.check_sizes()
    return dataset


class ImageDataset:
    """Map-style dataset of square crops, made by `open_images`.

    A key is a sample's number, or (epoch, number). All randomness comes from (seed, epoch, number), so rank,
    worker and order do not matter. `dataset[key]` is a dict: `image` float32 (3, size, size) in [-1, 1];
    `label` int, -1 without; `index` int, the sample's number; `name` str, unique in its file or folder;
    `skipped`, the names of unreadable samples that were passed over to get to this one.

    An unreadable sample (damaged file, unusable value range) is replaced by the next readable one, with the
    random crop of the number asked for. After MAX_UNREADABLE in a row UnreadableImagesError is raised.
    """

    def __init__(
        self,
        store: Store,
        names: Names,
        labels: np.ndarray | None,
        classes: tuple[str, ...] | None,
        *,
        size: int,
        crop: Literal["random", "center"],
        flip: bool,
        resize_ratio: float,
        seed: int,
        keep: bool = True,
    ) -> None:
        self.size, self.crop, self.flip, self.resize_ratio, self.seed = size, crop, flip, resize_ratio, seed
        self.classes = classes
        self.labels = labels
        self._store, self._names = store, names
        self._reported: set[int] = set()
        self._cache: tuple[np.ndarray, np.ndarray] | None = None
        self._whole: dict[int, Planes] = {}
        self._limit = self._room = CACHE_LIMIT if keep else 0
        self._make_cache()

    def __len__(self) -> int:
        return len(self._names)

    @property
    def num_classes(self) -> int:
        """Number of class names if there are any, else the largest label + 1; 0 without labels."""
        if self.labels is None:
            return 0
        return len(self.classes) if self.classes is not None else int(self.labels.max()) + 1

    def label_counts(self) -> np.ndarray:
        """int64 (num_classes,): samples of each class."""
        return np.bincount(self.labels if self.labels is not None else [], minlength=self.num_classes).astype(np.int64)

    def require_labels(self) -> "ImageDataset":
        """Returns the dataset itself. Raises LabelError if it has no labels."""
        if self.labels is None:
            raise LabelError(
                f"{len(self)} samples, such as {self._names[0]}, have no class: put images into one "
                "folder per class, or a .cls file or label column into the shards (without labels=False)"
            )
        return self

    def as_one_class(self) -> "ImageDataset":
        """All samples are of class 0, whatever they were of. Returns the dataset itself."""
        self.labels, self.classes = np.zeros(len(self), np.int64), None
        return self

    def name(self, index: int) -> str:
        """Name of a sample: a relative path without `..`; of a sample of a shard, its key."""
        return self._names[index]

    def check_sizes(self) -> None:
        """Read every header. Raises ImageSizeError with all images smaller than size x size."""
        small = []
        for position in range(len(self)):
            try:
                width, height = image_size(self._store.read(position))
            except ImageError:
                continue  # is passed over when its turn comes
            if min(width, height) < self.size:
                small.append(f"{self._names[position]} ({width} x {height})")
        if small:
            raise ImageSizeError(
                f"{len(small)} of {len(self)} images are smaller than {self.size} x {self.size} and resizing "
                f"is off (resize_ratio 0): {listed(small)}. Remove them, or let images be resized."
            )

    def __getitem__(self, key: Key) -> dict[str, Any]:
        import torch

        epoch, index = map(int, key) if isinstance(key, tuple) else (0, int(key))
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        pixels, position, skipped = self._pixels(epoch, index)
        return {
            "image": torch.from_numpy(to_signed(pixels)),
            "label": -1 if self.labels is None else int(self.labels[position]),
            "index": position,
            "name": self._names[position],
            "skipped": skipped,
        }

    def fetch(self, keys: Sequence[Key]) -> dict[str, Any]:
        """A batch at once: what `collate` makes of the samples, without a tensor per sample."""
        import torch

        images = np.empty((len(keys), 3, self.size, self.size), np.float32)
        positions: list[int] = []
        skipped: list[str] = []
        for key, place in zip(keys, images, strict=True):
            epoch, index = map(int, key) if isinstance(key, tuple) else (0, int(key))
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)}")
            image, position, passed = self._pixels(epoch, index)
            to_signed(image, place)  # at once, while it is in the processor's cache
            positions.append(position)
            skipped.extend(passed)
        labels = np.full(len(keys), -1, np.int64) if self.labels is None else self.labels[positions]
        return {
            "image": torch.from_numpy(images),
            "label": torch.from_numpy(labels),
            "index": torch.tensor(positions),
            "name": [self._names[position] for position in positions],
            "skipped": tuple(skipped),
        }

    def _pixels(self, epoch: int, index: int) -> tuple[np.ndarray, int, tuple[str, ...]]:
        """(3, size, size) of sample `index` or the next readable one, its number, the names passed over."""
        flip, across, down = False, CENTRE, CENTRE
        if self.flip or self.crop == "random":
            drawn = uniforms(self.seed, epoch, index, 3)
            flip = self.flip and drawn[0] < 0.5
            if self.crop == "random":
                across, down = drawn[1:]
        candidates = ((index + step) % len(self) for step in range(len(self)))
        view = partial(self._square, flip=flip, across=across, down=down)
        return first_readable(candidates, view, self.name, self._reported)

    def _square(self, position: int, flip: bool, across: float, down: float) -> np.ndarray:
        if self._cache is not None:
            kept, state = self._cache
            if state[position] == _UNKNOWN:
                planes = decode(self._store.read(position))
                fits = planes[0].mode == "RGB" and planes[0].size == (self.size, self.size)
                if fits:
                    kept[position] = np.asarray(planes[0]).transpose(2, 0, 1)
                state[position] = _KEPT if fits else _NOT_KEPT  # last, since other processes look at it
            if state[position] == _KEPT:
                pixels: np.ndarray = kept[position]
                return pixels[:, :, ::-1] if flip else pixels
        planes = self._decoded(position)
        return square(planes, self.size, ratio=self.resize_ratio, flip=flip, across=across, down=down)

    def _decoded(self, position: int) -> Planes:
        """A whole image; kept, while there is room, where crops are cut from it: that costs far less than decoding."""
        if position in self._whole:
            return self._whole[position]
        planes = decode(self._store.read(position))
        width, height = planes[0].size
        pixels = width * height * (3 if planes[0].mode == "RGB" else 4 * len(planes))
        if not self.resize_ratio and pixels <= self._room:
            self._whole[position] = planes
            self._room -= pixels
        return planes

    def _make_cache(self) -> None:
        """Room for decoded pixels where no resize or crop is due, so that an image is decoded once.

        Pages are taken from the system only when written, and are shared with data-loading forks.
        """
        wanted = len(self) * (3 * self.size**2 + 1)
        if self.resize_ratio <= 1 and wanted <= self._limit:
            pages = np.frombuffer(mmap.mmap(-1, wanted), np.uint8)
            shape = (len(self), 3, self.size, self.size)
            self._cache = pages[len(self) :].reshape(shape), pages[: len(self)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None, "_whole": {}, "_room": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_cache()


def first_readable(
    candidates: Iterable[int], read: Callable[[int], np.ndarray], name: Callable[[int], str], reported: set[int]
) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """Pixels of the first sample that can be read, its number, and the names of those passed over.

    `reported`: samples that have been complained about; those passed over are added.

    Raises UnreadableImagesError after MAX_UNREADABLE.
    """
    skipped: list[str] = []
    for position in islice(candidates, MAX_UNREADABLE):
        try:
            return read(position), position, tuple(skipped)
        except ImageError as error:
            reason = error
            if position not in reported:
                reported.add(position)
                _log.warning("passed over %s: it %s", name(position), error)
            skipped.append(name(position))
    raise UnreadableImagesError(
        f"{len(skipped)} samples in a row cannot be read: {listed(skipped)} (the last one {reason}). "
        "Check that the files are images and were copied whole."
    )


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batch samples: tensors are stacked, numbers become tensors, names a list, skipped names one tuple."""
    import torch

    batch: dict[str, Any] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        first = values[0]
        if isinstance(first, torch.Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(first, tuple):
            batch[key] = tuple(item for value in values for item in value)
        elif isinstance(first, int | float):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = values
    return batch


def _numbers(
    texts: list[str], names: Names, classes: tuple[str, ...] | None
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels as found -> class numbers, and the classes' names where labels are names."""
    without = [names[i] for i, text in enumerate(texts) if text == NO_LABEL]
    if len(without) == len(texts):
        return None, None
    if without:
        raise LabelError(
            f"{len(without)} of {len(texts)} samples have no label that is a number or a name: "
            f"{listed(without)}. Add them, or leave all labels out of account (labels=False)."
        )
    distinct = set(texts)
    if all(text.removeprefix("-").isdecimal() for text in distinct):
        limit = len(classes) if classes is not None else 10**6
        wrong = sorted((text for text in distinct if not 0 <= int(text) < limit), key=int)
        if wrong:
            raise LabelError(f"labels outside 0 to {limit - 1}: {listed(wrong)}. Class numbers start at 0.")
        return np.array([int(text) for text in texts], np.int64), classes
    if numeric := sorted(text for text in distinct if text.isdecimal()):
        raise LabelError(
            f"labels are numbers in some samples ({listed(numeric, 3)}) and names in others "
            f"({listed(sorted(distinct - set(numeric)), 3)}): use one of them"
        )
    order = tuple(sorted(distinct))
    numbers = {name: number for number, name in enumerate(order)}
    return np.array([numbers[text] for text in texts], np.int64), order
