"""G3PT's tokenizer: points on a surface <-> sets of binary tokens at several levels of detail -> occupancy.

Zhang et al. 2024, "G3PT: Unleash the Power of Autoregressive Modeling in 3D Generation via Cross-scale Querying
Transformer" (arXiv 2409.06322). No code was published; ``docs/g3pt.md`` says what is stated and what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nextscale.core.checkpoint import CheckpointError, assign, read_folder, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.shapes.g3pt_quantizer import CrossScaleQuantizer, SetQuantizerOutput
from nextscale.tasks.shapes.g3pt_queries import PointEncoding, QueryAttention, latent_blocks
from nextscale.tasks.shapes.objects import Shape
from nextscale.tasks.shapes.surfaces import grid_values, marching_cubes
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig

SYSTEM = "point-vq"
SCHEDULE = ScaleSchedule.counts(1, 4, 9, 16, 25, 36, 64, 100, 169, 256, 400, 576, 752)
"""2408 tokens, as the best setting has; the paper's own counts are not known."""
HALF = 1.05
"""Meshes are looked for in [-HALF, HALF]^3: shapes fill [-1, 1], and their surface must close inside."""


@dataclass(frozen=True)
class PointTokenizerConfig:
    """The defaults are the paper's.

    Attributes:
        width, heads: of all layers.
        latents: vectors that a shape is encoded as.
        points: of a surface, that are encoded; more are thinned out.
        encoder_depth, decoder_depth: self-attention layers before and after the tokens.
        octaves: frequencies that places are encoded with.
        readout_ratio: width of the feed-forward layer behind each looked-up point, in units of ``width``: most of the
            cost of a mesh.
        quantizer: its ``patch`` is 1.
        schedule: scales of plain counts of tokens.
        up: which axis of the training shapes points up.
    """

    width: int = 512
    heads: int = 8
    latents: int = 2304
    points: int = 16384
    encoder_depth: int = 12
    decoder_depth: int = 16
    octaves: int = 8
    readout_ratio: float = 4.0
    quantizer: BitwiseQuantizerConfig = field(default_factory=lambda: BitwiseQuantizerConfig(13))
    schedule: ScaleSchedule = SCHEDULE
    up: Literal["y", "z"] = "z"

    def __post_init__(self) -> None:
        if any(scale.width != 1 or scale.planes != 1 or scale.streams != 1 for scale in self.schedule.scales):
            raise ValueError(f"the scales '{self.schedule}' are not plain counts: write them as 1x1 4x1 16x1 …")
        if self.quantizer.patch != 1:
            raise ValueError(f"quantizer.patch is {self.quantizer.patch}; tokens of a set have no cells: expected 1")
        if min(self.latents, self.points, self.octaves) < 1:
            raise ValueError(
                f"latents {self.latents}, points {self.points} and octaves {self.octaves}: expected at least 1 of each"
            )


PRESETS: dict[str, PointTokenizerConfig] = {"g3pt-tokenizer": PointTokenizerConfig()}
"""The published size, by name; no weights were published."""


@dataclass
class TokenizerOutput:
    """What the training pass gives.

    Attributes:
        logits: of occupancy at the queries.
        features: the continuous latents.
        quantized: None where the decoder has seen the continuous latents.
    """

    logits: Float[Tensor, "batch queries"]
    features: Float[Tensor, "batch latents width"]
    quantized: SetQuantizerOutput | None


class Unpublished:
    """A model of which no official file exists, to be read or written."""

    @property
    def official_name(self) -> str:
        """Raises ValueError: there is no name."""
        raise ValueError("no official files of G3PT were published: it is kept in this library's format alone")

    def to_official(self) -> dict[str, Tensor]:
        """Raises ValueError: there is no layout."""
        raise ValueError(self.official_name)

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[Any, dict[str, Tensor]]:
        """Raises CheckpointError: there is no layout."""
        raise CheckpointError("no official files of G3PT were published: give a folder saved by this library")

    @classmethod
    def from_official(cls, content: Mapping[str, Any], **overrides: Any) -> Any:
        """Raises CheckpointError: there is no layout."""
        return cls.read_official(content, **overrides)


