"""Many synthetic scenes, made by several processes into a folder that an interrupted run goes on with."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from .depth_store import DepthStoreWriter
from .scenes import SceneSample, SceneSettings, make_scene
from .workers import ignore_interrupts, usable_cores

VERSION = 1
"""Of what a seed draws; to be raised whenever scenes change, so that no folder holds two kinds."""


def write_scenes(
    folder: str | os.PathLike[str],
    settings: SceneSettings,
    number: int,
    *,
    workers: int | None = None,
    shard_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make scenes 0 to ``number`` - 1 and pack them (``depth_store``); what is there already is kept.

    Args:
        workers: processes; None: one for each core this process may use. 0: in this process.
        progress: called with (scenes done, ``number``).

    Raises:
        ShardError: the folder holds something else. OSError: it cannot be written.
    """
    if workers is None:
        workers = usable_cores()
    writer = DepthStoreWriter(
        folder,
        settings={"kind": "scenes", "version": VERSION, **asdict(settings)},
        size=(settings.height, settings.width),
        total=number,
        shard_size=shard_size,
    )
    done = writer.written
    if progress is not None:
        progress(done, number)
    for sample in _scenes(settings, range(done, number), workers):
        writer.write(sample.image, sample.depth, sample.intrinsics)
        done += 1
        if progress is not None:
            progress(done, number)
    return writer.folder


def _scenes(settings: SceneSettings, numbers: range, workers: int) -> Iterator[SceneSample]:
    make = partial(make_scene, settings)
    if workers == 0 or len(numbers) < 2:
        yield from map(make, numbers)
        return
    # open3d's threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), ignore_interrupts)
    try:
        # Not all at once: what waits to be written is held in memory.
        window = 32 * workers
        for start in range(numbers.start, numbers.stop, window):
            yield from pool.map(make, range(start, min(start + window, numbers.stop)), chunksize=4)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
