"""Shards without random access (compressed tar, parquet) are unpacked once, to memory or a cache folder."""

import hashlib
import io
import logging
import os
from pathlib import Path
from typing import IO

import numpy as np

from .blobs import Names
from .errors import CacheError
from .files import replace_file, temporary

MEMORY_LIMIT = 256 * 2**20
"""Bytes of encoded images that one dataset keeps in memory; what is beyond goes to the cache folder."""

_LAYOUT = 1  # part of a cache file's name; to be raised whenever what is kept changes

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$NEXTSCALE_CACHE`, else `nextscale` in the user's cache folder."""
    named = os.environ.get("NEXTSCALE_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nextscale"


class Memory:
    """What the shards of one dataset have left of MEMORY_LIMIT; whether the user was told of the cache."""

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self.left = limit
        self.told = False


class Pack:
    """The images of one shard, one after the other, being written.

    Starts in memory and moves to a temporary file in the cache folder when `memory` is spent. A finished pack
    on disk is found again by `cached`, keyed by the shard's path, size and modification time.
    """

    def __init__(self, shard: Path, memory: Memory) -> None:
        self.shard, self._memory = shard, memory
        self._chunks: list[bytes] = []
        self._length = 0
        self._file: IO[bytes] | None = None

    def append(self, data: bytes) -> int:
        """Keep the bytes of one file; returns their offset in the pack."""
        offset = self._length
        self._length += len(data)
        try:
            if self._file is None and self._length > self._memory.left:
                self._spill()
            if self._file is None:
                self._chunks.append(data)
            else:
                self._file.write(data)
        except OSError as error:
            raise self._failure(error) from error
        return offset

    def finish(self, offsets: np.ndarray, sizes: np.ndarray, names: list[str], labels: list[str]) -> bytes | Path:
        """Close the pack. The index goes beside a pack on disk. Returns the blob."""
        if self._file is None:
            self._memory.left -= self._length
            return b"".join(self._chunks)
        packed_names, packed_labels = Names(names), Names(labels)
        index = io.BytesIO()
        np.savez(
            index,
            offsets=offsets,
            sizes=sizes,
            names=np.frombuffer(packed_names.text, np.uint8),
            name_offsets=packed_names.offsets,
            labels=np.frombuffer(packed_labels.text, np.uint8),
            label_offsets=packed_labels.offsets,
        )
        path = _cache_path(self.shard)
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._file.name, path)
            replace_file(path.with_suffix(".npz"), index.getvalue())  # last: a pack counts only with its index
        except OSError as error:
            raise self._failure(error) from error
        return path

    def discard(self) -> None:
        """Remove what an interrupted or failed unpacking left."""
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)

    def _spill(self) -> None:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if not self._memory.told:
            self._memory.told = True
            _log.warning(
                "%s and what follows are too large for memory and have no random access: they are unpacked "
                "once into %s (set NEXTSCALE_CACHE to move it; plain .tar shards need no copy)",
                self.shard,
                folder,
            )
        self._file = temporary(_cache_path(self.shard)).open("wb")
        for chunk in self._chunks:
            self._file.write(chunk)
        self._chunks = []

    def _failure(self, error: OSError) -> CacheError:
        return CacheError(
            f"{self.shard} cannot be unpacked into {cache_folder()}: {error.strerror or error}. Make room "
            "there, name another folder with NEXTSCALE_CACHE, or use plain .tar shards, which need no copy."
        )


def cached(shard: Path) -> tuple[Path, np.ndarray, np.ndarray, Names, Names] | None:
    """(pack, offsets, sizes, names, labels) of a shard that was unpacked to the cache folder before."""
    path = _cache_path(shard)
    try:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as index:
            offsets, sizes = index["offsets"], index["sizes"]
            names, labels = Names(()), Names(())
            names.text, names.offsets = index["names"].tobytes(), index["name_offsets"]
            labels.text, labels.offsets = index["labels"].tobytes(), index["label_offsets"]
        expected = int(offsets[-1] + sizes[-1]) if len(offsets) else 0
        return (path, offsets, sizes, names, labels) if path.stat().st_size == expected else None
    except (OSError, ValueError, KeyError):  # not there, or not ours: it is made anew
        return None


def _cache_path(shard: Path) -> Path:
    stat = shard.stat()
    key = f"{_LAYOUT}|{shard.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    return cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.pack"