class PointTokenizer(Unpublished, nn.Module):
    """Surface points <-> tokens -> latents -> occupancy anywhere -> a mesh."""

    system: ClassVar[str] = SYSTEM
    no_decay = ("queries", "gain")  # of the weights, beside those of every transformer

    def __init__(self, config: PointTokenizerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PointTokenizerConfig()
        width, heads = config.width, config.heads
        self.point_encoding = PointEncoding(width, config.octaves, more=3)
        self.latent_queries = nn.Parameter(torch.zeros(config.latents, width))
        self.gather = QueryAttention(width, heads)
        self.encoder = latent_blocks(width, heads, config.encoder_depth)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.quantizer = CrossScaleQuantizer(config.quantizer, width, heads, config.latents, config.schedule)
        self.decoder = latent_blocks(width, heads, config.decoder_depth)
        self.query_encoding = PointEncoding(width, config.octaves)
        self.readout = QueryAttention(width, heads, config.readout_ratio)
        self.head = nn.Linear(width, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    # --- tokens ------------------------------------------------------------------------------------------

    def features(self, surface: Float[Tensor, "batch points 6"]) -> Float[Tensor, "batch latents width"]:
        """The continuous latents, float32, each of mean 0 and variance 1.

        Args:
            surface: points in [-1, 1]^3 and their outward unit normals.
        """
        given = surface[:, :: -(-surface.shape[1] // self.config.points)]
        points = self.point_encoding(given[..., :3], given[..., 3:])
        latents = self.gather(self.latent_queries.expand(len(points), -1, -1), points)
        return self.norm(self.encoder(latents, None).float())

    @torch.no_grad()
    def encode(self, surface: Float[Tensor, "batch points 6"]) -> Bool[Tensor, "batch length bits"]:
        """Bits of the tokens of all scales, in one sequence."""
        return torch.cat(self.quantizer.encode(self.features(surface), self.config.schedule)[0], dim=1)

    def decode(self, tokens: Bool[Tensor, "batch length bits"]) -> Float[Tensor, "batch latents width"]:
        """What occupancy is read from, of whole pyramids of tokens."""
        return self.decode_features(self.quantizer.decode(tokens, self.config.schedule)[-1])

    def decode_features(self, total: Float[Tensor, "batch latents width"]) -> Float[Tensor, "batch latents width"]:
        """What occupancy is read from, of (quantised) latents."""
        return self.decoder(total.to(self.dtype), None)

    def occupancy(
        self, hidden: Float[Tensor, "batch latents width"], queries: Float[Tensor, "batch queries 3"]
    ) -> Float[Tensor, "batch queries"]:
        """Logits, float32, that points lie inside: above 0 they do."""
        return self.head(self.readout(self.query_encoding(queries), hidden))[..., 0].float()

    def forward(
        self,
        surface: Float[Tensor, "batch points 6"],
        queries: Float[Tensor, "batch queries 3"],
        quantize: bool = True,
        scales: Tensor | None = None,
    ) -> TokenizerOutput:
        """The training pass.

        Args:
            quantize: else the decoder sees the continuous latents.
            scales: how many scales of each shape the decoder sees, (batch,); None: all.
        """
        features = self.features(surface)
        if not quantize:
            return TokenizerOutput(self.occupancy(self.decode_features(features), queries), features, None)
        quantized = self.quantizer(features, self.config.schedule)
        total = quantized.totals[-1]
        if scales is not None:
            total = torch.stack(quantized.totals)[scales - 1, torch.arange(len(scales), device=scales.device)]
        return TokenizerOutput(self.occupancy(self.decode_features(total), queries), features, quantized)

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """The quantised reconstruction's loss, of a batch of
        :class:`nextscale.tasks.shapes.g3pt_tokenizer_training.PointTokenizerTraining`."""
        from nextscale.tasks.shapes.g3pt_tokenizer_training import PointTokenizerTraining

        return PointTokenizerTraining(self).loss(SYSTEM, self, dict(batch), 0)

    # --- meshes ------------------------------------------------------------------------------------------

    def field(self, hidden: Float[Tensor, "1 latents width"]) -> Callable[[Tensor], Tensor]:
        """The logits of one shape as a function of points (n, 3); what depends on the shape alone is computed once."""
        memory = self.readout.remember(hidden)

        def logits(points: Float[Tensor, "points 3"]) -> Float[Tensor, " points"]:
            asked = self.query_encoding(points.to(self.device)[None])
            return self.head(self.readout(asked, memory))[0, :, 0].float()

        return logits

    @torch.no_grad()
    def shape(self, hidden: Float[Tensor, "1 latents width"], *, resolution: int = 128, stride: int = 4) -> Shape:
        """The mesh of one shape in [-1.05, 1.05]^3.

        Args:
            hidden: of :meth:`decode`.
            resolution: cells a side of the grid.
            stride: of the grid that is evaluated first; see :func:`nextscale.tasks.shapes.surfaces.grid_values`.
        """
        if resolution < 2 or stride < 1:
            raise ValueError(f"resolution is {resolution} and stride {stride}; expected at least 2 and 1")
        values, _ = grid_values(self.field(hidden), resolution + 1, HALF, 0.0, stride=stride, device=self.device)
        vertices, faces = marching_cubes(closed(values), HALF, 0.0)
        return Shape(vertices, faces, up=self.config.up)

    @torch.no_grad()
    def reconstruct(
        self, surface: Float[Tensor, "batch points 6"], scales: int | None = None, **options: Any
    ) -> list[Shape]:
        """Meshes of what tokens keep of surfaces.

        Args:
            scales: of the first scales only; None: of all.
            options: of :meth:`shape`.
        """
        surface = surface.to(self.device)
        _, totals = self.quantizer.encode(self.features(surface), self.config.schedule, scales)
        return [self.shape(each[None], **options) for each in self.decode_features(totals[-1])]

    # --- files -------------------------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, Any]:
        """The models a file may hold, by what they are."""
        return {"tokenizer": self}

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors`` and ``config.json``; :meth:`load` reads them back."""
        return save_folder(folder, self.state_dict(), {"system": SYSTEM, "config": to_json(self.config)})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """From a folder written by :meth:`save`."""
        return cls.from_saved(*read_folder(folder))

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """From the content of a saved folder."""
        if config.get("system") != SYSTEM:
            raise CheckpointError(f"this is a saved {config.get('system')!r}, expected {SYSTEM!r}")
        with weightless():
            model = cls(from_json(PointTokenizerConfig, config["config"]))
        assign(model, state, "the saved tokenizer")
        return model.eval()


def closed(values: Float[Tensor, "x y z"]) -> Float[Tensor, "x y z"]:
    """A field whose surface closes inside its grid: nothing on the border is inside."""
    inner = torch.zeros_like(values, dtype=torch.bool)
    inner[1:-1, 1:-1, 1:-1] = True
    return torch.where(inner, values, values.clamp(max=-values.abs().max().clamp_min(1e-6)))


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is this tokenizer in an official layout: none was published."""
    return False
