"""Meshes as tokenizers of shapes read them: points of their surfaces, or views from all around."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.datasets.shapes_files import Mesh, MeshError, read_mesh
from nextscale.datasets.shapes_prepare import HALF
from nextscale.datasets.shapes_repair import repair
from nextscale.datasets.shapes_sampling import surface_points
from nextscale.datasets.shapes_views import object_cameras, render
from nextscale.tasks.shapes.g3pt_tokenizer import PointTokenizer
from nextscale.tasks.shapes.objects import Shape
from nextscale.tasks.shapes.sar3d_tokenizer import TriplaneVQ
from nextscale.tasks.shapes.sar3d_tokenizer_training import views_of

Given = str | Path | Mesh | Shape | Tensor | Any
"""A mesh, or what a tokenizer reads of one; also a ``trimesh.Trimesh``."""


def mesh_of(given: Given) -> Mesh:
    """A mesh, z up.

    Raises:
        MeshError: it cannot be read; the file is named.
        OSError: there is no such file.
    """
    if isinstance(given, str | Path):
        try:
            return read_mesh(given)
        except MeshError as error:
            raise MeshError(f"{given} cannot be described: {error}") from None
    if isinstance(given, Mesh):
        return given
    if not isinstance(given, Shape) and not hasattr(given, "visual"):
        raise MeshError(f"a {type(given).__name__} is no mesh: give a file, a trimesh.Trimesh, or a Shape")
    shape = given if isinstance(given, Shape) else Shape.from_trimesh(given, up="z")
    colours = shape.colours
    if colours is not None:
        colours = np.round(colours[shape.faces].mean(1) * 255).astype(np.uint8)
    return Mesh(shape.vertices.astype(np.float64), shape.faces, colours).turned(shape.up)


def read_shapes(shapes: Sequence[Given], tokenizer: Any, seeds: Sequence[int]) -> Tensor:
    """What a tokenizer reads of shapes: points with normals (shapes, points, 6), or views (shapes, views, 10, height,
    width).

    Args:
        seeds: of each shape's points or cameras.

    Raises:
        MeshError: a mesh cannot be read.
    """
    return torch.stack([_read(shape, tokenizer, seed) for shape, seed in zip(shapes, seeds, strict=True)])


def _read(given: Given, tokenizer: PointTokenizer | TriplaneVQ, seed: int) -> Tensor:
    if isinstance(given, Tensor):
        return given
    mesh, draw = mesh_of(given), np.random.default_rng(seed)
    if isinstance(tokenizer, PointTokenizer):
        # As `nextscale prepare shapes` has them.
        points, normals, _ = surface_points(repair(mesh).mesh.normalised(HALF), tokenizer.config.points, draw)
        return torch.from_numpy(np.concatenate((points, normals), axis=1)).float()
    if not len(mesh.faces):
        raise MeshError("a cloud of points has no views: give a mesh")
    size, count = tokenizer.image_size[0], tokenizer.config.views.count
    views = render(mesh.normalised(HALF), object_cameras(draw, 2 * count)[:count], size)
    batch = {
        "colours": torch.from_numpy(views.colours.copy()).movedim(-1, 1)[None].float() / 255,
        "depth": torch.from_numpy(views.depth)[None, :, None],
        "cameras": torch.from_numpy(views.cameras)[None],
    }
    return views_of(batch, tokenizer)[0]
