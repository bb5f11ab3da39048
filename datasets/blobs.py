"""Random access to the bytes of many small files: in folders, inside shards, or unpacked once.

An ImageNet has over a million samples and every data-loading process holds the index, so it is kept as a few
arrays instead of a million Python objects.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

# More shards than that can be open at a time only on machines with a raised limit of file descriptors.
_OPEN_FILES = 64


class Names:
    """An immutable list of strings in one buffer."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(name) for name in encoded], out=self.offsets[1:])
        self.text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, position: int) -> str:
        begin, end = self.offsets[position : position + 2].tolist()
        return self.text[begin:end].decode("utf-8", "surrogateescape")


class Store(Protocol):
    """Where the encoded images lie: sample number -> bytes of its file."""

    def __len__(self) -> int: ...

    def read(self, position: int) -> bytes: ...


@dataclass(frozen=True)
class FolderStore:
    """Image files under one folder, by their relative names."""

    root: Path
    names: Names

    def __len__(self) -> int:
        return len(self.names)

    def read(self, position: int) -> bytes:
        return (self.root / self.names[position]).read_bytes()


@dataclass
class BlobStore:
    """Ranges of bytes in blobs: a blob is a file (a tar archive, an unpacked shard) or bytes in memory."""

    blobs: list[Path | bytes]
    blob: np.ndarray  # int32 (N,)
    offset: np.ndarray  # int64 (N,)
    size: np.ndarray  # int64 (N,)
    _open: dict[int, int] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.blob)

    def read(self, position: int) -> bytes:
        number, offset, size = int(self.blob[position]), int(self.offset[position]), int(self.size[position])
        blob = self.blobs[number]
        if isinstance(blob, bytes):
            return blob[offset : offset + size]
        # pread keeps no position, so descriptors may be shared by processes that were forked after the first
        # read.
        return os.pread(self._descriptor(number, blob), size, offset)

    def _descriptor(self, number: int, path: Path) -> int:
        descriptor = self._open.pop(number, None)
        if descriptor is None:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._open[number] = descriptor  # last in the dictionary = most recently used
        return descriptor

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
