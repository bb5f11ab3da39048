"""Images in .npz files, as the field hands them on (``arr_0``, uint8), read and written without holding them all."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

IMAGES = "arr_0"


class NpzImages:
    """The images of a file, read some at a time; nothing in it is executed.

    Attributes:
        shape: (images, height, width, 3).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or has no ``arr_0`` of bytes (images, height, width, 3).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with self._opened() as (_, shape):
            self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int, limit: int | None = None) -> Iterator[Tensor]:
        """Images (B, 3, height, width) in [0, 1], in the file's order.

        Raises:
            ValueError: the file ends too soon or is damaged.
        """
        count, height, width, _ = self.shape
        count = min(count, limit or count)
        each = height * width * 3
        with self._opened() as (stream, _):
            for start in range(0, count, size):
                wanted = min(size, count - start) * each
                try:
                    content = stream.read(wanted)
                except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
                    raise ValueError(f"{self.path}: {IMAGES} is damaged after image {start}: {error}") from error
                if len(content) != wanted:
                    raise ValueError(f"{self.path}: {IMAGES} ends after image {start} of {count}")
                pixels = np.frombuffer(content, np.uint8).reshape(-1, height, width, 3)
                yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)

    def _opened(self) -> _Opened:
        return _Opened(self.path)


class _Opened:
    """The stream of ``arr_0`` behind its header, and its shape."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> tuple[IO[bytes], tuple[int, int, int, int]]:
        try:
            self._archive = zipfile.ZipFile(self.path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path}: there is no such file of images") from None
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path} is no .npz file: {error}") from error
        try:
            self._stream = self._archive.open(f"{IMAGES}.npy")
            version = np.lib.format.read_magic(self._stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(self._stream)
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            self._archive.close()
            held = ", ".join(name.removesuffix(".npy") for name in self._archive.namelist()[:8])
            raise ValueError(
                f"{self.path} has no array {IMAGES} that can be read (it holds {held}): {error}"
            ) from error
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran or not shape[0]:
            self.__exit__()
            raise ValueError(
                f"{self.path}: {IMAGES} is {dtype} of shape {shape}; expected uint8 (images, height, width, 3)"
            )
        return self._stream, shape

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._archive.close()


def names_in(path: str | os.PathLike[str]) -> set[str]:
    """The arrays of a .npz file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no .npz file: {error}") from error


def write_images(file: str | os.PathLike[str], batches: Iterable[np.ndarray], count: int) -> None:
    """Write ``count`` images, given in batches of bytes (B, height, width, 3), as ``arr_0``.

    Raises:
        ValueError: there are more or fewer, or they are of several sizes.
    """
    written, shape = 0, None
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as stream,
    ):
        for batch in batches:
            if shape is None:
                shape = batch.shape[1:]
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                np.lib.format.write_array_header_1_0(stream, header)
            if batch.shape[1:] != shape or batch.dtype != np.uint8:
                raise ValueError(
                    f"images of {batch.dtype} {batch.shape[1:]} among uint8 {shape}: expected one size of bytes"
                )
            stream.write(np.ascontiguousarray(batch).tobytes())
            written += len(batch)
    if written != count:
        raise ValueError(f"{written} images came, {count} were announced")
