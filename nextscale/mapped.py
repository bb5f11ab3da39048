"""Memory-mapped weights: giving back the memory of pages that are no longer needed."""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right

from torch import Tensor


class MappedFiles:
    """The parts of this process's memory that are files, as they are now.

    A tensor read from a memory-mapped file occupies memory as soon as it is used, until the last tensor of
    that file is gone. :meth:`release` gives one tensor's pages back at once: they would be read from the file
    again. On other systems than Linux nothing is known to be mapped, and nothing is released.
    """

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        if sys.platform != "linux":
            return
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            for line in file:
                addresses, rights, _, _, inode, *_ = line.split(maxsplit=5)
                if inode != "0" and rights.endswith("p"):
                    start, stop = addresses.split("-")
                    self._ranges.append((int(start, 16), int(stop, 16)))
        self._libc = ctypes.CDLL(None, use_errno=True)

    def release(self, tensor: Tensor) -> None:
        """Forget the pages that only this tensor occupies, where it lies in a file that is mapped for reading.

        What was written into the tensor since it was read is lost.
        """
        address = tensor.data_ptr()
        place = bisect_right(self._ranges, (address, sys.maxsize)) - 1
        if place < 0 or address + tensor.nbytes > self._ranges[place][1]:
            return
        # Whole pages only: those at the edges are shared with the neighbours.
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (address + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            self._libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(mmap.MADV_DONTNEED))
