"""What all generators of shapes return and offer: coloured triangle meshes, of conditions, from seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.checkpoint import write_atomically
from nextscale.core.random import BatchDraws, Draws, ImageDraws, image_seeds

Axis = Literal["y", "z"]

FORMATS: dict[str, Axis] = {".glb": "y", ".obj": "y", ".ply": "z", ".stl": "z"}
"""File formats, with the axis that readers such as Blender take as up in them."""


@dataclass(frozen=True, eq=False)
class Shape:
    """A triangle mesh. Its parts are on the CPU, and checked when it is made.

    Attributes:
        vertices: float32, right-handed coordinates in the generator's units (its documentation names the box).
        faces: int64 vertex numbers, counter-clockwise as seen from outside.
        colours: float32 in [0, 1], red, green and blue of every vertex; None: the shape has none.
        up: which axis points up. Files are turned to what their format takes as up.

    Raises:
        ValueError: a coordinate is not finite, or the parts do not fit together.
    """

    vertices: Float[np.ndarray, "vertices 3"]
    faces: Int[np.ndarray, "faces 3"]
    colours: Float[np.ndarray, "vertices 3"] | None = None
    up: Axis = "y"

    def __post_init__(self) -> None:
        vertices, faces = _array(self.vertices, np.float32), _array(self.faces, np.int64)
        colours = None if self.colours is None else _array(self.colours, np.float32)
        for name, part in (("vertices", vertices), ("faces", faces), ("colours", colours)):
            if part is not None and (part.ndim != 2 or part.shape[1] != 3):
                raise ValueError(f"{name} have shape {part.shape}, expected (number, 3)")
        if not np.isfinite(vertices).all():
            raise ValueError(f"{int((~np.isfinite(vertices)).any(1).sum())} of {len(vertices)} vertices are not finite")
        if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
            raise ValueError(f"faces name vertices {faces.min()} to {faces.max()}, there are {len(vertices)}")
        if colours is not None and len(colours) != len(vertices):
            raise ValueError(f"{len(colours)} colours were given for {len(vertices)} vertices")
        if self.up not in ("y", "z"):
            raise ValueError(f"up is {self.up!r}, expected 'y' or 'z'")
        object.__setattr__(self, "vertices", vertices)
        object.__setattr__(self, "faces", faces)
        object.__setattr__(self, "colours", None if colours is None else colours.clip(0, 1))

    @property
    def empty(self) -> bool:
        """Whether there is no face: the generator's field crossed zero nowhere."""
        return len(self.faces) == 0

    @property
    def watertight(self) -> bool:
        """Whether every edge belongs to two faces, so that there is an inside."""
        return not self.empty and bool(self.to_trimesh().is_watertight)

    @property
    def volume(self) -> float:
        """Enclosed volume, in cubed units; of a closed mesh, negative where it is inside out."""
        corners = self.vertices[self.faces].astype(np.float64)
        return float(np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6)

    @property
    def area(self) -> float:
        """Surface area, in squared units."""
        a, b, c = self.vertices[self.faces].astype(np.float64).transpose(1, 0, 2)
        return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)

    # --- parts -------------------------------------------------------------------------------------------

    def components(self) -> list[Shape]:
        """The pieces that hang together by shared vertices, the one of the largest surface first."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        ends = np.concatenate((self.faces[:, :2], self.faces[:, 1:]))
        ones = np.ones(len(ends), dtype=bool)
        graph = coo_array((ones, (ends[:, 0], ends[:, 1])), shape=(len(self.vertices),) * 2)
        _, label = connected_components(graph, directed=False)
        owner = label[self.faces[:, 0]]
        pieces = [self.select(owner == number) for number in np.unique(owner)]
        return sorted(pieces, key=lambda piece: piece.area, reverse=True)

    def largest_component(self) -> Shape:
        """The piece with the largest surface; an empty shape is returned as it is."""
        pieces = self.components()
        return pieces[0] if pieces else self

    def select(self, faces: np.ndarray) -> Shape:
        """Some of the faces (numbers, or truth values), with the vertices they use."""
        used, numbers = np.unique(self.faces[faces], return_inverse=True)
        colours = None if self.colours is None else self.colours[used]
        return replace(self, vertices=self.vertices[used], faces=numbers.reshape(-1, 3), colours=colours)

    def oriented(self) -> Shape:
        """Neighbouring faces wound alike, and outwards where the mesh is closed."""
        import trimesh

        mesh = self.to_trimesh()
        trimesh.repair.fix_normals(mesh, multibody=True)
        return replace(self, faces=np.asarray(mesh.faces))

    def turned(self, up: Axis) -> Shape:
        """The same shape with another axis up."""
        if up == self.up:
            return self
        x, y, z = self.vertices.T
        turned = np.stack((x, -z, y) if up == "z" else (x, z, -y), axis=1)
        return replace(self, vertices=turned, up=up)

    def normalised(self, half: float = 1.0) -> Shape:
        """Centred, its longest side 2 ``half``."""
        if not len(self.vertices):
            return self
        low, high = self.vertices.min(0), self.vertices.max(0)
        scale = 2 * half / max(float((high - low).max()), 1e-12)
        return replace(self, vertices=(self.vertices - (low + high) / 2) * np.float32(scale))

    # --- other forms -------------------------------------------------------------------------------------

    def to_trimesh(self) -> Any:
        """A ``trimesh.Trimesh`` with the same vertices in the same order, colours as bytes."""
        import trimesh

        colours = None
        if self.colours is not None:
            bytes_ = np.round(self.colours * 255).astype(np.uint8)
            colours = np.concatenate((bytes_, np.full((len(bytes_), 1), 255, np.uint8)), axis=1)
        return trimesh.Trimesh(self.vertices, self.faces, vertex_colors=colours, process=False)

    @classmethod
    def from_trimesh(cls, mesh: Any, up: Axis = "y") -> Self:
        """From a ``trimesh.Trimesh``; colours are taken where its vertices have some."""
        visual = mesh.visual
        colours = None
        if visual is not None and visual.kind == "vertex":
            colours = np.asarray(visual.vertex_colors, dtype=np.float32)[:, :3] / 255
        return cls(np.asarray(mesh.vertices), np.asarray(mesh.faces), colours, up)

    def save(self, path: str | Path) -> Path:
        """Write GLB, OBJ, PLY or STL, as the suffix says, whole or not at all; STL holds no colours.

        Raises:
            ValueError: the suffix is none of these, or the shape has no face.
            OSError: the file cannot be written.
        """
        path = Path(path)
        axis = FORMATS.get(path.suffix.lower())
        if axis is None:
            raise ValueError(f"{path}: suffix {path.suffix!r} is no mesh; expected one of {', '.join(FORMATS)}")
        if self.empty:
            raise ValueError(f"{path}: the shape has no faces to write; draw it from another seed")
        kind = path.suffix.lower()[1:]
        mesh = self.turned(axis).to_trimesh()
        if kind in ("glb", "obj"):  # of PLY, normals would double the size, and STL has those of faces
            _ = mesh.vertex_normals
        content = mesh.export(file_type=kind)
        data = content.encode() if isinstance(content, str) else content
        return write_atomically(path, lambda temporary: _write(temporary, data))


def _array(value: Any, dtype: type) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return np.ascontiguousarray(value, dtype=dtype)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


class ShapeGenerator(nn.Module):
    """A network over the scales of a shape, and its frozen tokenizer.

    A system adds :meth:`prepare` and ``draw_shapes``.

    Attributes:
        tokenizer: takes no gradient and stays in evaluation form.
        told_by: kinds of conditions it knows, among ``"class"``, ``"image"``, ``"prompt"``.
        draw_shapes: one shape for each of some prepared conditions: of these, the draws, a function to be called once
            for every scale, and the system's own options by name.
    """

    config: Any
    tokenizer: Any
    told_by: tuple[str, ...]
    draw_shapes: Callable[..., Sequence[Shape]]

    def prepare(self, condition: Any) -> Any:
        """What the network reads of conditions: has a length, and ``select(numbers)``.

        Raises:
            ValueError: the system knows no such condition.
        """
        raise NotImplementedError

    @property
    def scales(self) -> int:
        """How many scales ``draw_shapes`` goes through."""
        return len(self.config.schedule)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.tokenizer.eval()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.inference_mode()
    def generate(
        self,
        condition: Any,
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        *,
        batch_size: int = 4,
        official_draws: bool = False,
        largest_component: bool = False,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> list[Shape]:
        """Shapes of conditions.

        Args:
            condition: one or several (:meth:`prepare`), repeated to ``n`` shapes.
            n: number of shapes; None: as many as there are conditions.
            seed: shape i is drawn from ``seed + i``, so it comes out the same alone and in any batch; or one seed per
                shape.
            batch_size: shapes computed at once; only memory and speed depend on it, without ``official_draws``.
            official_draws: consume one generator per batch in the official code's order, seeded with the batch's first
                seed.
            largest_component: keep only the piece with the largest surface.
            progress: called with (scales done, scales in all) over all batches.
            options: the system's own, of sampling and of making meshes.

        Raises:
            ValueError: a condition is unknown, ``n`` is below 1, or the number of seeds is another.
        """
        prepared = self.prepare(condition)
        n = len(prepared) if n is None else n
        seeds = image_seeds(seed, n)
        total, done = self.scales * -(-n // batch_size), 0

        def advance() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        shapes: list[Shape] = []
        for start in range(0, n, batch_size):
            own = seeds[start : start + batch_size]
            rows = [i % len(prepared) for i in range(start, start + len(own))]
            shapes += self.draw_shapes(prepared.select(rows), self.draws(own, official_draws), advance, **options)
        return [shape.largest_component() for shape in shapes] if largest_component else shapes

    def draws(self, seeds: Sequence[int], official: bool = False) -> Draws:
        """Randomness for a batch: a generator per shape, or one on the model's device in the official order."""
        if official:
            return BatchDraws(torch.Generator(self.device).manual_seed(seeds[0]))
        return ImageDraws(seeds)
