"""Batches for ever, in this process or from workers, with the place to resume at."""

from collections.abc import Iterator
from typing import Any, cast

from .images import collate
from .sampler import EpochSampler


class Loader:
    """Infinite iterable of batches, made by `make_loader`.

    `state` is the place after the batches that were handed out, whatever workers have read ahead: an
    `EpochSampler` made with `**state` continues there. `batches_per_epoch` is the sampler's.
    """

    def __init__(self, dataset: Any, sampler: EpochSampler, *, workers: int, prefetch: int, pin_memory: bool) -> None:
        self.dataset, self.sampler = dataset, sampler
        self.batches_per_epoch = sampler.batches_per_epoch
        self._workers, self._prefetch, self._pin_memory = workers, prefetch, pin_memory
        self._given = 0

    @property
    def state(self) -> dict[str, int]:
        """{"start_epoch", "start_batch"} of the batch that comes next."""
        return self.sampler.position(self._given)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._given = 0
        for batch in self._batches():
            self._given += 1
            yield batch

    def _batches(self) -> Iterator[dict[str, Any]]:
        import torch

        source = _Batches(self.dataset)
        pin_memory = self._pin_memory and torch.cuda.is_available()
        if self._workers == 0:
            for keys in self.sampler:
                batch = source.__getitems__(keys)
                yield pinned(batch) if pin_memory else batch
        else:
            from torch.utils.data import DataLoader

            yield from DataLoader(
                cast(Any, source),  # PyTorch asks for a subclass of its Dataset, and needs only these methods
                batch_sampler=self.sampler,
                num_workers=self._workers,
                prefetch_factor=self._prefetch,
                pin_memory=pin_memory,
                collate_fn=_as_is,
            )


def make_loader(
    dataset: Any, sampler: EpochSampler, *, workers: int = 0, prefetch: int = 2, pin_memory: bool = False
) -> Loader:
    """Batches of a map-style dataset in the sampler's order.

    A dataset with `fetch(keys) -> batch` makes its batches itself; of another, samples are collated. With
    `workers` processes, each reads `prefetch` batches ahead; with 0, batches are made when asked for, which
    is fastest for data in memory. `pin_memory` puts tensors into page-locked memory, for asynchronous
    copies to a CUDA device; without one it does nothing.
    """
    if workers < 0 or prefetch < 1:
        raise ValueError(f"workers {workers} must be at least 0 and prefetch {prefetch} at least 1")
    if len(dataset) < sampler.length:
        raise ValueError(
            f"the sampler goes up to sample {sampler.length - 1}, the dataset has {len(dataset)}: "
            "make the sampler with the length of the dataset"
        )
    return Loader(dataset, sampler, workers=workers, prefetch=prefetch, pin_memory=pin_memory)


class _Batches:
    """Hands a whole batch of keys to the dataset: `__getitems__` is what PyTorch's workers call for it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        fetch = getattr(self.dataset, "fetch", None)
        batch: dict[str, Any] = fetch(keys) if fetch else collate([self.dataset[key] for key in keys])
        return batch


def _as_is(batch: Any) -> Any:
    return batch


def pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch in page-locked memory."""
    import torch

    return {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
