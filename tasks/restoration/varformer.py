"""VarFormer: image restoration with the prior of a frozen VAR.

Wang et al. 2025, "Varformer: Adapting VAR's Generative Prior for Image Restoration" (arXiv 2412.21063, CVPR); official
code and weights siywang541/Varformer. A VAR rolls out greedily on a degraded image, steered by the image's own tokens;
what each scale adds, and the feature maps of VAR's tokenizer, enter four levels of a second encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.checkpoint import assign, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.sampling import Emitter
from nextscale.datasets.restoration import squeezed
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.restoration.tiling import TileStore, follow_overview, restore_tiled
from nextscale.tasks.restoration.varformer_layout import (
    from_official_names,
    is_official,
    official_blanks,
    read_sizes,
    to_official_names,
)
from nextscale.tasks.restoration.varformer_network import (
    FusionSizes,
    MainDecoder,
    MainEncoder,
    decode_levels,
    encode_levels,
)
from nextscale.tasks.restoration.varformer_parts import ANCHOR, LatentBlock
from nextscale.tasks.restoration.varformer_prior import Degraded, RollOut, SteeringAttention, unroll
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

__all__ = ["PRESETS", "VarFormer", "VarFormerConfig", "is_official"]

SYSTEM = "varformer"


@dataclass(frozen=True)
class VarFormerConfig:
    """What VarFormer adds to a VAR; widths follow the VAR's tokenizer.

    Attributes:
        steered: blocks of the prior, from the first on, that a steering attention follows.
        steering_heads: of those attentions.
        enhancement: blocks that enhance a degraded image's latent before it is quantised.
        restoration: whether there is a restoration network (the second stage of training); else the image is drawn by
            the tokenizer's decoder from what the roll-out gives.
        adjust: the restoration decoder is adjusted to the frozen one's maps by deformable convolutions.
        decoder_blocks: residual blocks per level of the restoration decoder.
        refinement, refinement_width: residual blocks at full resolution, without norms, after all that the paper has,
            and their channels, meant for small networks. The ``"published"`` form has none.
        injected: levels of encoder and decoder that the prior enters, from the coarsest up; None: all but full
            resolution, as published. The finest has most of the positions that attention in windows sees.
        overview: whether tiles of a photograph that disagree follow its tones as a whole, made small
            (:func:`nextscale.tasks.restoration.tiling.follow_overview`), for networks trained to see photographs so.
        encoder_heads, decoder_heads, window: of the window attention in the restoration network; window_groups: groups
            of two such blocks in every selector and mixer.
        guidance: strength at the last scale between the two rows that each image has in the ``"published"`` form.
        with_prior: False: the same network with zeros in place of all that VAR and its tokenizer give, to compare with.
        form: ``"published"``: the steering attention scrambles rows and tokens, so that an image depends on its batch
            and guidance is between two different rows; scales are weighed before they are normalised, which undoes it.
            ``"fixed"``: neither; one row per image.
    """

    steered: int = 8
    steering_heads: int = 16
    enhancement: int = 4
    restoration: bool = True
    adjust: bool = False
    decoder_blocks: int = 2
    refinement: int = 0
    refinement_width: int = 32
    injected: int | None = None
    overview: bool = False
    encoder_heads: int = 8
    decoder_heads: int = 4
    window: int = 4
    window_groups: int = 2
    guidance: float = 0.5
    with_prior: bool = True
    form: Literal["published", "fixed"] = "fixed"

    def __post_init__(self) -> None:
        if self.form not in ("published", "fixed"):
            raise ValueError(f"form is {self.form!r}, expected 'published' or 'fixed'")
        if self.refinement and self.form == "published":
            raise ValueError(f"the published form has no refinement, {self.refinement} blocks were asked for")
        if self.injected is not None and self.form == "published":
            raise ValueError(f"in the published form the prior enters every level but one, not {self.injected} levels")
        if not (self.with_prior or self.restoration):
            raise ValueError("without the prior there is nothing to draw from but a restoration network")


@dataclass(frozen=True)
class Preset:
    """A published network: what it adds, and to which VAR."""

    config: VarFormerConfig
    prior: VARConfig
    tokenizer: ResidualVQConfig = field(default_factory=ResidualVQConfig)


PRESETS: dict[str, Preset] = {
    "varformer-d16": Preset(VarFormerConfig(form="published"), VARConfig.of_depth(16)),
    "varformer-d20": Preset(VarFormerConfig(6, adjust=True, form="published"), VARConfig.of_depth(20)),
    "varformer-d20-stage1": Preset(VarFormerConfig(20, restoration=False, form="published"), VARConfig.of_depth(20)),
}
"""Published networks, by name; weights of the first are released."""


@dataclass(frozen=True)
class VarFormerOutput:
    """Attributes:

    pixels: the restored image in [-1, 1].
    degraded, roll_out: what led to it; None without the prior.
    """

    pixels: Float[Tensor, "batch 3 height width"]
    degraded: Degraded | None = None
    roll_out: RollOut | None = None


class VarFormer(nn.Module):
    """A frozen VAR with its tokenizer, and what turns it into a restorer.

    The tokenizer and the prior's blocks take no gradient; its embeddings and its head do.
    """

    uncompiled = ("read", "_unroll")  # every scale would be a graph of its own, of little work

    def __init__(self, config: VarFormerConfig, prior: VAR) -> None:
        super().__init__()
        self.config = config
        self.prior = prior.requires_grad_(True)
        prior.tokenizer.requires_grad_(False)
        prior.transformer.requires_grad_(False)
        tokenizer, sizes, schedule = prior.tokenizer.config, prior.config, prior.config.schedule
        published, (height, width) = config.form == "published", schedule.final.grid
        if height != width or (config.restoration and height % ANCHOR):
            raise ValueError(
                f"the finest scale is {height} x {width}; VarFormer needs a square one whose side is a multiple of "
                f"{ANCHOR}"
            )
        if not 0 <= config.steered <= sizes.transformer.depth:
            raise ValueError(f"{config.steered} blocks were to be steered, the prior has {sizes.transformer.depth}")
        codes = sizes.code_channels
        self.enhancement = nn.Sequential(*(LatentBlock(codes) for _ in range(config.enhancement)))
        self.steering = nn.ModuleList(
            SteeringAttention(sizes.transformer.width, config.steering_heads, published) for _ in range(config.steered)
        )
        self.encoder: MainEncoder | None = None
        self.decoder: MainDecoder | None = None
        if config.restoration:
            window = config.window, config.window_groups
            fusion = FusionSizes(
                len(schedule), codes, height, config.encoder_heads, *window, published, config.injected
            )
            autoencoder = tokenizer.autoencoder
            if config.injected is not None and not 1 <= config.injected < len(autoencoder.multipliers):
                raise ValueError(
                    f"injected is {config.injected}; the prior enters 1 to {len(autoencoder.multipliers) - 1} levels"
                )
            self.encoder = MainEncoder(autoencoder, fusion)
            fusion = replace(fusion, heads=config.decoder_heads)
            self.decoder = MainDecoder(
                autoencoder,
                fusion,
                config.decoder_blocks,
                config.adjust,
                (config.refinement, config.refinement_width),
            )

    @property
    def tokenizer(self) -> ResidualVQ:
        """The prior's."""
        return cast(ResidualVQ, self.prior.tokenizer)

    @property
    def device(self) -> torch.device:
        return self.prior.device

    @property
    def dtype(self) -> torch.dtype:
        return self.prior.dtype

    @property
    def side(self) -> int:
        """Side in pixels of the images that go through the network."""
        return self.tokenizer.image_size(self.prior.config.schedule)[0]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.prior.eval()  # frozen blocks drop nothing
        return self

    # --- the network -------------------------------------------------------------------------------------

    def forward(self, image: Float[Tensor, "batch 3 side side"], emitter: Emitter | None = None) -> VarFormerOutput:
        """Restore images of the network's own size, all at once.

        Args:
            image: degraded, in [-1, 1].
            emitter: in place of the greedy one.

        Raises:
            ValueError: the images have another size.
        """
        if image.ndim != 4 or tuple(image.shape[1:]) != (3, self.side, self.side):
            raise ValueError(
                f"the images are {tuple(image.shape)}, the network takes (batch, 3, {self.side}, {self.side}); "
                "`restore` takes any size"
            )
        if not self.config.with_prior:
            return VarFormerOutput(self._restored(image, *self._nothing(image)))
        degraded = self.read(image)
        rolled = self._unroll(degraded, emitter)
        latent = self.tokenizer.post_quant_conv(rolled.total.to(self.dtype))
        if self.decoder is None:
            return VarFormerOutput(self.tokenizer.decoder(latent).float().clamp(-1, 1), degraded, rolled)
        with torch.no_grad():
            # Level 0 feeds nothing but the adjustment.
            guides = decode_levels(self.tokenizer.decoder, latent, 0 if self.config.adjust else 1)
        pixels = self._restored(image, degraded.maps.levels, guides, rolled.prior.to(self.dtype))
        return VarFormerOutput(pixels, degraded, rolled)

    def read(self, image: Float[Tensor, "batch 3 side side"], enhance: bool = True) -> Degraded:
        """The tokenizer's view of an image in [-1, 1].

        Args:
            enhance: enhance the latent before it is quantised, as is done with degraded images.
        """
        schedule, quantizer = self.prior.config.schedule, self.tokenizer.quantizer
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            maps = encode_levels(self.tokenizer.encoder, image.to(self.dtype))
            latent = self.tokenizer.quant_conv(maps.latent)
        enhanced = (self.enhancement(latent) if enhance else latent).float()
        found, totals = quantizer.encode(enhanced.detach(), schedule)
        return Degraded(maps, enhanced, torch.cat(found, dim=1), enhanced + (totals[-1] - enhanced).detach())

    def _unroll(self, degraded: Degraded, emitter: Emitter | None) -> RollOut:
        schedule, guidance = self.prior.config.schedule, None
        if self.config.form == "published":
            guidance = [self.config.guidance * schedule.ratio(index) for index in range(len(schedule))]
        inputs = self.tokenizer.quantizer.teacher_inputs(degraded.tokens, schedule)
        return unroll(self, inputs, guidance, emitter)

    def _restored(self, image: Tensor, guides: Any, decoder_guides: Any, prior: Tensor) -> Tensor:
        assert self.encoder is not None and self.decoder is not None
        image = image.to(self.dtype)
        maps = self.encoder(image, guides, prior)
        latent = self.tokenizer.quant_conv(maps.latent)
        return cast(Tensor, self.decoder(latent, image, maps.levels, decoder_guides, prior).float().clamp(-1, 1))

    def _nothing(self, image: Tensor) -> tuple[list[Tensor], tuple[Tensor, dict[int, Tensor]], Tensor]:
        """Zeros in the shapes of all that the prior gives."""
        autoencoder, schedule = self.tokenizer.config.autoencoder, self.prior.config.schedule
        levels = [
            image.new_zeros((len(image), autoencoder.channels * m, self.side >> i, self.side >> i), dtype=self.dtype)
            for i, m in enumerate(autoencoder.multipliers)
        ]
        codes = (len(image), len(schedule), self.prior.config.code_channels, *schedule.final.grid)
        return levels, (levels[-1], dict(enumerate(levels))), image.new_zeros(codes, dtype=self.dtype)

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """The training loss of a batch, and what to log.

        Args:
            batch: ``degraded`` and ``clean``, (batch, 3, side, side) in [-1, 1].
        """
        from nextscale.tasks.restoration.varformer_training import VarFormerTraining

        return VarFormerTraining(self).loss(SYSTEM, self, batch, step=0)

    # --- any photograph ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def restore(
        self,
        image: Float[Tensor, "*n 3 height width"],
        *,
        overlap: int | None = None,
        batch: int = 8,
        progress: Callable[[int, int], None] | None = None,
        store: TileStore | None = None,
    ) -> Float[Tensor, "*n 3 height width"]:
        """Restore one photograph, or several of one size, at their own size.

        Photographs of the network's own size go through it whole, all others in overlapping tiles with blended seams.
        In the ``"published"`` form tiles go through the network one by one, so that no result depends on what else is
        restored.

        Args:
            image: degraded, in [0, 1].
            overlap: pixels that neighbouring tiles share; None: a quarter of the network's side.
            batch: tiles that go through the network at once: memory and speed depend on it.
            progress: called with (tiles done, tiles in all) of each photograph.
            store: of one photograph: keeps rows of tiles that are done, so that an interrupted call goes on from there.

        Returns:
            The restored photographs in [0, 1], on the CPU.

        Raises:
            ValueError: the image is no photograph, or the overlap is not below the side.
        """
        if image.ndim not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape:
            raise ValueError(f"the image is {tuple(image.shape)}, expected (3, height, width) or (n, 3, height, width)")
        if not image.is_floating_point():
            raise ValueError(f"the image holds {image.dtype}, expected numbers in [0, 1]: divide by the largest value")
        if store is not None and image.ndim == 4:
            raise ValueError("a store keeps the tiles of one photograph: give (3, height, width)")
        if image.ndim == 4 and tuple(image.shape[-2:]) == (self.side, self.side):
            return torch.cat([self.restore_squares(part) for part in image.split(batch)])
        overlap = self.side // 4 if overlap is None else overlap
        sizes = {"tile": self.side, "overlap": overlap, "batch": batch}

        def whole(photo: Tensor) -> Tensor:
            apart: list[Tensor] = []
            result = restore_tiled(self.restore_squares, photo, **sizes, progress=progress, store=store, apart=apart)
            if self.config.overview and max(photo.shape[-2:]) > self.side:
                small = self.restore_squares(squeezed(photo, self.side)[None])[0]
                result = follow_overview(result, small, torch.cat(apart)).clamp_(0, 1)
            return result

        return torch.stack([whole(photo) for photo in image]) if image.ndim == 4 else whole(image)

    @torch.inference_mode()
    def restore_squares(self, image: Float[Tensor, "n 3 side side"]) -> Float[Tensor, "n 3 side side"]:
        """Restore images of the network's own size, in [0, 1]; each result is that of the image alone."""
        signed = image.to(self.device).float() * 2 - 1
        parts = signed.split(1 if self.config.form == "published" else len(signed))
        return torch.cat([(self(part).pixels.cpu() + 1) / 2 for part in parts])

    # --- files -------------------------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, Any]:
        """The models a file may hold: the whole, and the tokenizer inside it."""
        return {"restorer": self, **self.tokenizer.parts}

    @property
    def official_name(self) -> str:
        """The file name that the official training gives such a model."""
        return "net_g_last.pth"

    def official_differences(self) -> list[str]:
        """What the official code must be changed in to compute the same, as its files cannot say it."""
        if self.config.form == "published":
            return []
        return [
            "heads of the cross attention in order, and one row per image",
            "scales weighed after the instance norm",
        ] + ([] if self.config.with_prior else ["zeros in place of the prior"])

    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors``, prior and tokenizer included, and ``config.json``."""
        parts = {"model": self.config, "prior": self.prior.config, "tokenizer": self.tokenizer.config}
        config = {name: to_json(part) for name, part in parts.items()}
        return save_folder(folder, self.state_dict(), {"system": SYSTEM, "config": config})

    @classmethod
    def empty(cls, config: VarFormerConfig, prior: VARConfig, tokenizer: ResidualVQConfig) -> Self:
        """A model without weights, for :func:`nextscale.core.checkpoint.assign`."""
        with weightless():
            return cls(config, VAR(prior, ResidualVQ(tokenizer)))

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """From the content of a folder written by :meth:`save`."""
        parts = config["config"]
        model = cls.empty(
            from_json(VarFormerConfig, parts["model"]),
            from_json(VARConfig, parts["prior"]),
            from_json(ResidualVQConfig, parts["tokenizer"]),
        )
        assign(model, state, "the saved VarFormer")
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """The official state dict, the tokenizer and the prior in it; what nothing reads there is zero.

        Loads strictly into the official code; see :meth:`official_differences` for what that must then be changed in.

        Raises:
            ValueError: the model has a refinement, which the official code does not, or lacks fusions that it has.
        """
        config = self.config
        if config.refinement or config.injected is not None:
            odd = f"no place for {config.refinement} blocks of refinement"
            if not config.refinement:
                odd = f"the prior enter every level but one, not {config.injected} levels"
            raise ValueError(f"the official code has {odd}: save this model in this library's form")
        state = self.state_dict()
        if self.config.form != "published":
            twin = self.empty(replace(self.config, form="published"), self.prior.config, self.tokenizer.config)
            blanks = {name: torch.zeros(value.shape) for name, value in twin.state_dict().items() if name not in state}
            state = {**blanks, **state}
        official = to_official_names(self.tokenizer.config, state)
        return official | official_blanks(self.config, self.prior.config, self.tokenizer.config)

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[Preset, dict[str, Tensor]]:
        """Configurations and flat state dict in an official file's content; overrides as for :meth:`from_official`."""
        state, sizes, prior, tokenizer = read_sizes(content, **overrides)
        return Preset(VarFormerConfig(**sizes), prior, tokenizer), state

    @classmethod
    def from_official(cls, content: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from an official file's content, its averaged weights where it has them.

        Args:
            overrides: what a file cannot tell: ``guidance`` (the repository changed its default from 1.5 to 0.5; which
                one the released file was trained with is unknown), ``form``, to train on from it in the ``"fixed"``
                one, and ``schedule``, ``heads`` of the prior.

        Raises:
            CheckpointError: the content is no VarFormer.
        """
        found, state = cls.read_official(content, **overrides)
        model = cls.empty(found.config, found.prior, found.tokenizer)
        own = from_official_names(found.tokenizer, state)
        if found.config.form == "fixed":
            wanted = model.state_dict()
            own = {name: value for name, value in own.items() if name in wanted}
        assign(model, own, "VarFormer")
        return model.eval()
