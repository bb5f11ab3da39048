"""Shapes of a model or a folder against true ones: how well they are rebuilt, or how alike two sets are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextscale.datasets.errors import DatasetError, listed
from nextscale.datasets.shapes import ShapeSet, is_prepared
from nextscale.datasets.shapes_files import SUFFIXES, Mesh, MeshError, read_mesh
from nextscale.datasets.shapes_repair import repair
from nextscale.datasets.shapes_sampling import surface_points
from nextscale.datasets.shapes_sources import open_source
from nextscale.datasets.shapes_topology import closed, pieces
from nextscale.datasets.shapes_winding import SurfaceField
from nextscale.evaluation.shapes import Convention, SurfaceFigures, compare_clouds, volume_iou
from nextscale.tasks.shapes.objects import Shape

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Target:
    """A true shape in the cube of a convention.

    Attributes:
        name, category: of it.
        points, normals: (n, 3) on its surface. queries: (q, 3) in space; occupied: bool (q,), which lie inside.
        given: (p, 6), points and normals of a prepared object as its file has them; None: it comes from a mesh.
        mesh: None: it comes from a prepared object.
        move: what brings coordinates of the target's file to those of ``points``: (factor, shift).
    """

    name: str
    category: str | None
    points: np.ndarray
    normals: np.ndarray
    queries: np.ndarray
    occupied: np.ndarray
    move: tuple[float, np.ndarray]
    given: np.ndarray | None = None
    mesh: Mesh | None = None


@dataclass(frozen=True)
class References:
    """True shapes: a prepared folder (:class:`nextscale.datasets.shapes.ShapeSet`), or a folder of meshes, repaired.

    Attributes:
        points: drawn on the surface of each mesh, and points in space; of prepared ones all that there are.
        seed: of these points.
        refused: filled while meshes are read: those that are no solids and were left out, and why.
    """

    folder: Path
    convention: Convention
    limit: int | None = None
    points: int = 100_000
    seed: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Target]:
        yield from (self._prepared() if is_prepared(self.folder) else self._meshes())

    def __len__(self) -> int:
        if is_prepared(self.folder):
            count = len(ShapeSet(self.folder, images=False))
            return count if self.limit is None else min(count, self.limit)
        return len(open_source(self.folder, number=self.limit).items)

    def names(self) -> list[str]:
        """Of the shapes, in order."""
        if is_prepared(self.folder):
            return ShapeSet(self.folder, images=False).names[: self.limit]
        return [item.name for item in open_source(self.folder, number=self.limit).items]

    def clouds(self, count: int, progress: Progress | None = None) -> tuple[list[np.ndarray], list[str | None]]:
        """(count, 3) points of every shape, its box's middle at the origin and its longest side that of the convention;
        and the classes."""
        clouds, categories = [], []
        small = replace(self, points=max(count, 256))
        for number, target in enumerate(small):
            chosen = np.random.default_rng([self.seed, number]).permutation(len(target.points))[:count]
            clouds.append(target.points[chosen])
            categories.append(target.category)
            if progress is not None:
                progress(len(clouds), len(self))
        if len({len(cloud) for cloud in clouds}) > 1 or len(clouds[0]) < count:
            raise DatasetError(f"{self.folder} holds {len(clouds[0])} surface points of an object; {count} are needed")
        return clouds, categories

    def _prepared(self) -> Iterator[Target]:
        data = ShapeSet(self.folder, images=False, near=0)
        factor = self.convention.half / float(data.store.settings["half"])
        for number in range(len(self)):
            batch = {name: value[0].numpy() for name, value in data.fetch([number]).items()}
            points, normals = np.split(batch["surface"], 2, axis=1)
            label = int(batch["label"])
            yield Target(
                data.names[number],
                data.classes[label] if label >= 0 else None,
                points * factor,
                normals,
                batch["queries"] * factor,
                batch["occupied"],
                (factor, np.zeros(3)),
                given=batch["surface"],
            )

    def _meshes(self) -> Iterator[Target]:
        source = open_source(self.folder, number=self.limit)
        for number, item in enumerate(source.items):
            try:
                read = source.mesh(number)
                mesh = repair(read).mesh.normalised(self.convention.half)
            except MeshError as error:
                self.refused[item.name] = str(error)
                if len(self.refused) == len(source.items):
                    raise DatasetError(f"{self.folder} holds no solid; {self.folder / item.name}: {error}") from None
                continue
            draw = np.random.default_rng([self.seed, number])
            points, normals, _ = surface_points(mesh, self.points, draw)
            queries = draw.uniform(-self.convention.iou, self.convention.iou, (self.points, 3))
            low, high = read.vertices.min(0), read.vertices.max(0)
            factor = 2 * self.convention.half / float((high - low).max())
            yield Target(
                item.name,
                item.category,
                points,
                normals,
                queries,
                SurfaceField(mesh.vertices, mesh.faces).occupied(queries),
                (factor, -factor * (low + high) / 2),
                mesh=mesh,
            )


Rebuild = Callable[[Target], Mesh]
"""What is evaluated: a mesh of a target, z up, in the coordinates of the target's file."""


