"""Folders of views in SAR3D's layout, rendered from meshes by several processes."""

from __future__ import annotations

import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .gbuffers import CAMERAS, write_list, write_views
from .shapes_files import MeshError
from .shapes_prepare import HALF
from .shapes_repair import Opening, repair
from .shapes_sources import Item, Source
from .shapes_views import object_cameras, render
from .workers import ignore_interrupts, usable_cores


@dataclass(frozen=True)
class Rendering:
    """How objects are shown.

    Attributes:
        views: pictures of an object; the tokenizer's encoder reads the first half of 12.
        size: side of a picture in pixels (256 in the published data).
        opening, resolution: how open surfaces are repaired; None: objects are shown as they are in the file.
        seed: of the cameras.
    """

    views: int = 12
    size: int = 256
    opening: Opening | None = None
    resolution: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.views < 1 or self.size < 8:
            raise ValueError(f"{self.views} views of {self.size} pixels; expected 1 or more of 8 or more")


def render_one(folder: Path, source: Source, rendering: Rendering, place: tuple[int, Item, str]) -> dict[str, Any]:
    """Write one object's folder, unless it is there; returns its record."""
    number, item, path = place
    record: dict[str, Any] = {"name": item.name, "category": item.category, "folder": path}
    if (folder / path / CAMERAS).is_file():
        return record
    try:
        mesh, steps = source.mesh(number), []
        if rendering.opening is not None:
            repaired = repair(mesh, rendering.opening, rendering.resolution)
            mesh, steps = repaired.mesh, repaired.steps
        if not len(mesh.faces):
            raise MeshError("it is a cloud of points, which only repair turns into a surface")
        draw = np.random.default_rng([rendering.seed, zlib.crc32(item.name.encode())])
        views = render(mesh.normalised(HALF), object_cameras(draw, rendering.views), rendering.size)
    except (MeshError, MemoryError) as error:
        return {**record, "refused": str(error) or type(error).__name__}
    caption = None if item.category is None else f"a {item.category.replace('_', ' ').replace('-', ' ')}"
    write_views(folder / path, views, caption)
    return {**record, "steps": steps}


def render_all(
    folder: str | os.PathLike[str],
    source: Source,
    rendering: Rendering,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Write every object's folder, ``CATEGORY/NAME``, and ``dataset.json``; folders that are complete are kept.

    Objects lie in a box of half side 0.45, z up, before cameras 1.77 away, as the published ones do; the caption is
    that of the class. Returns the records of all objects.

    Args:
        workers: processes; None: one for each core this process may use. 0: in this process.
        progress: called with (objects done, all).

    Raises:
        OSError: the folder cannot be written.
    """
    out = Path(folder)
    places = [(number, item, _place(item)) for number, item in enumerate(source.items)]
    out.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for record in _rendered(partial(render_one, out, source, rendering), places, workers):
        records.append(record)
        if progress is not None:
            progress(len(records), len(places))
    groups: dict[str, list[str]] = {}
    for record in records:
        if "refused" not in record:
            groups.setdefault(record["category"] or "objects", []).append(record["folder"])
    write_list(out, groups)
    return records


def _place(item: Item) -> str:
    """A folder for an object, below one for its class."""
    name = Path(item.name).with_suffix("").as_posix().replace("/", "_")
    suffix = Path(item.name).suffix[1:]
    return f"{item.category or 'objects'}/{name}{'-' + suffix if suffix else ''}"


def _rendered(
    work: Callable[[tuple[int, Item, str]], dict[str, Any]],
    places: Sequence[tuple[int, Item, str]],
    workers: int | None,
) -> Iterator[dict[str, Any]]:
    if workers is None:
        workers = usable_cores()
    if workers == 0 or len(places) < 2:
        yield from map(work, places)
        return
    # open3d's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(places)), context, ignore_interrupts)
    try:
        yield from pool.map(work, places, chunksize=4)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
