"""Images with texts at several aspect ratios, each at the one of a few sizes that fits it best."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .blobs import FolderStore, Names, Store
from .caption_lists import read_caption_lists
from .captions import Choice, Texts, read_texts
from .decoding import covering, decode, image_size, to_signed
from .errors import ImageError
from .images import Key, first_readable
from .shards import open_shards
from .sources import Source, find


def open_aspects(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    sizes: Sequence[tuple[int, int]],
    *,
    field: str | None = None,
    choice: Choice | None = None,
) -> "AspectImages":
    """Open images with texts for training at several sizes.

    An image goes to the size whose height / width is nearest to its own: that in its line of a list (`h_div_w`), else
    that in its file's header. Of an unreadable file it is taken as 1; the file is passed over when its turn comes.

    Args:
        source: a list (.jsonl), a folder of lists, a folder of images or webdataset shards, as `open_captions` takes
            them.
        sizes: (height, width) in pixels.

    Raises CaptionError, SourceError, ShardError and their like (ValueError), OSError.
    """
    found = find(source, labels=False)
    store: Store
    if found.kind == "image":
        names = Names(found.files)
        store = FolderStore(found.root, names)
    else:
        store, names, _, _ = open_shards([Path(name) for name in found.files], found.kind, labels=False)
    texts = read_texts(found, names.__getitem__, field)
    texts.choice = choice or Choice()
    ratios = _ratios(found, store)
    groups = np.abs(ratios[:, None] - np.array([height / width for height, width in sizes])).argmin(1)
    return AspectImages(store, names, texts, sizes, groups)


def _ratios(found: Source, store: Store) -> np.ndarray:
    """Height / width of every image."""
    given = [image.ratio for image in read_caption_lists(found.lists)] if found.lists else [None] * len(store)
    return np.array([_ratio(store.read(i)) if ratio is None else ratio for i, ratio in enumerate(given)])


def _ratio(data: bytes) -> float:
    try:
        width, height = image_size(data)
    except ImageError:
        return 1.0
    return height / width


class AspectImages:
    """Map-style dataset made by `open_aspects`; a batch has `text`, a list, and images of one size.

    `groups`, the number of each sample's size, is what a sampler has to keep apart.
    """

    def __init__(
        self, store: Store, names: Names, texts: Texts, sizes: Sequence[tuple[int, int]], groups: np.ndarray
    ) -> None:
        self.sizes, self.groups = tuple(sizes), groups
        self._store, self._names, self._texts = store, names, texts
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self._names)

    def vocabulary(self) -> list[str]:
        """Texts that hold every word that may come up."""
        return self._texts.vocabulary()

    def fetch(self, keys: Sequence[Key]) -> dict[str, Any]:
        """A batch: `image` float32 (batch, 3, height, width) in [-1, 1], `text`, `index`, `name`, `skipped`.

        An unreadable image is replaced by the next readable one of its size.

        Raises ValueError where samples are of several sizes, UnreadableImagesError.
        """
        import torch

        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        kinds = {int(self.groups[index]) for _, index in pairs}
        if len(kinds) != 1:
            raise ValueError(f"a batch has images of {len(kinds)} sizes, expected one: draw batches with `groups`")
        height, width = self.sizes[kinds.pop()]
        images = np.empty((len(keys), 3, height, width), np.float32)
        positions: list[int] = []
        skipped: list[str] = []
        for (_, index), place in zip(pairs, images, strict=True):
            pixels, position, passed = first_readable(self._alike(index), self._pixels, self.name, self._reported)
            to_signed(pixels, place)
            positions.append(position)
            skipped.extend(passed)
        return {
            "image": torch.from_numpy(images),
            "text": [self._texts.of(epoch, position) for (epoch, _), position in zip(pairs, positions, strict=True)],
            "index": torch.tensor(positions),
            "name": [self.name(position) for position in positions],
            "skipped": tuple(skipped),
        }

    def name(self, index: int) -> str:
        """Name of a sample, as `ImageDataset.name`."""
        return self._names[index]

    def _alike(self, index: int) -> Iterator[int]:
        """Samples of the same size, from this one on and around."""
        around = ((index + step) % len(self) for step in range(len(self)))
        return (position for position in around if self.groups[position] == self.groups[index])

    def _pixels(self, position: int) -> np.ndarray:
        height, width = self.sizes[self.groups[position]]
        return covering(decode(self._store.read(position)), height, width)
