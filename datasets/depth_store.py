"""Packed pairs of images and depth maps of one size, quick to read: NumPy files that are mapped into memory.

A folder holds shards ``image-00000.npy`` uint8 (n, height, width, 3), ``depth-00000.npy`` float32 (n, height, width)
metres, 0 where unknown, ``camera-00000.npy`` float32 (n, 3, 3), and ``index.json``: settings, and each shard's samples.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ShardError, listed
from .files import replace_file

INDEX, FORMAT, VERSION = "index.json", "nextscale-depth-pairs", 1
_COLUMNS = ("image", "depth", "camera")
_NAME = re.compile(r"(image|depth|camera)-\d{5,}\.npy")


class DepthStoreWriter:
    """Writes a folder so that a run killed at any moment loses at most the shard it was filling.

    Args:
        settings: JSON values that say what the pairs are; a folder begun with other settings is refused.
        size: (height, width).
        total: how many pairs there will be.

    Raises:
        ShardError: the folder was begun with other settings, or is damaged. OSError.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        settings: dict[str, Any],
        size: tuple[int, int],
        total: int,
        shard_size: int = 256,
    ) -> None:
        if total < 1 or shard_size < 1:
            raise ValueError(f"{total} pairs in shards of {shard_size}; expected 1 or more of each")
        self.folder, self.size, self.total, self.shard_size = Path(folder), size, total, shard_size
        self._index: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "settings": json.loads(json.dumps(settings)),
            "size": list(size),
            "total": total,
            "shards": [],
        }
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / INDEX).exists():
            self._continue()
        kept = {f"{column}-{number:05d}.npy" for column in _COLUMNS for number in range(len(self._index["shards"]))}
        for path in self.folder.iterdir():  # what a killed run has left
            unfinished = path.name.startswith(".") and path.name.endswith(".tmp")
            if unfinished or (_NAME.fullmatch(path.name) and path.name not in kept):
                path.unlink()

    @property
    def written(self) -> int:
        """Pairs in complete shards; the caller goes on with the one after them."""
        return sum(self._index["shards"])

    def _continue(self) -> None:
        before = _read_index(self.folder)
        if before["settings"] != self._index["settings"] or before["size"] != self._index["size"]:
            mine, theirs = self._index["settings"], before["settings"]
            other = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)] or ["size"]
            raise ShardError(
                f"{self.folder} was begun with another {', '.join(other)}: choose another folder, or remove this one"
            )
        done = sum(before["shards"])
        if done > self.total:
            raise ShardError(f"{self.folder} holds {done} pairs already, more than the {self.total} asked for")
        _check_files(self.folder, before)
        self._index["shards"] = before["shards"]

    def write(self, image: np.ndarray, depth: np.ndarray, camera: np.ndarray) -> None:
        """Add one pair: uint8 (height, width, 3), float32 (height, width), float32 (3, 3)."""
        if image.shape != (*self.size, 3) or depth.shape != self.size or camera.shape != (3, 3):
            raise ValueError(
                f"image {image.shape}, depth {depth.shape} and camera {camera.shape}; expected {(*self.size, 3)}, "
                f"{self.size} and (3, 3)"
            )
        self._waiting.append((image.astype(np.uint8), depth.astype(np.float32), camera.astype(np.float32)))
        if len(self._waiting) == self.shard_size or self.written + len(self._waiting) == self.total:
            self._flush()

    def _flush(self) -> None:
        number = len(self._index["shards"])
        for column, values in zip(_COLUMNS, zip(*self._waiting, strict=True), strict=True):
            buffer = io.BytesIO()
            np.save(buffer, np.stack(values), allow_pickle=False)
            replace_file(self.folder / f"{column}-{number:05d}.npy", buffer.getvalue())
        self._index["shards"].append(len(self._waiting))
        # Last: a shard counts only once the index speaks of it.
        replace_file(self.folder / INDEX, json.dumps(self._index, indent=1).encode())
        self._waiting = []


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        good = (
            index["format"] == FORMAT
            and index["version"] == VERSION
            and isinstance(index["settings"], dict)
            and len(index["size"]) == 2
            and all(isinstance(count, int) and count > 0 for count in [*index["size"], *index["shards"]])
        )
    except FileNotFoundError:
        raise ShardError(f"{folder} holds no {INDEX}: it is no folder of packed depth pairs") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise ShardError(f"{path} is damaged, or of another format: make the pairs again in another folder")
    return dict(index)


