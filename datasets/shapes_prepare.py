"""Objects prepared by several processes into a folder that an interrupted run goes on with."""

from __future__ import annotations

import multiprocessing
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .array_store import ArrayStoreWriter
from .errors import DatasetError, listed
from .shapes import KIND, ShapeSamples
from .shapes_files import MeshError
from .shapes_repair import Opening, repair
from .shapes_sampling import sample
from .shapes_sources import Item, Source
from .workers import ignore_interrupts, usable_cores

HALF = 0.95
"""Half of an object's longest side: some three cells of a grid of 128 over [-1, 1] are left at the border."""
_VERSION = 1


@dataclass(frozen=True)
class Preparation:
    """How objects are prepared.

    Attributes:
        samples: what is kept.
        opening: what is done with open surfaces. resolution: cells along the longest side of one that is rebuilt.
        half: objects are centred and scaled until half of their longest side is this.
        seed: of the points.
    """

    samples: ShapeSamples = field(default_factory=ShapeSamples)
    opening: Opening = "rebuild"
    resolution: int = 128
    half: float = HALF
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.half <= 1 or not 16 <= self.resolution <= 512:
            raise ValueError(
                f"half is {self.half} and the resolution {self.resolution}; expected above 0 to 1, and 16 to 512"
            )


def prepare_one(
    source: Source, preparation: Preparation, number: int, item: Item
) -> tuple[dict[str, Any], dict[str, np.ndarray] | None]:
    """A record and a row of one object; no row where it is refused, and the record says why.

    Points depend on the object's name and the seed only.
    """
    record: dict[str, Any] = {"name": item.name, "category": item.category, "stamp": item.stamp}
    begun = time.perf_counter()
    try:
        repaired = repair(source.mesh(number), preparation.opening, preparation.resolution)
        draw = np.random.default_rng([preparation.seed, zlib.crc32(item.name.encode())])
        label = -1 if item.category is None else source.classes.index(item.category)
        row, doubtful = sample(repaired.mesh.normalised(preparation.half), preparation.samples, label, draw)
    except (MeshError, OSError, MemoryError) as error:
        return {**record, "refused": str(error) or type(error).__name__}, None
    seconds = round(time.perf_counter() - begun, 2)
    return {**record, **repaired.record(), "thin": round(doubtful, 4), "seconds": seconds}, row


def prepare(
    folder: str | os.PathLike[str],
    source: Source,
    preparation: Preparation,
    *,
    workers: int | None = None,
    shard_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Prepare all objects of a source for :class:`.shapes.ShapeSet`; returns the records of all, refused ones too.

    What is in the folder already is kept: an interrupted run goes on, and objects that the source has gained since are
    added.

    Args:
        workers: processes; None: one for each core this process may use. 0: in this process.
        progress: called with (objects done, all).

    Raises:
        ShardError: the folder holds something else.
        DatasetError: a file that was prepared has changed, or is gone.
        OSError: it cannot be written.
    """
    settings = {"version": _VERSION, **source.settings, "classes": list(source.classes), **asdict(preparation)}
    columns = preparation.samples.columns()
    writer = ArrayStoreWriter(folder, kind=KIND, settings=settings, columns=columns, shard_size=shard_size)
    items = source.items
    stamps = {item.name: item.stamp for item in items}
    done = {record["name"]: record["stamp"] for record in writer.done}
    if changed := [name for name, stamp in done.items() if stamps.get(name) != stamp]:
        raise DatasetError(
            f"{listed(changed, 3)} changed or went after {folder} was prepared: choose another folder, or remove it"
        )
    waiting = [(number, item) for number, item in enumerate(items) if item.name not in done]
    count = len(done)
    if progress is not None:
        progress(count, len(items))
    for record, row in _prepared(source, preparation, waiting, workers):
        writer.write(record, row)
        count += 1
        if progress is not None:
            progress(count, len(items))
    writer.finish()
    return writer.done


def _prepared(
    source: Source, preparation: Preparation, waiting: Sequence[tuple[int, Item]], workers: int | None
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray] | None]]:
    """Records and rows in order."""
    if workers is None:
        workers = usable_cores()
    if workers == 0 or len(waiting) < 2:
        for number, item in waiting:
            yield prepare_one(source, preparation, number, item)
        return
    # open3d's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(waiting)), context, _begin, (source, preparation))
    try:
        # Not all at once: what waits to be written is held in memory.
        jobs: deque[Future[Any]] = deque()
        for number, item in waiting:
            jobs.append(pool.submit(_work, number, item))
            if len(jobs) >= 4 * workers:
                yield jobs.popleft().result()
        while jobs:
            yield jobs.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_job: tuple[Source, Preparation] | None = None


def _begin(source: Source, preparation: Preparation) -> None:
    """In each process: the source is sent once."""
    global _job
    _job = source, preparation
    ignore_interrupts()


def _work(number: int, item: Item) -> tuple[dict[str, Any], dict[str, np.ndarray] | None]:
    assert _job is not None
    return prepare_one(*_job, number, item)
