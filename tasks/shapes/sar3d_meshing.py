"""Meshes of SAR3D's planes."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from nextscale.tasks.shapes.objects import Shape
from nextscale.tasks.shapes.sar3d_fields import DensityField, MeshField
from nextscale.tasks.shapes.surfaces import grid_values, marching_cubes


@torch.no_grad()
def density_shape(
    field: DensityField, planes: Float[Tensor, "1 features height width"], resolution: int, level: float
) -> Shape:
    """Marching cubes on the raw density, coloured by the field at the vertices; the units are the field's."""

    def density(points: Tensor) -> Tensor:
        return field(planes, points[None])[0][0, :, 0]

    values, _ = grid_values(density, resolution, field.box / 2, level, device=planes.device)
    vertices, faces = marching_cubes(values, field.box / 2, level)
    colours = None
    if len(vertices):
        colours = field(planes, torch.from_numpy(vertices).to(planes.device)[None])[1][0].float().cpu().numpy()
    return Shape(vertices, faces, colours, up="z")


@torch.no_grad()
def mesh_shape(field: MeshField, planes: Float[Tensor, "1 features height width"]) -> Shape:
    """The FlexiCubes mesh, coloured by the field at the vertices.

    Nothing in its training tells which sign is inside, so faces are turned outwards here.
    """
    mesh = field.mesh(field.geometry(planes))
    colours = field.colours(planes, mesh.vertices) if len(mesh.vertices) else mesh.vertices
    vertices, faces, tints = (part.cpu().numpy() for part in (mesh.vertices.float(), mesh.faces, colours.float()))
    shape = Shape(vertices, faces, tints, up="z")
    return shape if shape.volume >= 0 else replace(shape, faces=faces[:, ::-1])