def _check_files(folder: Path, index: dict[str, Any]) -> None:
    wrong = []
    for number in range(len(index["shards"])):
        for column in _COLUMNS:
            try:
                _open_column(folder, index, column, number)
            except (OSError, ValueError) as error:
                wrong.append(f"{column}-{number:05d}.npy ({error})")
    if wrong:
        raise ShardError(f"{folder} is damaged: {listed(wrong)}. Copy it again, or make the pairs again.")


def _open_column(folder: Path, index: dict[str, Any], column: str, number: int) -> np.ndarray:
    height, width = index["size"]
    shape = {"image": (height, width, 3), "depth": (height, width), "camera": (3, 3)}[column]
    array: np.ndarray = np.load(folder / f"{column}-{number:05d}.npy", mmap_mode="r", allow_pickle=False)
    wanted = (index["shards"][number], *shape)
    kind = np.uint8 if column == "image" else np.float32
    if array.shape != wanted or array.dtype != kind:
        raise ValueError(f"holds {array.dtype} {array.shape} instead of {np.dtype(kind)} {wanted}")
    return array


class DepthStore:
    """Reads a folder of packed pairs: ``store.images(numbers)``, ``store.depths(numbers)``, ``store.cameras(numbers)``.

    Attributes:
        size: (height, width). settings: the writer's.

    Raises:
        ShardError: the folder is not complete, or damaged; all damaged files are named.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._index = _read_index(self.folder)
        _check_files(self.folder, self._index)
        done = sum(self._index["shards"])
        if done != self._index["total"]:
            raise ShardError(
                f"{folder} is not complete ({done} of {self._index['total']} pairs are there): run what was "
                "writing it again, which continues"
            )
        self.size: tuple[int, int] = (self._index["size"][0], self._index["size"][1])
        self.settings: dict[str, Any] = self._index["settings"]
        self._firsts = np.cumsum([0, *self._index["shards"]])
        self._open: dict[tuple[str, int], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def images(self, numbers: Sequence[int]) -> np.ndarray:
        """uint8 (n, height, width, 3)."""
        return self._rows("image", numbers)

    def depths(self, numbers: Sequence[int]) -> np.ndarray:
        """float32 (n, height, width) metres, 0 where unknown."""
        return self._rows("depth", numbers)

    def cameras(self, numbers: Sequence[int]) -> np.ndarray:
        """float32 (n, 3, 3) intrinsics."""
        return self._rows("camera", numbers)

    def _rows(self, column: str, numbers: Sequence[int]) -> np.ndarray:
        places = np.asarray(numbers, np.int64)
        if places.size and not 0 <= places.min() <= places.max() < len(self):
            raise IndexError(f"pairs {places.min()} to {places.max()} of {len(self)}")
        shards = np.searchsorted(self._firsts, places, "right") - 1
        return np.stack(
            [
                self._column(column, int(shard))[place - self._firsts[shard]]
                for shard, place in zip(shards, places, strict=True)
            ]
        )

    def _column(self, column: str, shard: int) -> np.ndarray:
        if (column, shard) not in self._open:
            self._open[column, shard] = _open_column(self.folder, self._index, column, shard)
        return self._open[column, shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a pickled map would carry all it maps


def is_store(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one of packed pairs."""
    try:
        return json.loads((Path(folder) / INDEX).read_bytes())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False
