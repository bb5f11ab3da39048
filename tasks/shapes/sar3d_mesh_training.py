"""Training SAR3D's mesh head: the surface of FlexiCubes must look as the object does.

Official code cyw-3d/SAR3D, ``nsr/triplane.py``: planes come from a trained tokenizer and stay as they are. The official
stage rasterises on the GPU with antialiased edges; here rays find their triangle outside of the graph, and where they
meet it is computed again inside, so that depth, colour and normal have gradients. Edges have none that way: the outline
is taught as Yariv et al. 2020 (IDR, arXiv 2003.09852, equation 7) do, by the largest value along each ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from typing import cast as cast_type

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nextscale.core.training import Batch, Metrics, TrainingTask
from nextscale.tasks.shapes.sar3d_fields import BOX, MESH_BOX, MESH_GRID_SCALE, Geometry, MeshField
from nextscale.tasks.shapes.sar3d_rendering import camera_rays
from nextscale.tasks.shapes.sar3d_tokenizer import TriplaneVQ
from nextscale.tasks.shapes.sar3d_tokenizer_training import views_of


@dataclass(frozen=True)
class MeshLossConfig:
    """Weights of the terms.

    Attributes:
        colour, depth, normal: of mean |x - y| where a ray meets the surface and the object is.
        mask: of the outline's term; ``sharpness``: how steeply values become certainty.
        entropy: of the cross-entropy of neighbouring signs that differ; ``surface`` of the deviation of vertices from
            their crossings; ``weights`` of the squared FlexiCubes weights (those of the official stage).
        rays: of each picture, drawn anew at each step; samples of each ray for the outline.
    """

    colour: float = 1.0
    depth: float = 0.5
    normal: float = 0.2
    mask: float = 1.0
    sharpness: float = 50.0
    entropy: float = 0.01
    surface: float = 0.5
    weights: float = 0.1
    rays: int = 1024
    samples: int = 64


@dataclass(frozen=True, eq=False)
class Hits:
    """Where rays meet a mesh.

    Attributes:
        hit: which do.
        distance, points, normals: of those that do; the triangle's plane gives them their gradient.
    """

    hit: Bool[Tensor, " rays"]
    distance: Float[Tensor, " hits"]
    points: Float[Tensor, "hits 3"]
    normals: Float[Tensor, "hits 3"]


def cast(
    vertices: Float[Tensor, "vertices 3"],
    faces: Int[Tensor, "faces 3"],
    origins: Float[Tensor, "rays 3"],
    directions: Float[Tensor, "rays 3"],
) -> Hits:
    """The first triangles that rays meet."""
    import open3d as o3d

    found = torch.zeros(len(origins), dtype=torch.bool)
    numbers = torch.zeros(0, dtype=torch.long)
    if len(faces):
        scene, tensor = o3d.t.geometry.RaycastingScene(), cast_type(Any, o3d.core.Tensor)
        corners, numbered = vertices.detach().float().cpu().numpy(), faces.cpu().numpy().astype("uint32")
        scene.add_triangles(tensor(corners), tensor(numbered))
        seen = scene.cast_rays(tensor(torch.cat((origins, directions), dim=1).float().cpu().numpy()))
        found = torch.from_numpy(seen["t_hit"].numpy()).isfinite()
        numbers = torch.from_numpy(seen["primitive_ids"].numpy().astype("int64"))[found]
    found, numbers = found.to(origins.device), numbers.to(origins.device)
    a, b, c = vertices[faces[numbers]].unbind(1)
    normals = F.normalize(torch.linalg.cross(b - a, c - a), dim=-1)
    start, along = origins[found], directions[found]
    slope = (normals * along).sum(-1)
    slope = torch.where(slope.abs() < 1e-4, torch.full_like(slope, -1e-4), slope)
    distance = (normals * (a - start)).sum(-1) / slope
    towards = torch.where(slope[:, None] > 0, -normals, normals)
    return Hits(found, distance, start + distance[:, None] * along, towards)


def outline_loss(
    geometry: Geometry,
    size: int,
    origins: Float[Tensor, "rays 3"],
    directions: Float[Tensor, "rays 3"],
    object_: Bool[Tensor, " rays"],
    config: MeshLossConfig,
) -> Float[Tensor, ""]:
    """Cross-entropy between where the object is and whether a ray passes a value above zero."""
    middle = -(origins * directions).sum(-1, keepdim=True)
    reach = torch.linspace(-MESH_BOX / 2 * 3**0.5, MESH_BOX / 2 * 3**0.5, config.samples, device=origins.device)
    points = origins[:, None] + (middle + reach)[..., None] * directions[:, None]
    grid = geometry.values.view(1, 1, size + 1, size + 1, size + 1)
    # Axes in reverse: the grid's last axis, z, is what the sampler calls x.
    places = (points / (MESH_GRID_SCALE / 2)).flip(-1)[None, None]
    values = F.grid_sample(grid, places, align_corners=True, padding_mode="border")[0, 0, 0]
    inside = (points.abs() <= MESH_GRID_SCALE / 2).all(-1)
    most = torch.where(inside, values, -0.5).amax(-1)
    return F.binary_cross_entropy_with_logits(most * config.sharpness, object_.float())


def sign_entropy(values: Float[Tensor, " points"], size: int) -> Float[Tensor, ""]:
    """How unsure neighbours of other signs are of theirs, which keeps the surface from falling into pieces.

    Munkberg et al. 2022 (nvdiffrec, arXiv 2111.12503, equation 2).
    """
    grid = values.view(size + 1, size + 1, size + 1)
    total, count = values.new_zeros(()), 0
    for axis in range(3):
        low, high = grid.narrow(axis, 0, size), grid.narrow(axis, 1, size)
        differ = (low > 0) != (high > 0)
        pairs = torch.stack((low[differ], high[differ]))
        total = total + F.binary_cross_entropy_with_logits(pairs, (pairs.flip(0) > 0).float(), reduction="sum")
        count += int(differ.sum())
    return total / max(count, 1)


class MeshObjective(nn.Module):
    """The loss of a tokenizer's mesh head on a batch; of its parameters only the head's take part.

    Batches as :class:`nextscale.tasks.shapes.sar3d_tokenizer_training.TriplaneTraining` takes them, with ``normals``
    (objects, n, 3, size, size) where they are known. Meshes are 2 / 0.9 times as large as what cameras see.
    """

    def __init__(self, tokenizer: TriplaneVQ, config: MeshLossConfig) -> None:
        if not isinstance(tokenizer.field, MeshField):
            raise ValueError("this tokenizer reads its planes as density; give it a head of the kind 'mesh'")
        super().__init__()
        self.config, self.tokenizer = config, tokenizer.requires_grad_(False)
        tokenizer.field.requires_grad_(True)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        tokenizer = self.tokenizer
        with torch.no_grad():
            tokens = tokenizer.encode(views_of(batch, tokenizer).flatten(0, 1))
            planes = tokenizer.decode(tokens)
        with torch.autocast(planes.device.type, enabled=False):
            losses = [self._object(planes[row : row + 1], batch, row) for row in range(len(planes))]
        names = losses[0][1]
        metrics = {name: torch.stack([torch.as_tensor(each[1][name]) for each in losses]).mean() for name in names}
        return torch.stack([each[0] for each in losses]).mean(), {**metrics}

    def _object(self, planes: Tensor, batch: Batch, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        config, field = self.config, cast_type(MeshField, self.tokenizer.field)
        size = field.config.grid
        geometry = field.geometry(planes)
        weights = field.weights(geometry.features)
        mesh = field.mesh(geometry, weights, smooth=True)
        side = batch["colours"].shape[-1]
        origins, directions = camera_rays(batch["cameras"][row], side)
        chosen = torch.randint(side * side, (len(origins), min(config.rays, side * side)), device=planes.device)

        def pick(values: Tensor) -> Tensor:
            return values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1])).flatten(0, 1)

        scale = MESH_BOX / BOX
        start, along = pick(origins) * scale, pick(directions)
        wanted = {name: pick(batch[name][row].flatten(2).mT) for name in ("colours", "depth", "alpha")}
        there = wanted["alpha"][:, 0] > 0.5
        hits = cast(mesh.vertices, mesh.faces, start, along)
        both = there[hits.hit]
        outline = outline_loss(geometry, size, start, along, there, config)
        terms = {"mask": config.mask * outline}
        if both.any():
            colours = field.colours(planes, hits.points[both])
            axes = batch["cameras"][row][:, :16].unflatten(1, (4, 4))[:, None, :3, 2].expand_as(directions)
            along_view = hits.distance * (along * pick(axes))[hits.hit].sum(-1) / scale
            known = wanted["depth"][hits.hit][both] > 0
            terms["colour"] = config.colour * F.l1_loss(colours, wanted["colours"][hits.hit][both])
            far = (along_view[both][:, None] - wanted["depth"][hits.hit][both]).abs()
            terms["depth"] = config.depth * torch.where(known, far, 0).mean()
            if "normals" in batch:
                expected = F.normalize(pick(batch["normals"][row].flatten(2).mT)[hits.hit][both], dim=-1)
                terms["normal"] = config.normal * (1 - (expected * hits.normals[both]).sum(-1)).mean()
        terms["regular"] = (
            config.entropy * sign_entropy(geometry.values, size)
            + config.surface * (mesh.deviation.mean() if len(mesh.deviation) else mesh.deviation.sum())
            + config.weights * weights.square().mean()
        )
        overlap = (there & hits.hit).sum() / (there | hits.hit).sum().clamp_min(1)
        shown = {name: terms.get(name, outline.new_zeros(())).detach() for name in ("mask", "colour", "depth")}
        return torch.stack(list(terms.values())).sum(), {**shown, "overlap": overlap.float()}


class MeshTraining(TrainingTask):
    """Trains the mesh head of a :class:`nextscale.tasks.shapes.sar3d_tokenizer.TriplaneVQ`, and nothing else."""

    name = "sar3d-mesh"

    def __init__(self, tokenizer: TriplaneVQ, config: MeshLossConfig) -> None:
        self.tokenizer = tokenizer
        self.phases: dict[str, nn.Module] = {"mesh": MeshObjective(tokenizer, config)}

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        loss, metrics = module(batch)
        return loss, metrics
