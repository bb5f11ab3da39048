"""What planes say about points in space: density and colour, or the parameters of a FlexiCubes mesh.

Heads of SAR3D's two tokenizers (Chen et al. 2024, arXiv 2411.16856; official code cyw-3d/SAR3D).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.tasks.shapes.flexicubes import WEIGHTS, FlexiMesh, cube_corners, extract, grid_points
from nextscale.tasks.shapes.sar3d_rendering import sample_planes

BOX = 0.9
"""Side of the cube that the planes of a density field span; objects lie in it."""

MESH_BOX, MESH_GRID_SCALE = 2.0, 2.005
"""The same for meshes, and the side of the FlexiCubes grid: meshes have 2 / 0.9 times the density field's size."""


@dataclass(frozen=True)
class FieldConfig:
    """Attributes:

    kind: ``"density"`` for volume rendering, ``"mesh"`` for FlexiCubes.
    channels: of one plane.
    hidden: width of the networks' inner layers.
    grid: cubes a side of the FlexiCubes grid.
    """

    kind: Literal["density", "mesh"] = "density"
    channels: int = 32
    hidden: int = 64
    grid: int = 128

    def __post_init__(self) -> None:
        if self.kind not in ("density", "mesh"):
            raise ValueError(f"kind is {self.kind!r}, expected 'density' or 'mesh'")


def network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Four linear layers with ReLU between them; biases begin at zero."""
    sizes = [inputs, hidden, hidden, hidden, outputs]
    layers = OrderedDict[str, nn.Module]()
    for number, (before, after) in enumerate(pairwise(sizes)):
        layer = nn.Linear(before, after)
        nn.init.zeros_(layer.bias)
        layers[str(2 * number)] = layer
        if number < 3:
            layers[str(2 * number + 1)] = nn.ReLU()
    return nn.Sequential(layers)


def to_colour(raw: Tensor) -> Tensor:
    """A sigmoid that reaches a little beyond 0 and 1 (Barron et al. 2021, mip-NeRF)."""
    return torch.sigmoid(raw) * 1.002 - 0.001


class DensityField(nn.Module):
    """Raw density and colour; ``box``: side of the cube that planes span."""

    def __init__(self, config: FieldConfig, box: float = BOX) -> None:
        super().__init__()
        self.config, self.box = config, box
        self.network = network(3 * config.channels, config.hidden, 4)

    def forward(
        self, planes: Float[Tensor, "batch features height width"], points: Float[Tensor, "batch points 3"]
    ) -> tuple[Float[Tensor, "batch points 1"], Float[Tensor, "batch points 3"]]:
        """Density before softplus, and colour in [-0.001, 1.001]."""
        out = self.network(sample_planes(planes, points, self.box))
        return out[..., :1], to_colour(out[..., 1:])

    @property
    def last_layer(self) -> Tensor:
        """Weight of the final layer, where adversarial training balances its gradients."""
        return cast(nn.Linear, self.network[-1]).weight


@dataclass(frozen=True, eq=False)
class Geometry:
    """What FlexiCubes are made of, for one object.

    Attributes:
        points: the grid's corners where the deformation puts them.
        values: signed distance in [-0.5, 0.5], below zero inside; repaired where the field had one sign.
        repaired: whether it was.
    """

    points: Float[Tensor, "points 3"]
    values: Float[Tensor, " points"]
    deformation: Float[Tensor, "points 3"]
    features: Float[Tensor, "points features"]
    repaired: bool


class MeshField(nn.Module):
    """Signed distance, deformation and weights of a FlexiCubes grid, and the colour of its surface."""

    def __init__(self, config: FieldConfig) -> None:
        super().__init__()
        self.config = config
        features = 3 * config.channels
        self.distance = network(features, config.hidden, 1)
        self.colour = network(features, config.hidden, 3)
        self.deformation = network(features, config.hidden, 3)
        self.weight = network(8 * features, config.hidden, WEIGHTS)

    def geometry(self, planes: Float[Tensor, "1 features height width"]) -> Geometry:
        """Of one object."""
        size = self.config.grid
        points = grid_points(size, MESH_GRID_SCALE, planes.device)
        features = sample_planes(planes, points[None], MESH_BOX)[0]
        values = torch.sigmoid(self.distance(features)[:, 0]) - 0.5
        deformation = torch.tanh(self.deformation(features)) / (4 * size)
        repaired = one_sign(values, size)
        if repaired:
            values, deformation = repair(values.detach(), size), deformation.detach()
        return Geometry(points + deformation, values, deformation, features, repaired)

    def weights(
        self, features: Float[Tensor, "points features"], cubes: Tensor | None = None
    ) -> Float[Tensor, "cubes 21"]:
        """Of all cubes, or of those with these numbers."""
        corners = cube_corners(self.config.grid, features.device)
        chosen = corners if cubes is None else corners[cubes]
        return self.weight(features[chosen].flatten(1)) * 0.1

    def mesh(self, geometry: Geometry, weights: Tensor | None = None, smooth: bool = False) -> FlexiMesh:
        """The surface; see :func:`nextscale.tasks.shapes.flexicubes.extract`.

        Args:
            weights: of all cubes, where they are there already; None: only those of cubes at the surface are computed.
        """
        given = weights if weights is not None else lambda cubes: self.weights(geometry.features, cubes)
        return extract(geometry.points, geometry.values, given, self.config.grid, smooth=smooth)

    def colours(
        self, planes: Float[Tensor, "1 features height width"], points: Float[Tensor, "points 3"]
    ) -> Float[Tensor, "points 3"]:
        """In [-0.001, 1.001]."""
        return to_colour(self.colour(sample_planes(planes, points[None], MESH_BOX)[0]))


def one_sign(values: Float[Tensor, " points"], size: int) -> bool:
    """Whether a field has no surface, its outermost points left aside."""
    inner = values.view(size + 1, size + 1, size + 1)[1:-1, 1:-1, 1:-1]
    return not bool((inner > 0).any() and (inner < 0).any())


def repair(values: Float[Tensor, " points"], size: int) -> Float[Tensor, " points"]:
    """A field of one sign with a surface: a point at the middle and the two outer layers get other signs."""
    grid = values.view(size + 1, size + 1, size + 1)
    least, most = values.min(), values.max()
    outer = torch.ones_like(grid, dtype=torch.bool)
    outer[2:-2, 2:-2, 2:-2] = False
    middle = size // 2 + 1
    out = torch.where(outer, -1 - most, grid)
    centre = 1 - least + (-1 - most if outer[middle, middle, middle] else 0)
    out[middle, middle, middle] = centre
    return out.flatten()
