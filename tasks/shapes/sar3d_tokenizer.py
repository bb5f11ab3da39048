"""SAR3D's tokenizer: views of an object <-> token pyramid over three planes -> density and colour, or a mesh.

Chen et al. 2024, "SAR3D" (arXiv 2411.16856, CVPR 2025); official code and weights cyw-3d/SAR3D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.autoencoder import AutoencoderConfig, Decoder
from nextscale.core.checkpoint import CheckpointError, assign, read_folder, read_tensors, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.quantizer import QuantizerConfig, QuantizerOutput
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.shapes.objects import Shape
from nextscale.tasks.shapes.sar3d_fields import DensityField, FieldConfig, MeshField
from nextscale.tasks.shapes.sar3d_layout import (
    read_tokenizer,
    tokenizer_config_values,
    tokenizer_from_layout,
    tokenizer_to_layout,
)
from nextscale.tasks.shapes.sar3d_meshing import density_shape, mesh_shape
from nextscale.tasks.shapes.sar3d_planes import PLANES, PatchEmbedding, PlanesConfig, PlaneTransformer
from nextscale.tasks.shapes.sar3d_quantizer import TriplaneQuantizer
from nextscale.tasks.shapes.sar3d_rendering import Noise, RenderConfig, Rendered, camera_rays, render
from nextscale.tasks.shapes.sar3d_views import CHANNELS, ViewEncoder, ViewsConfig

SYSTEM = "triplane-vq"
SCHEDULE = ScaleSchedule.squares(1, 2, 3, 4, 5, 6, 8, 10, 13, 16, planes=PLANES)


@dataclass(frozen=True)
class TriplaneVQConfig:
    """The defaults are the released tokenizer's (``vqvae-ckpt.pt``).

    Attributes:
        encoder, views: the encoder of each view, whose latent channels are three times the codes', and the attention
            between views.
        schedule: scales of three planes.
        decoder: the transformer over the planes' cells.
        upsampler: its latent channels are the transformer's width, its image channels the field's.
        head: what planes are read by.
        published: insert codes as the official code does; see
            :class:`nextscale.tasks.shapes.sar3d_quantizer.TriplaneQuantizer`.
        separate_smoothers: official files name the smoothers as if each belonged to one scale; only the names differ.
    render: how pictures are made of density fields.
    """

    encoder: AutoencoderConfig = field(
        default_factory=lambda: AutoencoderConfig(latent_channels=24, image_channels=CHANNELS, attention=False)
    )
    views: ViewsConfig = field(default_factory=ViewsConfig)
    quantizer: QuantizerConfig = field(default_factory=lambda: QuantizerConfig(16384, 8, unit_norm=True))
    schedule: ScaleSchedule = SCHEDULE
    decoder: PlanesConfig = field(default_factory=PlanesConfig)
    upsampler: AutoencoderConfig = field(
        default_factory=lambda: AutoencoderConfig(32, (1, 2, 2, 4), 1, 768, 32, level_attention=())
    )
    head: FieldConfig = field(default_factory=FieldConfig)
    published: bool = False
    separate_smoothers: bool = False
    render: RenderConfig = field(default_factory=RenderConfig)

    def __post_init__(self) -> None:
        if any(scale.planes != PLANES or scale.streams != 1 for scale in self.schedule.scales):
            raise ValueError(f"the scales '{self.schedule}' are not of {PLANES} planes: write them as 1x1x3 2x2x3 …")
        pairs = {
            "encoder.latent_channels": (self.encoder.latent_channels, PLANES * self.quantizer.channels),
            "upsampler.latent_channels": (self.upsampler.latent_channels, self.decoder.width),
            "upsampler.image_channels": (self.upsampler.image_channels, self.head.channels),
        }
        for name, (found, expected) in pairs.items():
            if found != expected:
                raise ValueError(f"{name} is {found}, the parts beside it need {expected}")


PRESETS: dict[str, TriplaneVQConfig] = {
    "sar3d-vqvae": TriplaneVQConfig(),
    "sar3d-vqvae-mesh": TriplaneVQConfig(head=FieldConfig("mesh")),
}
"""Released tokenizers, by name."""


class TriplaneVQ(nn.Module):
    """Views <-> tokens -> planes -> pictures or a mesh."""

    system: ClassVar[str] = SYSTEM
    config_class: ClassVar[type[TriplaneVQConfig]] = TriplaneVQConfig

    def __init__(self, config: TriplaneVQConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TriplaneVQConfig()
        codes, cells = config.quantizer.channels, config.schedule.final.height * config.schedule.final.width
        self.encoder = ViewEncoder(config.encoder, config.views)
        self.quant_conv = nn.Conv2d(codes, codes, 3, padding=1)
        self.quantizer = TriplaneQuantizer(config.quantizer, config.published)
        self.post_quant_conv = nn.Conv2d(codes, codes, 3, padding=1)
        self.patch_embedding = PatchEmbedding(codes, config.decoder.width)
        self.decoder = PlaneTransformer(config.decoder, cells)
        self.upsampler = Decoder(config.upsampler)
        self.field: DensityField | MeshField
        density = config.head.kind == "density"
        self.field = DensityField(config.head, config.render.box) if density else MeshField(config.head)

    @property
    def dtype(self) -> torch.dtype:
        return self.post_quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.post_quant_conv.weight.device

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the views, in pixels."""
        return self.config.schedule.scaled(self.config.encoder.stride)

    # --- tokens ------------------------------------------------------------------------------------------

    def latent(self, views: Float[Tensor, "views 10 height width"]) -> Float[Tensor, "objects latent h w"]:
        """What the encoder makes of views; see :func:`nextscale.tasks.shapes.sar3d_views.encoder_input`."""
        return self.encoder(views.to(self.dtype))

    def features(self, views: Float[Tensor, "views 10 height width"]) -> Float[Tensor, "planes codes h w"]:
        """The continuous maps that are quantised, float32, those of an object's planes after each other."""
        return self.to_planes(self.latent(views))

    def to_planes(self, latent: Float[Tensor, "objects latent h w"]) -> Float[Tensor, "planes codes h w"]:
        return self.quant_conv(latent.unflatten(1, (PLANES, -1)).flatten(0, 1)).float()

    @torch.no_grad()
    def encode(self, views: Float[Tensor, "views 10 height width"]) -> Int[Tensor, "objects length"]:
        """Tokens of all scales, in one sequence."""
        return torch.cat(self.quantizer.encode(self.features(views), self.config.schedule)[0], dim=1)

    def decode(self, tokens: Int[Tensor, "objects length"]) -> Float[Tensor, "objects features height width"]:
        """The planes of whole pyramids of tokens."""
        return self.decode_features(self.quantizer.decode(tokens, self.config.schedule)[-1])

    def decode_features(self, total: Float[Tensor, "planes codes h w"]) -> Float[Tensor, "objects features H W"]:
        """The planes of (quantised) maps, float32: those of an object's three planes are stacked on channels."""
        hidden = self.hidden(self.patches(total))
        height, width = total.shape[-2:]
        maps = hidden.unflatten(1, (PLANES, height, width)).flatten(0, 1).permute(0, 3, 1, 2)
        # Plane by plane on a CPU, which gains nothing from a batch of convolutions.
        parts = maps.split(1 if maps.device.type == "cpu" and not self.training else len(maps))
        planes = torch.cat([self.upsampler(part.contiguous()).float() for part in parts])
        return planes.unflatten(0, (-1, PLANES)).flatten(1, 2)

    def patches(self, total: Float[Tensor, "planes codes h w"]) -> Float[Tensor, "objects tokens width"]:
        """What the transformer over the planes' cells is conditioned on."""
        latent = self.post_quant_conv(total.to(self.dtype)).unflatten(0, (-1, PLANES)).flatten(1, 2)
        return self.patch_embedding(latent)

    def hidden(self, patches: Float[Tensor, "objects tokens width"]) -> Float[Tensor, "objects tokens width"]:
        """What that transformer gives."""
        return self.decoder(patches)

    def forward(self, views: Float[Tensor, "views 10 height width"]) -> tuple[Tensor, QuantizerOutput]:
        """The training pass: planes, with the straight-through estimator, and what the quantiser gave."""
        quantized = self.quantizer(self.features(views), self.config.schedule)
        return self.decode_features(quantized.features), quantized

    # --- what planes show --------------------------------------------------------------------------------

    def density(self) -> DensityField:
        """The field of density and colour.

        Raises:
            ValueError: this tokenizer makes meshes.
        """
        if not isinstance(self.field, DensityField):
            raise ValueError("this tokenizer reads its planes as meshes; take the one for density fields to see them")
        return self.field

    def see(
        self,
        planes: Float[Tensor, "objects features height width"],
        origins: Float[Tensor, "objects rays 3"],
        directions: Float[Tensor, "objects rays 3"],
        noise: Noise | None = None,
        chunk: int | None = None,
    ) -> Rendered:
        """What rays see of planes."""
        density = self.density()
        return render(lambda points: density(planes, points), origins, directions, self.config.render, noise, chunk)

    @torch.no_grad()
    def pictures(
        self, planes: Float[Tensor, "1 features height width"], cameras: Float[Tensor, "views 25"], size: int = 128
    ) -> Float[Tensor, "views 3 size size"]:
        """Pictures of one object in [0, 1]; cameras as in
        :func:`nextscale.tasks.shapes.sar3d_rendering.camera_rays`."""
        origins, directions = camera_rays(cameras.to(planes.device), size)
        seen = self.see(planes, origins.flatten(0, 1)[None], directions.flatten(0, 1)[None], chunk=16384).colour.view(
            len(cameras), size, size, 3
        )
        return ((seen.permute(0, 3, 1, 2) + 1) / 2).clamp(0, 1)

    @torch.no_grad()
    def shape(
        self,
        planes: Float[Tensor, "1 features height width"],
        *,
        resolution: int = 192,
        level: float = 10.0,
    ) -> Shape:
        """The mesh of one object, z up: of a density field in a box of side 0.9, of FlexiCubes in one of side 2.

        Args:
            resolution, level: points a side of the grid that density is looked at on, and the density at the surface;
                a mesh tokenizer has a grid of its own.
        """
        if isinstance(self.field, MeshField):
            return mesh_shape(self.field, planes)
        return density_shape(self.field, planes, resolution, level)

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """The quantiser's terms and what rays see, of a batch of
        :class:`nextscale.tasks.shapes.sar3d_tokenizer_training.TriplaneTraining`."""
        from nextscale.tasks.shapes.sar3d_tokenizer_training import TriplaneLossConfig, TriplaneTraining

        return TriplaneTraining(self, TriplaneLossConfig(adversarial=0.0)).loss(SYSTEM, self, dict(batch), 0)

    # --- files -------------------------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, Any]:
        """The models a file may hold, by what they are; each has ``config``, ``official_name``, ``to_official``."""
        return {"tokenizer": self}

    @property
    def official_name(self) -> str:
        return "vqvae-ckpt.pt" if self.config.head.kind == "density" else "vqvae-flexicubes-ckpt.pt"

    def official_differences(self) -> list[str]:
        """What the official code must be changed in to compute the same, as its files cannot say it."""
        found = []
        if self.config.encoder.norm_groups != 32 or self.config.upsampler.norm_groups != 32:
            found.append("norms of other than 32 groups")
        if not self.config.published:
            found.append("codes at length 1 where it inserts them as they are")
        return found

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors`` and ``config.json``; :meth:`load` reads them back."""
        return save_folder(folder, self.state_dict(), {"system": self.system, "config": to_json(self.config)})

    @classmethod
    def load(cls, source: str | Path, **overrides: Any) -> Self:
        """From a folder written by :meth:`save`, or from an official file (whose overrides these are)."""
        if not Path(source).is_dir():
            return cls.from_official(read_tensors(source), **overrides)
        return cls.from_saved(*read_folder(source))

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """From the content of a saved folder."""
        if config.get("system") != cls.system:
            raise CheckpointError(f"this is a saved {config.get('system')!r}, expected {cls.system!r}")
        with weightless():
            model = cls(from_json(cls.config_class, config["config"]))
        assign(model, state, "the saved tokenizer")
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """The official state dict; loads strictly into the official code."""
        return tokenizer_to_layout(self.state_dict(), len(self.config.schedule), self.config.separate_smoothers)

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[TriplaneVQConfig, dict[str, Tensor]]:
        """Configuration and flat state dict in an official file's content; overrides as for :meth:`from_official`."""
        state = read_tokenizer(content)
        return config_from_official(state, **overrides), state

    @classmethod
    def from_official(cls, content: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from an official file's content; sizes are read from its keys and shapes.

        Args:
            overrides: what a file cannot tell: ``schedule``, ``heads`` (of the decoder), ``view_heads``, ``smoothing``,
                ``beta``, ``norm_groups``, ``grid`` (of the mesh), ``published`` (None: True), ``render``.

        Raises:
            CheckpointError: the content is not such a tokenizer.
        """
        config, state = cls.read_official(content, **overrides)
        with weightless():
            model = cls(config)
        assign(model, tokenizer_from_layout(state), "the SAR3D tokenizer")
        return model.eval()


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is this tokenizer, in the official layout."""
    try:
        state = read_tokenizer(content)
    except CheckpointError:
        return False
    return {"encoder.fusion_layer.weight", "decoder.vit_decoder.pos_embed"} <= set(state)


def config_from_official(state: Mapping[str, Tensor], **overrides: Any) -> TriplaneVQConfig:
    """The configuration that an official state dict's keys and shapes imply.

    Raises:
        CheckpointError: an entry that sizes are read from is missing, or the scales cannot be told.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    found = tokenizer_config_values(state, given)
    schedule = given.get("schedule")
    if schedule is None:
        if (found.scales, found.cells) != (len(SCHEDULE), SCHEDULE.final.height**2):
            raise CheckpointError(
                f"the file has {found.scales} scales that end at {found.cells} cells a plane, which is no published "
                'list; name them with schedule="1x1x3 2x2x3 ..."'
            )
        schedule = SCHEDULE
    return TriplaneVQConfig(
        **found.parts,
        schedule=ScaleSchedule.parse(schedule),
        published=given.get("published", True),
        render=given.get("render", RenderConfig()),
    )
