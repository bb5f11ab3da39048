"""Photographs with depth for training and evaluation: every data set opened by one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .depth_folder import described
from .depth_kitti import kitti
from .depth_nyu import nyu
from .depth_pairs import DepthSource
from .depth_sets import diode, eth3d, hypersim, ibims, sunrgbd, tum
from .depth_store import DepthStore, is_store
from .draws import uniforms_of
from .errors import DatasetError

if TYPE_CHECKING:
    from .depth_augment import Augmentation

DEFAULT_SPLITS = {
    "kitti": "eigen",
    "nyu": "test",
    "hypersim": "val",
    "eth3d": "all",
    "ibims": "all",
    "tum": "all",
    "diode": "val",
    "sunrgbd": "all",
}
"""The split that is meant where none is named, by data set."""

_MAKERS: dict[str, Callable[..., DepthSource]] = {
    "kitti": kitti,
    "nyu": nyu,
    "hypersim": hypersim,
    "eth3d": eth3d,
    "ibims": ibims,
    "tum": tum,
    "diode": diode,
    "sunrgbd": sunrgbd,
}

DATASETS = (*_MAKERS, "scenes", "folder")
"""Names of data sets: published ones, ``scenes`` (packed pairs) and ``folder`` (a YAML file)."""


@dataclass(frozen=True)
class PackedSource:
    """Packed pairs of one size as a source."""

    store: DepthStore

    def __len__(self) -> int:
        return len(self.store)

    def name(self, index: int) -> str:
        return f"{index:06d}"

    def image(self, index: int) -> np.ndarray:
        image: np.ndarray = self.store.images([index])[0]
        return image

    def depth(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        depth = self.store.depths([index])[0]
        return depth, depth > 0

    def camera(self, index: int, size: tuple[int, int]) -> np.ndarray:
        camera: np.ndarray = self.store.cameras([index])[0]
        return camera

    def check(self) -> None:
        """The store has looked at its files when it was opened."""


def open_source(
    dataset: str,
    root: str | os.PathLike[str],
    split: str | None = None,
    *,
    list_file: str | os.PathLike[str] | None = None,
    depth_root: str | os.PathLike[str] | None = None,
) -> DepthSource:
    """A data set's samples.

    Args:
        dataset: of :data:`DATASETS`.
        root: folder of the data set; NYU's .mat file; for ``folder`` the YAML file; for ``scenes`` the folder of pairs.
        split: as the data set names it; :data:`DEFAULT_SPLITS` unless given.
        list_file: a list of the user's instead of the split's.
        depth_root: folder of the depth files where they do not lie with the images (KITTI, NYU).

    Raises:
        DatasetError: the name, the split or what is there is not understood. OSError.
    """
    place = Path(root)
    if dataset == "scenes":
        if split is not None or list_file is not None:
            raise DatasetError("packed pairs have no splits and lists: prepare those held out with another seed")
        return PackedSource(DepthStore(place))
    if dataset == "folder":
        if list_file is not None:
            raise DatasetError(f"name the list in {place} as one of its splits, and take that split")
        return described(place, split)
    if dataset not in _MAKERS:
        raise DatasetError(f"unknown data set {dataset!r}; known: {', '.join(DATASETS)}")
    if not place.exists():
        raise DatasetError(f"{place} does not exist; give the folder that holds {dataset}")
    return _MAKERS[dataset](
        place,
        split or DEFAULT_SPLITS[dataset],
        list_file=None if list_file is None else Path(list_file),
        depth_root=None if depth_root is None else Path(depth_root),
    )


def recognise(root: str | os.PathLike[str]) -> str:
    """``scenes`` or ``folder`` where that shows from what is there. Raises DatasetError elsewhere."""
    place = Path(root)
    if place.suffix in (".yaml", ".yml"):
        return "folder"
    if is_store(place):
        return "scenes"
    raise DatasetError(f"{root}: name the data set, one of {', '.join(DATASETS)}")


def open_depth(
    dataset: str,
    root: str | os.PathLike[str],
    split: str | None = None,
    *,
    size: tuple[int, int],
    list_file: str | os.PathLike[str] | None = None,
    depth_root: str | os.PathLike[str] | None = None,
    crop: Literal["random", "center"] = "center",
    augmentation: Augmentation | None = None,
    seed: int = 0,
) -> DepthDataset:
    """Open a data set for training, after a look at every file.

    Args:
        size: (height, width) of what batches hold.
        others: see :func:`open_source` and :class:`DepthDataset`.

    Raises:
        MissingFilesError: files are missing or damaged; all are listed. DatasetError, OSError.
    """
    source = open_source(dataset, root, split, list_file=list_file, depth_root=depth_root)
    source.check()
    return DepthDataset(source, size=size, crop=crop, augmentation=augmentation, seed=seed)


class DepthDataset:
    """Map-style data set of crops of one size, for ``loader.make_loader``.

    A key is a sample's number, or (epoch, number); all that is random depends on (seed, epoch, number) alone.
    ``fetch(keys)`` gives a batch: ``image`` float32 (n, 3, H, W) in [-1, 1]; ``depth`` float32 (n, 1, H, W) metres, 0
    where not known; ``valid`` bool (n, 1, H, W); ``intrinsics`` float32 (n, 3, 3), NaN where not known; ``index``
    int64 (n,); ``name`` list of str. Photographs are resized antialiased, depth by its nearest pixel.

    Args:
        size: (height, width). The largest crop of this shape is taken and resized.
        crop: where the crop lies: "random" or "center".
        augmentation: see ``depth_augment``.
    """

    def __init__(
        self,
        source: DepthSource,
        *,
        size: tuple[int, int],
        crop: Literal["random", "center"] = "center",
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        if min(size) < 1:
            raise ValueError(f"size {size} must be (height, width) of at least 1 pixel")
        if crop not in ("random", "center"):
            raise ValueError(f"crop {crop!r} must be 'random' or 'center'")
        self.source, self.size, self.crop, self.augmentation, self.seed = source, size, crop, augmentation, seed

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        batch = self.fetch([key])
        return {name: value[0] for name, value in batch.items()}

    def fetch(self, keys: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        """A batch."""
        import torch

        from .depth_augment import DRAWS, DepthBatch, augment  # here, as evaluation takes no batches and no PyTorch

        pairs = np.array([key if isinstance(key, tuple) else (0, key) for key in keys], np.int64).reshape(-1, 2)
        epochs, numbers = pairs.T
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"samples {numbers.min()} to {numbers.max()} of {len(self)}")
        drawn = uniforms_of(self.seed, epochs, numbers, DRAWS)
        images, depths, valid, cameras = self._read(numbers.tolist(), drawn)
        image = torch.from_numpy(images).permute(0, 3, 1, 2)
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        batch = DepthBatch(
            image.contiguous(),
            torch.from_numpy(depths)[:, None],
            torch.from_numpy(valid)[:, None],
            torch.from_numpy(cameras),
        )
        if self.augmentation is not None:
            batch = augment(batch, self.augmentation, torch.from_numpy(drawn[:, 3:]))
        return {
            "image": batch.image * 2 - 1,
            "depth": batch.depth,
            "valid": batch.valid,
            "intrinsics": batch.intrinsics,
            "index": torch.from_numpy(numbers.copy()),
            "name": [self.source.name(number) for number in numbers.tolist()],
        }

    def _read(self, numbers: list[int], drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        zoomed = self.augmentation is not None and self.augmentation.zoom > 1
        if isinstance(self.source, PackedSource) and self.source.store.size == self.size and not zoomed:
            store = self.source.store
            depths = store.depths(numbers)
            return store.images(numbers), depths, depths > 0, store.cameras(numbers)
        samples = [self._crop(number, row) for number, row in zip(numbers, drawn, strict=True)]
        images, depths, valid, cameras = (np.stack(column) for column in zip(*samples, strict=True))
        return images, depths, valid, cameras

    def _crop(self, number: int, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        image = self.source.image(number)
        depth, valid = self.source.depth(number)
        camera = self.source.camera(number, (image.shape[0], image.shape[1])).copy()
        height, width = self.size
        zoom = 1 if self.augmentation is None else self.augmentation.zoom ** float(drawn[0])
        across, down = (float(drawn[1]), float(drawn[2])) if self.crop == "random" else (0.5, 0.5)
        scale = min(image.shape[0] / height, image.shape[1] / width) / zoom
        box = _box(image.shape[:2], (height * scale, width * scale), across, down)
        top, bottom, left, right = box
        camera[0] *= width / (right - left)
        camera[1] *= height / (bottom - top)
        # Pixel centres lie at whole numbers, edges at halves.
        camera[0, 2] += width / (right - left) * (0.5 - left) - 0.5
        camera[1, 2] += height / (bottom - top) * (0.5 - top) - 0.5
        rows = _nearest(top, bottom, height, image.shape[0], depth.shape[0])
        columns = _nearest(left, right, width, image.shape[1], depth.shape[1])
        grid = np.ix_(rows, columns)
        return _resized(image[top:bottom, left:right], self.size), depth[grid], valid[grid], camera


def _box(shape: Sequence[int], size: tuple[float, float], across: float, down: float) -> tuple[int, int, int, int]:
    """Whole rows and columns (top, bottom, left, right) of a crop of about this size."""
    height, width = (min(max(round(side), 1), whole) for side, whole in zip(size, shape, strict=True))
    top, left = round(down * (shape[0] - height)), round(across * (shape[1] - width))
    return top, top + height, left, left + width


def _nearest(start: int, stop: int, count: int, whole: int, there: int) -> np.ndarray:
    """Places in a map of ``there`` pixels nearest to the centres of ``count`` pixels over start:stop of ``whole``."""
    centres = (start + (np.arange(count) + 0.5) * (stop - start) / count) / whole
    return np.minimum((centres * there).astype(np.int64), there - 1)


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == size:
        values = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
        return np.ascontiguousarray(values, np.float32)
    import torch

    values = image.astype(np.float32)  # a copy: decoded images cannot be written to
    planes = torch.from_numpy(values).permute(2, 0, 1)[None]
    planes = planes / 255 if image.dtype == np.uint8 else planes
    resized = torch.nn.functional.interpolate(planes, size, mode="bilinear", align_corners=False, antialias=True)
    result: np.ndarray = resized[0].permute(1, 2, 0).clamp(0, 1).numpy()
    return result
