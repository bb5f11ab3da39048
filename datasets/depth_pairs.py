"""Photographs with their depth, file by file: where they lie, whether they are whole, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from .decoding import decode, image_size
from .depth_encodings import Encoding, read_depth
from .depth_planar import HYPERSIM_FOV, focal_length
from .errors import DatasetError, NoImagesError, listed

Camera = tuple[float, float, float, float]
"""fx, fy, cx, cy in pixels of the image file; pixel centres are at whole numbers."""


class MissingFilesError(DatasetError):
    """Files of a data set are missing or damaged; the message lists them."""


@dataclass(frozen=True)
class DepthPair:
    """One photograph and its depth.

    Attributes:
        name: unique in the data set: relative, without a suffix, parts separated by "/".
        image: file; None where there is only depth.
        depth: file; None where the depth is not known or is made from ``scan``.
        masks: images; a pixel counts where none of them is 0.
        camera: see :data:`Camera`; None where it is not known.
        fov_x: horizontal angle of view, radians, where the camera is not known.
        extra: further files that belong to it, by use.
    """

    name: str
    image: Path | None
    depth: Path | None
    masks: tuple[Path, ...] = ()
    camera: Camera | None = None
    fov_x: float | None = None
    extra: tuple[tuple[str, Path], ...] = ()

    @property
    def files(self) -> list[Path]:
        return [
            path
            for path in (self.image, self.depth, *self.masks, *(path for _, path in self.extra))
            if path is not None
        ]


class DepthSource(Protocol):
    """Where samples come from; index 0 to len - 1. What it gives does not depend on what was asked before."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Unique, without a suffix."""
        ...

    def image(self, index: int) -> np.ndarray:
        """uint8 (height, width, 3) RGB; or float32 in [0, 1] of files with more than 8 bits."""
        ...

    def depth(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 (height, width) metres, and bool: where it is known. Elsewhere the depth is 0."""
        ...

    def camera(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """float32 (3, 3) intrinsics for an image of this (height, width); NaN where they are not known."""
        ...

    def check(self) -> None:
        """Look at every file. Raises MissingFilesError, which lists all that are missing or damaged."""
        ...


@dataclass(frozen=True)
class PairFiles:
    """A source of files (:class:`DepthSource`).

    Attributes:
        pairs: in order.
        encoding: of the depth files.
        read: reads (pair, size of its image or None) -> (depth, extra validity or None); for data sets that make
            depth from other files. The encoding's reader, unless given.
    """

    pairs: Sequence[DepthPair]
    encoding: Encoding
    read: Callable[[DepthPair], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index].name

    def image(self, index: int) -> np.ndarray:
        path = self.pairs[index].image
        if path is None:
            raise DatasetError(f"{self.pairs[index].name} has a depth map only, no image")
        return read_image(path)

    def depth(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        pair = self.pairs[index]
        if self.read is not None:
            depth = self.read(pair)
        elif pair.depth is None:
            raise DatasetError(f"{pair.name} has no depth: its ground truth is not public, or is missing in the list")
        else:
            encoding = self.encoding
            if encoding.kind == "raw" and encoding.size is None and pair.image is not None:
                width, height = image_size(pair.image.read_bytes())
                encoding = replace(encoding, size=(height, width))
            depth = read_depth(pair.depth, encoding, pair.fov_x or HYPERSIM_FOV)
        valid = depth > 0
        for path in pair.masks:
            valid &= _mask(path, depth.shape)
        return np.where(valid, depth, np.float32(0)) if pair.masks else depth, valid

    def camera(self, index: int, size: tuple[int, int]) -> np.ndarray:
        pair = self.pairs[index]
        height, width = size
        if pair.camera is not None:
            return intrinsics(pair.camera)
        if pair.fov_x is None:
            return np.full((3, 3), np.nan, np.float32)
        focal = focal_length(width, pair.fov_x)
        return intrinsics((focal, focal, (width - 1) / 2, (height - 1) / 2))

    def check(self) -> None:
        if not self.pairs:
            raise NoImagesError("the data set is empty: no pair of an image and its depth was found")
        files = sorted({path for pair in self.pairs for path in pair.files})
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda path: file_problem(path, self.encoding), files))
        wrong = [f"{path} {problem}" for path, problem in zip(files, found, strict=True) if problem]
        if wrong:
            raise MissingFilesError(
                f"{len(wrong)} of {len(files)} files are missing or damaged: {'; '.join(_shortened(wrong))}. "
                "Get them again, or take a list without them."
            )


def _shortened(wrong: list[str], limit: int = 40) -> list[str]:
    return wrong if len(wrong) <= limit else [*wrong[:limit], f"and {len(wrong) - limit} more"]


def intrinsics(camera: Camera) -> np.ndarray:
    """float32 (3, 3)."""
    fx, fy, cx, cy = camera
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float32)


def read_image(path: Path) -> np.ndarray:
    """uint8 (height, width, 3) RGB; or float32 in [0, 1] of files with more than 8 bits.

    Raises:
        DatasetError: it is damaged. OSError: it cannot be read.
    """
    if path.suffix in (".h5", ".hdf5"):
        import h5py

        with h5py.File(path, "r") as file:
            if "image" not in file:
                raise DatasetError(f"{path} holds no 'image'; it has: {', '.join(file)}")
            values = np.asarray(file["image"])
        if values.ndim != 3 or 3 not in (values.shape[0], values.shape[2]):
            raise DatasetError(f"{path}: 'image' has shape {values.shape}; expected (height, width, 3)")
        return values if values.shape[2] == 3 else values.transpose(1, 2, 0)
    try:
        planes = decode(path.read_bytes())
    except DatasetError as error:
        raise DatasetError(f"{path} {error}") from error
    if planes[0].mode == "RGB":
        return np.asarray(planes[0])
    stacked = np.stack([np.asarray(plane, np.float32) for plane in planes], axis=2).clip(0, 1)
    return np.broadcast_to(stacked, (*stacked.shape[:2], 3))


def _mask(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    from PIL import Image

    if path.suffix == ".npy":
        values = np.load(path, allow_pickle=False)
    else:
        with Image.open(path, formats=("PNG",)) as image:
            values = np.asarray(image)
    if values.ndim == 3:
        values = values[..., 0]
    if values.shape != shape:
        raise DatasetError(f"{path} is {values.shape}, its depth {shape}; expected one size")
    mask: np.ndarray = values > 0
    return mask


def file_problem(path: Path, encoding: Encoding) -> str:
    """What is wrong with a file as far as its head and its end show; empty where nothing is."""
    try:
        size = path.stat().st_size
        if size == 0:
            return "is empty"
        suffix = path.suffix.lower()
        with path.open("rb") as file:
            head = file.read(8)
            file.seek(-min(size, 12), 2)
            tail = file.read()
        if suffix == ".png":
            if head != b"\x89PNG\r\n\x1a\n":
                return "is no PNG"
            return "" if tail[4:8] == b"IEND" else "is cut short"
        if suffix in (".jpg", ".jpeg") and encoding.kind != "raw":
            return "" if head[:2] == b"\xff\xd8" else "is no JPEG"
        if suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            return "" if array.ndim in (2, 3) else f"holds an array of shape {array.shape}"
        if suffix in (".hdf5", ".h5") and head != b"\x89HDF\r\n\x1a\n":
            return "is no HDF5 file"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    return ""


def relative_name(path: Path, root: Path) -> str:
    """A file's place below a folder, without its suffix."""
    return path.relative_to(root).with_suffix("").as_posix()


def none_found(root: Path, layout: str) -> NoImagesError:
    """The error where a folder holds nothing of the expected layout."""
    try:
        there = sorted(entry.name for entry in root.iterdir())
    except OSError:
        return NoImagesError(f"{root} is no folder; give the one that holds {layout}")
    return NoImagesError(f"{root} holds no {layout}; it has: {listed(there, 8) or 'nothing'}")