def from_folder(folder: Path, names: Sequence[str]) -> Rebuild:
    """Meshes of a folder, named as their targets are, with any suffix of a mesh.

    Raises:
        DatasetError: some are missing; they are listed.
    """
    places = {}
    for name in names:
        stem = folder / (Path(name).with_suffix("") if Path(name).suffix.lower() in SUFFIXES else Path(name))
        found = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES]
        places[name] = next((place for place in found if place.is_file()), None)
    if missing := [name for name, place in places.items() if place is None]:
        raise DatasetError(f"{folder} lacks meshes of {len(missing)} targets: {listed(missing, 5)}")
    return lambda target: read_mesh(places[target.name])  # type: ignore[arg-type]


def from_tokenizer(tokenizer: Any, resolution: int, scales: int | None = None) -> Rebuild:
    """What a tokenizer of points keeps of a shape (``reconstruct``), in so many first scales; None: in all."""
    inputs = getattr(tokenizer.config, "points", None)

    def rebuild(target: Target) -> Mesh:
        surface = target.given
        factor, shift = target.move
        if surface is None:
            # A mesh's points, as large as prepared objects are.
            half = 0.95 / float(np.abs(target.points).max())
            surface = np.concatenate((target.points * half, target.normals), axis=1)
        draw = np.random.default_rng(0)
        chosen = surface[draw.permutation(len(surface))[:inputs]].astype(np.float32)
        points = torch.from_numpy(chosen)[None]
        made = as_mesh(tokenizer.reconstruct(points, scales=scales, resolution=resolution)[0])
        if target.given is None:
            made = replace(made, vertices=(made.vertices / half - shift) / factor)
        return made

    return rebuild


def as_mesh(shape: Shape) -> Mesh:
    """A generator's shape, z up."""
    upright = shape.turned("z")
    colours = None
    if upright.colours is not None:
        colours = np.round(upright.colours[upright.faces].mean(1) * 255).astype(np.uint8)
    return Mesh(upright.vertices.astype(np.float64), upright.faces, colours)


def compare_reconstruction(target: Target, made: Mesh, convention: Convention, seed: int = 0) -> dict[str, Any]:
    """Figures of one mesh, placed as its target; ``iou`` is None where it is not closed and so has no inside."""
    factor, shift = target.move
    placed = replace(made, vertices=made.vertices * factor + shift)
    if not len(placed.faces):
        empty = np.zeros((0, 3))
        figures = compare_clouds(empty, target.points, convention.thresholds, empty, target.normals)
        return {"name": target.name, **figures.by_name(), "iou": 0.0}
    points, normals, _ = surface_points(placed, convention.points, np.random.default_rng(seed))
    figures = compare_clouds(points, target.points, convention.thresholds, normals, target.normals)
    iou = None
    if closed(placed.faces):
        inside = SurfaceField(placed.vertices, placed.faces).occupied(target.queries)
        iou = float(volume_iou(inside, target.occupied))
    return {"name": target.name, **figures.by_name(), "iou": iou}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over shapes of every figure, and how many shapes had an inside."""
    found: dict[str, Any] = {"shapes": len(rows), "closed": sum(row["iou"] is not None for row in rows)}
    derived = ("chamfer_l1", "chamfer_l2", "chamfer_sum", "normals", "f_score", "iou")
    for name in (*SurfaceFigures.__dataclass_fields__, *derived):
        values = [row[name] for row in rows if row[name] is not None]
        found[name] = np.mean(values, axis=0).tolist() if values else None
    return found


# --- generation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latency:
    """Seconds of one shape, after one that warmed up: reading the condition, the scales, decoding and meshing."""

    condition: float
    scales: float
    mesh: float


def measure_latency(model: Any, condition: Any, **options: Any) -> Latency:
    """Latency of a generator for one condition, batch 1; what is queued on a device is waited for."""
    device = torch.device(model.device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    model.generate(condition, n=1, seed=0, **options)
    begun = now()
    model.prepare(condition)
    read = now()
    marks: list[float] = []
    model.generate(condition, n=1, seed=1, progress=lambda done, total: marks.append(now()), **options)
    return Latency(read - begun, max(marks[-1] - read - (read - begun), 0.0), now() - marks[-1])


def wholeness(mesh: Mesh, border: float | None = None) -> dict[str, Any]:
    """Of a generated mesh: its pieces, the largest one's share of the volume, whether a vertex reaches ``border``."""
    volumes = [abs(mesh.select(part).volume) for part in pieces(mesh)] if len(mesh.faces) else []
    total = sum(volumes)
    return {
        "pieces": len(volumes),
        "largest": max(volumes) / total if total else 0.0,
        "touches": border is not None and bool(len(mesh.vertices)) and float(np.abs(mesh.vertices).max()) >= border,
    }


def cloud_of(mesh: Mesh, count: int, half: float, seed: int) -> np.ndarray:
    """(count, 3) points on a mesh, its box's middle at the origin and its longest side 2 ``half``."""
    return surface_points(mesh.normalised(half), count, np.random.default_rng(seed))[0]
