"""Prepared objects as batches: points of their surfaces, points in space with whether they lie inside, pictures.

Objects lie in [-1, 1]^3 with z up. They are kept as :mod:`.array_store` has it: points as 16-bit and normals as 8-bit
numbers, occupancy as bits; what is known of a point was computed where the stored, rounded point lies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .array_store import ArrayStore, Column, is_store
from .errors import DatasetError

KIND = "nextscale-shapes"
REACH = 1.25
"""Largest coordinate that can be stored; points near the surface may lie a little outside of [-1, 1]."""
Key = int | tuple[int, int]


@dataclass(frozen=True)
class ShapeSamples:
    """What is kept of an object.

    Attributes:
        surface: points on the surface.
        uniform: points drawn uniformly in [-1, 1]^3.
        near: points near the surface, half of them at each deviation of ``noise``.
        noise: deviations of the Gaussian noise that moves surface points, in the units of the cube.
        distances: keep signed distances, negative inside.
        views: pictures; 0: none.
        size: side of a picture in pixels.
    """

    surface: int = 8192
    uniform: int = 8192
    near: int = 8192
    noise: tuple[float, float] = (0.005, 0.05)
    distances: bool = False
    views: int = 0
    size: int = 128

    def __post_init__(self) -> None:
        if self.surface < 1 or min(self.uniform, self.near, self.views) < 0 or self.uniform + self.near < 1:
            raise ValueError(
                f"{self.surface} points on the surface, {self.uniform} uniform and {self.near} near ones, {self.views} "
                "views; expected 1 or more on the surface, 1 or more of the others, and none negative"
            )
        if self.size < 8 or min(self.noise) <= 0:
            raise ValueError(f"pictures of {self.size} pixels, noise {self.noise}; expected 8 or more, and above 0")

    @property
    def queries(self) -> int:
        return self.uniform + self.near

    def columns(self) -> dict[str, Column]:
        """What is written of an object."""
        columns = {
            "points": Column("int16", (self.surface, 3)),
            "normals": Column("int8", (self.surface, 3)),
            "queries": Column("int16", (self.queries, 3)),
            "occupied": Column("uint8", (-(-self.queries // 8),)),
            "label": Column("int32", ()),
        }
        if self.distances:
            columns["distance"] = Column("float16", (self.queries,))
        if self.views:
            columns["image"] = Column("uint8", (self.views, self.size, self.size, 3))
        return columns


def quantised(points: np.ndarray) -> np.ndarray:
    """Coordinates within :data:`REACH` as int16."""
    return np.round(np.clip(points / REACH, -1, 1) * 32767).astype(np.int16)


def restored(stored: np.ndarray) -> np.ndarray:
    """Coordinates of :func:`quantised` points, float32."""
    return stored.astype(np.float32) * np.float32(REACH / 32767)


def packed_row(
    label: int,
    points: np.ndarray,
    normals: np.ndarray,
    queries: np.ndarray,
    occupied: np.ndarray,
    distance: np.ndarray | None = None,
    image: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """A row of :meth:`ShapeSamples.columns`.

    Args:
        points, normals: (surface, 3); normals of length 1.
        queries: int16 (queries, 3) of :func:`quantised`, the uniform ones first. occupied: bool (queries,).
        distance: (queries,), signed. image: uint8 (views, size, size, 3).
    """
    row = {
        "points": quantised(points),
        "normals": np.round(normals * 127).astype(np.int8),
        "queries": queries,
        "occupied": np.packbits(occupied),
        "label": np.array(label, np.int32),
    }
    if distance is not None:
        row["distance"] = distance.astype(np.float16)
    if image is not None:
        row["image"] = image
    return row


class ShapeSet:
    """A folder of prepared objects (``nextscale prepare shapes``); ``fetch`` makes batches.

    A batch of n objects holds

    - ``surface`` float32 (n, P, 6): points and unit normals;
    - ``queries`` float32 (n, Q, 3): points in space, uniform ones first; ``occupied`` bool (n, Q): inside;
      ``near`` bool (n, Q): drawn near the surface; ``distance`` float32 (n, Q), negative inside, where it is kept;
    - ``label`` int64 (n,): number in ``classes``; -1 where an object has none;
    - ``image`` float32 (n, 3, H, W) in [0, 1] on white, one of the object's views, where they are kept;
    - ``index`` int64 (n,).

    Points and views are drawn anew for each (epoch, object) from ``seed`` and nothing else.

    Args:
        folder: of the prepared objects.
        surface: points P of a sample; None: all, in the stored order.
        uniform, near: points Q = uniform + near; None: all, in the stored order.
        noise: deviation of Gaussian noise on the surface points (3DShape2VecSet: 0.005 in training).
        stretch: each axis is scaled by a factor from 1 - stretch to 1 + stretch and the object brought back to the cube
            (3DShape2VecSet: 0.25 in training); not with images or distances, which would not follow.
        images: False: leave pictures out. view: this one instead of a random one.
        classes: names in the order of their numbers, of another set; None: the set's own.

    Attributes:
        classes: names of the classes. names: of the objects.

    Raises:
        DatasetError: the folder cannot be used, or holds fewer points than are asked for.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        surface: int | None = None,
        uniform: int | None = None,
        near: int | None = None,
        noise: float = 0.0,
        stretch: float = 0.0,
        images: bool = True,
        view: int | None = None,
        seed: int = 0,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.store = ArrayStore(folder, KIND)
        if not len(self.store):
            raise DatasetError(f"{folder} holds no object: all {len(self.store.refused)} files were refused")
        kept = self.store.settings["samples"]
        self._uniform: int = kept["uniform"]
        counts = {"surface": kept["surface"], "uniform": self._uniform, "near": kept["near"]}
        for name, wanted in (("surface", surface), ("uniform", uniform), ("near", near)):
            if wanted is not None and not 0 <= wanted <= counts[name]:
                raise DatasetError(f"{name} is {wanted}; {folder} holds {counts[name]} such points of an object")
        self.wanted = {"surface": surface, "uniform": uniform, "near": near}
        self.counts = {name: counts[name] if value is None else value for name, value in self.wanted.items()}
        self.images = images and "image" in self.store.columns
        if view is not None and not (self.images and 0 <= view < kept["views"]):
            raise DatasetError(f"view is {view}; {folder} has {kept['views'] if self.images else 0} views of an object")
        if stretch and (self.images or "distance" in self.store.columns):
            raise DatasetError("stretch would make pictures and distances wrong: leave it 0, or images out")
        if not 0 <= stretch < 1 or noise < 0:
            raise DatasetError(f"stretch is {stretch} and noise {noise}; expected 0 to below 1, and 0 or more")
        self.noise, self.stretch, self.view, self.seed = noise, stretch, view, seed
        own: list[str] = self.store.settings["classes"]
        self.classes = tuple(own if classes is None else classes)
        if unknown := sorted({*own} - {*self.classes}):
            raise DatasetError(f"{folder} has the classes {', '.join(unknown)}, which are not among those given")
        self._numbers = np.array([self.classes.index(name) for name in own] + [-1], np.int64)
        self.names: list[str] = [record["name"] for record in self.store.records]

    def __len__(self) -> int:
        return len(self.store)

    @property
    def labels(self) -> np.ndarray:
        """int64 (objects,): the class of every object."""
        return self._numbers[self.store.rows("label", range(len(self)))]

    def fetch(self, keys: Sequence[Key]) -> dict[str, Any]:
        """A batch of the objects with these numbers, of epoch 0, or of these (epoch, number) pairs."""
        pairs = [(0, key) if isinstance(key, int) else key for key in keys]
        rows = [self._read(epoch, number) for epoch, number in pairs]
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}

    def _read(self, epoch: int, number: int) -> dict[str, np.ndarray]:
        store, draw = self.store, np.random.default_rng([self.seed, epoch, number])
        chosen = _some(draw, store.columns["points"].shape[0], self.wanted["surface"])
        points = restored(store.row("points", number)[chosen])
        normals = store.row("normals", number)[chosen].astype(np.float32)
        places = np.concatenate(
            (
                _some(draw, self._uniform, self.wanted["uniform"]),
                self._uniform + _some(draw, store.columns["queries"].shape[0] - self._uniform, self.wanted["near"]),
            )
        )
        queries = restored(store.row("queries", number)[places])
        bits = np.asarray(store.row("occupied", number))
        if self.stretch:
            factors = draw.uniform(1 - self.stretch, 1 + self.stretch, 3).astype(np.float32)
            # Back to the size it had, which surface points show closely enough.
            factors *= np.abs(points).max() / np.abs(points * factors).max()
            points, queries, normals = points * factors, queries * factors, normals / factors
        normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)
        if self.noise:
            points = points + draw.normal(0, self.noise, points.shape).astype(np.float32)
        found = {
            "surface": np.concatenate((points, normals), axis=1).astype(np.float32),
            "queries": queries.astype(np.float32),
            "occupied": ((bits[places // 8] >> (7 - places % 8)) & 1).astype(bool),
            "near": places >= self._uniform,
            "label": self._numbers[int(store.row("label", number))],
            "index": np.array(number, np.int64),
        }
        if "distance" in store.columns:
            found["distance"] = store.row("distance", number)[places].astype(np.float32)
        if self.images:
            views = store.row("image", number)
            view = int(draw.integers(len(views))) if self.view is None else self.view
            found["image"] = views[view].transpose(2, 0, 1).astype(np.float32) / 255
        return found


def _some(draw: np.random.Generator, count: int, wanted: int | None) -> np.ndarray:
    """Places drawn without replacement; all in order where none are chosen."""
    if wanted is None:
        return np.arange(count)
    return draw.permutation(count)[:wanted]


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one of prepared objects."""
    return is_store(folder, KIND)


def samples_of(settings: Mapping[str, Any]) -> ShapeSamples:
    """The samples of a store's settings."""
    kept = dict(settings["samples"])
    return ShapeSamples(**{**kept, "noise": tuple(kept["noise"])})
