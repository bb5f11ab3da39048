"""Keys and values of what has been accepted, in fewer bytes.

8 bits a number; keys of one branch for all; and of the last scale, which no other looks back at, one block's alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nextscale.core.cache import KeyValueCache

LEVELS = 127
"""Steps from zero to the largest number of a vector in 8 bits."""


class Vectors:
    """Keys or values of one block, (rows, heads, positions, size), as they are or in 8 bits.

    In 8 bits every vector has a scale of its own, its largest number / 127, in float16.
    """

    def __init__(self, store: Tensor, scale: Tensor | None, dtype: torch.dtype) -> None:
        self._store, self._scale, self._dtype = store, scale, dtype

    @classmethod
    def of(cls, x: Float[Tensor, "rows positions heads size"]) -> Vectors:
        """Those that are computed at once, without a cache."""
        return cls(x.transpose(1, 2).contiguous(), None, x.dtype)

    @property
    def rows(self) -> int:
        return len(self._store)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def nbytes(self) -> int:
        return self._store.nbytes + (0 if self._scale is None else self._scale.nbytes)

    def copy(self, other: Vectors, stop: int) -> None:
        """Store another's positions before ``stop``, as it has them."""
        self._store[:, :, :stop] = other._store[:, :, :stop]
        if self._scale is not None and other._scale is not None:
            self._scale[:, :, :stop] = other._scale[:, :, :stop]

    def write(self, start: int, x: Float[Tensor, "rows positions heads size"]) -> None:
        """Store from position ``start`` on."""
        place = slice(start, start + x.shape[1])
        x = x.transpose(1, 2)
        if self._scale is None:
            self._store[:, :, place] = x
            return
        x = x.float()
        scale = (x.abs().amax(-1) / LEVELS).clamp_min(torch.finfo(torch.float16).tiny).to(torch.float16)
        # By the scale as reading multiplies with it: rounded, perhaps down, so that the largest passes the last step.
        steps = (x / scale.to(self._dtype).float()[..., None]).round_().clamp_(-LEVELS, LEVELS)
        self._store[:, :, place], self._scale[:, :, place] = steps.to(torch.int8), scale

    def read(self, stop: int, rows: slice = slice(None)) -> Float[Tensor, "rows heads positions size"]:
        """The positions before ``stop``."""
        store = self._store[rows, :, :stop]
        return store if self._scale is None else self._restore(store, self._scale[rows, :, :stop])

    def gather(
        self, heads: Int[Tensor, " tiles"], keys: Int[Tensor, "tiles keys"], rows: slice
    ) -> Float[Tensor, "rows tiles keys size"]:
        """The vectors of some positions of some heads."""
        index = (heads[:, None] * self._store.shape[2] + keys).flatten()
        picked = self._store[rows].flatten(1, 2).index_select(1, index)
        if self._scale is not None:
            picked = self._restore(picked, self._scale[rows].flatten(1, 2).index_select(1, index))
        return picked.unflatten(1, keys.shape)

    def _restore(self, steps: Tensor, scale: Tensor) -> Tensor:
        return steps.to(self._dtype).mul_(scale.to(self._dtype)[..., None])


class LiteCache(KeyValueCache):
    """A cache whose numbers may take 8 bits, and which keeps one branch's keys where all branches use its attention.

    Args:
        length: positions of all scales.
        last: positions of the last of them. Their keys and values are looked at within their own scale only, block
            after block, so that one block's room serves them all; 0: every block keeps all.
        bits: of a stored number: 8, or 16 for ``dtype`` as it is.
        share: keep keys of the first branch only, from when it is told how many rows that are, by :attr:`images`.
            Until then all rows' are kept, of the scales before.

    Attributes:
        images: rows of a branch; None where it is not known.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        length: int,
        heads: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        last: int = 0,
        bits: int = 16,
        share: bool = False,
    ) -> None:
        self._shape, self._kept = (layers, heads, length, head_size), length - last
        self._dtype, self._device, self._bits, self._share = dtype, torch.device(device), bits, share
        self._batch = batch
        self.images: int | None = None
        self._filled = [0] * layers
        self._values = self._allocate(batch)
        self._keys = None if share else self._allocate(batch)
        self._waiting: list[Tensor | None] = [None] * layers

    def _allocate(self, rows: int) -> list[Vectors]:
        """One for each block, and one for the last scale of any."""
        layers, _, length, _ = self._shape
        each = [self._vectors(rows, self._kept) for _ in range(layers)]
        return [*each, self._vectors(rows, length)] if self._kept < length else each

    def _vectors(self, rows: int, length: int) -> Vectors:
        _, heads, _, size = self._shape
        packed = self._bits == 8
        store = torch.empty(rows, heads, length, size, dtype=torch.int8 if packed else self._dtype, device=self._device)
        scale = torch.empty(store.shape[:-1], dtype=torch.float16, device=self._device) if packed else None
        return Vectors(store, scale, self._dtype)

    @property
    def length(self) -> int:
        return self._shape[2]

    @property
    def nbytes(self) -> int:
        waiting = sum(keys.nbytes for keys in self._waiting if keys is not None)
        return sum(vectors.nbytes for vectors in (*self._values, *(self._keys or ()))) + waiting

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Vectors, Vectors]:
        """Store (batch, positions, heads, size) and return everything of the block.

        Keys have the rows of one branch where they are shared, else all.

        Raises:
            ValueError: there is no room left, or the last scale does not come whole.
        """
        start, stop = self._filled[layer], self._filled[layer] + key.shape[1]
        if stop > self.length:
            raise ValueError(f"the cache has room for {self.length} positions, {stop} were to be written")
        if start > self._kept or self._kept < stop < self.length:
            raise ValueError(
                f"positions {start} to {stop} were to be written; those from {self._kept} on, of the last scale, are "
                "written all at once"
            )
        values = self._add(self._values, layer, start, stop, value)
        self._filled[layer] = stop
        if self._share and self.images is None:
            earlier = self._waiting[layer]
            waiting = key if earlier is None else torch.cat((earlier, key), dim=1)
            self._waiting[layer] = waiting
            return Vectors.of(waiting), values
        if self._keys is None:
            self._keys = self._allocate(self.images or self._batch)
        rows, waiting_keys = self._keys[layer].rows, self._waiting[layer]
        if waiting_keys is not None:
            self._keys[layer].write(0, waiting_keys[:rows])
            self._waiting[layer] = None
        return self._add(self._keys, layer, start, stop, key[:rows]), values

    def _add(self, stored: list[Vectors], layer: int, start: int, stop: int, x: Tensor) -> Vectors:
        """Where everything of the block up to ``stop`` is, after writing."""
        place = stored[layer if stop <= self._kept else -1]
        if place is not stored[layer]:
            place.copy(stored[layer], start)
        place.write(start, x)
        return place

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As of the usual cache: everything written so far, restored."""
        keys, values = self.write(layer, key, value)
        stop = self._filled[layer]
        return keys.read(stop).transpose(1, 2), values.read(stop).transpose(1, 2)
