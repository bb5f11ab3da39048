"""Which samples make up which batch, for ever, on every rank, resumable at any batch."""

from collections.abc import Iterator

import numpy as np


class EpochSampler:
    """Infinite iterator over batches of (epoch, index) keys.

    Epoch e = 0, 1, … is `torch.randperm(length)` seeded with e + seed (or 0, 1, … without `shuffle`).
    `fill_last` repeats the epoch from its first sample on until the last batch of every rank is full.

    The batches of all ranks together are consecutive samples of that order, and rank r has the r-th part of
    each: a run is made of the same global batches on any number of ranks. With `contiguous` it is VAR's own
    distributed sampler instead: the filled order is cut into `world_size` shares at `torch.linspace` bounds, a
    rank walks its share in steps of `batch_size`, and data shorter than half a global batch is repeated once
    only, so that its batches stay short.

    `groups`, a number for each sample: all samples of one global batch are of the same group, whose last batch is
    filled from the group's own first samples; the order of batches is drawn too. It goes with `fill_last` only.

    `start_epoch`, `start_batch`: where to begin; the batches from there on are those an unbroken run would
    have given. `start_batch` counts this rank's batches and may exceed an epoch. Iterating twice begins at
    the start twice.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        fill_last: bool = True,
        contiguous: bool = False,
        groups: np.ndarray | None = None,
        start_epoch: int = 0,
        start_batch: int = 0,
    ) -> None:
        import torch

        if length < 1 or batch_size < 1:
            raise ValueError(f"length {length} and batch_size {batch_size} must both be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of the {world_size} ranks 0 to {world_size - 1}")
        if start_epoch < 0 or start_batch < 0:
            raise ValueError(f"start_epoch {start_epoch} and start_batch {start_batch} must not be negative")
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size
        self.seed, self.shuffle, self.fill_last = seed, shuffle, fill_last
        if groups is not None and (len(groups) != length or contiguous or not fill_last):
            raise ValueError(f"groups are {len(groups)} numbers, expected {length}, with fill_last and not contiguous")
        self._groups = groups
        self._global_batch = group = batch_size * world_size
        if groups is None:
            missing = -length % group if fill_last else 0
        else:
            missing = int((-np.unique(groups, return_counts=True)[1] % group).sum())
        self._filled = length + (min(missing, length) if contiguous else missing)
        if contiguous:
            bounds = torch.linspace(0, self._filled, world_size + 1, dtype=torch.int).tolist()
            self._step, first, last = batch_size, bounds[rank], bounds[rank + 1]
        else:
            self._step, first, last = group, rank * batch_size, self._filled
        self._begins, self._last = range(first, last, self._step), last
        if not self._begins:
            raise ValueError(
                f"{length} samples leave nothing for rank {rank} of {world_size}: use fewer ranks or more samples"
            )
        self.batches_per_epoch = len(self._begins)
        extra, self.start_batch = divmod(start_batch, self.batches_per_epoch)
        self.start_epoch = start_epoch + extra

    def order(self, epoch: int) -> np.ndarray:
        """An epoch of all ranks: int64 indices, filled."""
        import torch

        generator = torch.Generator().manual_seed(epoch + self.seed)
        order = torch.randperm(self.length, generator=generator).numpy() if self.shuffle else np.arange(self.length)
        if self._groups is None:
            return np.resize(order, self._filled)  # repeated from its beginning
        size, kinds = self._global_batch, self._groups[order]
        parts = [order[kinds == kind] for kind in np.unique(self._groups)]
        batches = np.concatenate([np.resize(part, len(part) + -len(part) % size) for part in parts]).reshape(-1, size)
        if self.shuffle:
            batches = batches[torch.randperm(len(batches), generator=generator).numpy()]
        return batches.reshape(-1)

    def position(self, batches: int) -> dict[str, int]:
        """`start_epoch` and `start_batch` of a sampler that continues after `batches` batches of this one."""
        epochs, batch = divmod(self.start_batch + batches, self.batches_per_epoch)
        return {"start_epoch": self.start_epoch + epochs, "start_batch": batch}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, batch = self.start_epoch, self.start_batch
        while True:
            order = self.order(epoch)
            for begin in self._begins[batch:]:
                yield [(epoch, int(index)) for index in order[begin : min(begin + self.batch_size, self._last)]]
            epoch, batch = epoch + 1, 0
