"""FlexVAR's tokenizer: an image as token maps of any size, each of which stands for the whole image.

Jiao et al. 2025, "FlexVAR: Flexible Visual Autoregressive Modeling without Residual Prediction" (arXiv 2502.20313,
section 3.2); official code jiaosiyu1999/FlexVAR. The autoencoder is LlamaGen's VQ-16 (Sun et al. 2024, arXiv
2406.06525). No scale depends on another: the latent is averaged to each grid and every cell replaced by its nearest
code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.autoencoder import AutoencoderConfig, Decoder, Encoder
from nextscale.core.checkpoint import CheckpointError, KeyMap, assign, find_state_dict, weightless
from nextscale.core.quantizer import VectorQuantizer
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.tokenizers.autoencoder_layout import fused, separated
from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer

SYSTEM = "flex-vq"
STANDARD = ScaleSchedule.squares(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""The ten scales that FlexVAR is evaluated with at 256 px."""
LLAMAGEN = AutoencoderConfig(channels=128, latent_channels=256)


@dataclass(frozen=True)
class FlexQuantizerConfig:
    """Attributes:

    vocabulary: number of codes.
    channels: numbers per code.
    beta: weight of the commitment term.
    unit_norm: codes and features count by their direction: the unit vectors are searched and inserted.
    """

    vocabulary: int = 8912
    channels: int = 32
    beta: float = 0.25
    unit_norm: bool = True

    def __post_init__(self) -> None:
        if self.vocabulary < 1 or self.channels < 1:
            raise ValueError(f"a codebook needs codes and channels, got {self.vocabulary} x {self.channels}")


@dataclass(frozen=True)
class FlexVQConfig:
    """The defaults are the released tokenizer's (``FlexVAE.pth``).

    Attributes:
        decoder_multipliers: widths of the decoder's levels where they are not the encoder's.
        schedule: the scales used where none are given.
    """

    autoencoder: AutoencoderConfig = LLAMAGEN
    quantizer: FlexQuantizerConfig = field(default_factory=FlexQuantizerConfig)
    decoder_multipliers: tuple[int, ...] | None = None
    schedule: ScaleSchedule = STANDARD

    @property
    def decoder(self) -> AutoencoderConfig:
        """Sizes of the decoder."""
        return replace(self.autoencoder, multipliers=self.decoder_multipliers or self.autoencoder.multipliers)


@dataclass
class FlexQuantizerOutput:
    """What the quantiser's training pass gives, per scale.

    Attributes:
        maps: straight-through: the value of the codes, the gradient of the features, (batch, channels, height, width).
        loss: codebook and commitment terms, mean over scales.
        tokens: (batch, scale tokens).
        cells: what was to be explained, (cells, channels), without gradient.
    """

    maps: list[Tensor]
    loss: Float[Tensor, ""]
    tokens: list[Int[Tensor, "batch tokens"]]
    cells: list[Tensor]


class FlexQuantizer(VectorQuantizer):
    """Features <-> token maps, one for each grid; what enters the next scale is the last map, enlarged."""

    def __init__(self, config: FlexQuantizerConfig) -> None:
        super().__init__(config.vocabulary, config.channels, config.unit_norm)
        self.config = config
        if config.unit_norm:
            nn.init.normal_(self.codebook.weight)

    @property
    def vectors(self) -> Float[Tensor, "vocabulary channels"]:
        codes = super().vectors
        return F.normalize(codes, dim=-1) if self.unit_norm else codes

    # --- single steps ------------------------------------------------------------------------------------

    def shrink(self, features: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        """Features averaged to the grid of scale ``index``, which may also be finer than theirs."""
        return F.interpolate(features, size=schedule[index].grid, mode="area")

    def begin(self, batch: int, schedule: ScaleSchedule) -> Tensor:
        """Nothing: zeros (batch, channels, height, width) on the first grid."""
        return torch.zeros(batch, self.config.channels, *schedule[0].grid, device=self.codebook.weight.device)

    def advance(self, total: Tensor, codes: Tensor, schedule: ScaleSchedule, index: int) -> Tensor:
        """The map of scale ``index``, (batch, channels, height, width): it takes the place of the one before."""
        return codes.float().mT.unflatten(-1, schedule[index].grid)

    def next_input(
        self, total: Float[Tensor, "batch channels height width"], schedule: ScaleSchedule, index: int
    ) -> Float[Tensor, "batch tokens channels"]:
        """What enters the transformer at scale ``index``: the map before it, of unit codes, resized bicubically."""
        # As published: unit codes enter even where a codebook of any lengths is drawn from and decoded.
        codes = total if self.unit_norm else F.normalize(total, dim=1)
        return F.interpolate(codes, size=schedule[index].grid, mode="bicubic").flatten(2).mT

    # --- all scales --------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self, features: Float[Tensor, "batch channels height width"], schedule: ScaleSchedule, scales: int | None = None
    ) -> tuple[list[Int[Tensor, "batch tokens"]], list[Tensor]]:
        """Tokens of each scale, and the maps of their codes.

        Args:
            features: the encoder's output, of any size: the schedule need not end at its grid.
            scales: stop after so many scales; all by default.
        """
        tokens, maps = [], []
        for index in range(len(schedule) if scales is None else scales):
            z = self.shrink(features.float(), schedule, index)
            tokens.append(self.nearest(z.movedim(1, -1).flatten(0, 2)).view(len(z), -1))
            maps.append(self.lookup(tokens[-1]).mT.unflatten(-1, schedule[index].grid))
        return tokens, maps

    def decode(self, tokens: Int[Tensor, "batch length"], schedule: ScaleSchedule) -> list[Tensor]:
        """The code maps of all scales, (batch, channels, height, width) each at its own size."""
        parts = zip(schedule.split(tokens), schedule.scales, strict=True)
        return [self.lookup(part).mT.unflatten(-1, scale.grid) for part, scale in parts]

    @torch.no_grad()
    def teacher_inputs(
        self, tokens: Int[Tensor, "batch length"], schedule: ScaleSchedule, scales: int | None = None
    ) -> Float[Tensor, "batch rest channels"]:
        """Teacher forcing: the inputs of scales 1, 2, … from the true tokens, in one sequence.

        Args:
            tokens: of all scales in use; the last one's may be missing.
            scales: how many of the schedule's scales are in use; all by default.
        """
        inputs = [self.vectors.new_zeros(len(tokens), 0, self.config.channels)]
        for index in range((len(schedule) if scales is None else scales) - 1):
            start, stop = schedule.ranges[index]
            total = self.lookup(tokens[:, start:stop]).mT.unflatten(-1, schedule[index].grid)
            inputs.append(self.next_input(total, schedule, index + 1))
        return torch.cat(inputs, dim=1)

    def forward(self, features: Tensor, schedule: ScaleSchedule) -> FlexQuantizerOutput:
        """The training pass, with the straight-through estimator.

        loss = mean over scales of mse(codes, features detached) + beta mse(codes detached, features), both of unit
        length where codes are.
        """
        maps, tokens, cells = [], [], []
        with torch.autocast(features.device.type, enabled=False):
            loss = features.new_zeros((), dtype=torch.float32)
            for index in range(len(schedule)):
                z = self.shrink(features.float(), schedule, index)
                z = F.normalize(z, dim=1) if self.unit_norm else z
                cell = z.detach().movedim(1, -1).flatten(0, 2)
                found = self.nearest(cell).view(len(z), -1)
                codes = self.lookup(found).mT.unflatten(-1, schedule[index].grid)
                loss = loss + F.mse_loss(codes, z.detach()) + self.config.beta * F.mse_loss(codes.detach(), z)
                maps.append(z + (codes - z).detach())
                tokens.append(found)
                cells.append(cell)
        return FlexQuantizerOutput(maps, loss / len(schedule), tokens, cells)


@dataclass
class FlexOutput:
    """A training pass: each scale's reconstruction at its own size (not clamped), and what the quantiser gave."""

    reconstructions: list[Float[Tensor, "batch 3 height width"]]
    quantizer: FlexQuantizerOutput


class FlexVQ(ImageTokenizer):
    """Image in [-1, 1] <-> token maps of any (height, width), each decodable alone."""

    system = SYSTEM
    config_class = FlexVQConfig

    def __init__(self, config: FlexVQConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or FlexVQConfig()
        if config.decoder.stride != config.autoencoder.stride:
            raise ValueError(
                f"the encoder's multipliers {config.autoencoder.multipliers} and the decoder's "
                f"{config.decoder_multipliers} are not of one length: images would come back at another size"
            )
        latent, codes = config.autoencoder.latent_channels, config.quantizer.channels
        self.encoder = Encoder(config.autoencoder)
        self.quant_conv = nn.Conv2d(latent, codes, 1)
        self.quantizer = FlexQuantizer(config.quantizer)
        self.post_quant_conv = nn.Conv2d(codes, latent, 1)
        self.decoder = Decoder(config.decoder)

    @torch.no_grad()
    def teacher_inputs(
        self, tokens: Int[Tensor, "batch length"], schedule: ScaleSchedule | None = None
    ) -> Float[Tensor, "batch rest channels"]:
        """What enters a transformer at the scales 1, 2, …, given the true tokens."""
        return self.quantizer.teacher_inputs(tokens, schedule or self.config.schedule)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], schedule: ScaleSchedule | None = None
    ) -> FlexOutput:
        """The training pass: every scale is quantised and decoded, with the straight-through estimator."""
        quantized = self.quantizer(self.features(images), schedule or self.config.schedule)
        return FlexOutput([self.decoder(self.post_quant_conv(part)) for part in quantized.maps], quantized)

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """Squared error of all scales plus the quantiser's terms for ``batch["image"]``, and what to log.

        :class:`nextscale.tasks.tokenizers.flex_training.FlexTokenizerTraining` has the perceptual and adversarial
        terms.
        """
        output = self(batch["image"])
        squared = torch.stack(
            [F.mse_loss(made.float(), reduced(batch["image"], made)) for made in output.reconstructions]
        ).mean()
        metrics = {"squared": squared.detach(), "quantizer": output.quantizer.loss.detach()}
        return squared + output.quantizer.loss, metrics

    # --- the official layout -----------------------------------------------------------------------------

    def to_official(self) -> dict[str, Tensor]:
        """The official state dict; loads strictly into the official code."""
        state: dict[str, Tensor] = {}
        levels = len(self.config.autoencoder.multipliers)
        for name, value in separated(self.state_dict()):
            state[_KEYS.to_official(_execution_order(name, levels))] = value
        state[_USAGE] = torch.zeros(65536)  # statistics of training; they carry nothing for inference
        return state

    official_name = "FlexVAE.pth"

    def official_differences(self) -> list[str]:
        autoencoder, quantizer = self.config.autoencoder, self.config.quantizer
        found = []
        if autoencoder.norm_groups != 32:
            found.append(f"norms of {autoencoder.norm_groups} groups, where it has 32")
        if not autoencoder.attention:
            found.append("no attention in the autoencoder, where it has some")
        if not quantizer.unit_norm:
            found.append("a search by distance (its option codebook_l2_norm off)")
        return found

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[FlexVQConfig, dict[str, Tensor]]:
        state = find_state_dict(content, _NESTED, "quantize.embedding.weight")
        return config_from_official(state, **overrides), state

    @classmethod
    def from_official(cls, content: Mapping[str, Any], **overrides: Any) -> FlexVQ:
        """Build from an official file's content; sizes are read from its keys and shapes.

        Args:
            overrides: what a file cannot tell: ``schedule``, ``unit_norm``, ``beta``, ``norm_groups``.

        Raises:
            CheckpointError: the content is not such a tokenizer.
        """
        config, state = cls.read_official(content, **overrides)
        state.pop(_USAGE, None)
        own: dict[str, Tensor] = {}
        levels = len(config.autoencoder.multipliers)
        for name, value in fused(state):
            own[_execution_order(_KEYS.from_official(name), levels)] = value
        with weightless():
            model = cls(config)
        assign(model, own, "the FlexVAR tokenizer")
        return model.eval()


def reduced(images: Float[Tensor, "batch 3 high wide"], like: Tensor) -> Float[Tensor, "batch 3 height width"]:
    """Images averaged to the size of ``like``: what a scale's reconstruction should show."""
    return images if images.shape[-2:] == like.shape[-2:] else F.interpolate(images, size=like.shape[-2:], mode="area")


_NESTED = (("trainer", "vae_local"), ("model",), ("state_dict",))
_USAGE = "quantize.codebook_used"
_KEYS = KeyMap(
    [
        rule
        for part in ("encoder", "decoder")
        for rule in (
            (f"{part}.levels.*.blocks.*.shortcut", f"{part}.conv_blocks.*.res.*.nin_shortcut"),
            (f"{part}.levels.*.blocks.*", f"{part}.conv_blocks.*.res.*"),
            (f"{part}.levels.*.attentions.*.projection", f"{part}.conv_blocks.*.attn.*.proj_out"),
            (f"{part}.levels.*.attentions.*", f"{part}.conv_blocks.*.attn.*"),
            (
                f"{part}.levels.*.resample",
                f"{part}.conv_blocks.*.{'downsample' if part == 'encoder' else 'upsample'}",
            ),
            (f"{part}.middle.block1", f"{part}.mid.0"),
            (f"{part}.middle.attention.projection", f"{part}.mid.1.proj_out"),
            (f"{part}.middle.attention", f"{part}.mid.1"),
            (f"{part}.middle.block2", f"{part}.mid.2"),
        )
    ]
    + [("quantizer.codebook", "quantize.embedding")]
)


def _execution_order(name: str, levels: int) -> str:
    """A name with the decoder's levels counted from the other end: official files count them as they are run."""
    start, dot, rest = name.partition("decoder.levels.")
    if start or not dot:
        return name
    number, _, end = rest.partition(".")
    return f"{dot}{levels - 1 - int(number)}.{end}"


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is this tokenizer, in the official layout."""
    try:
        state = find_state_dict(content, (("model",), ("state_dict",)), "quantize.embedding.weight")
    except CheckpointError:
        return False
    return "encoder.conv_blocks.0.res.0.norm1.weight" in state and "post_quant_conv.weight" in state


def config_from_official(state: Mapping[str, Tensor], **overrides: Any) -> FlexVQConfig:
    """The configuration that an official state dict's keys and shapes imply.

    Raises:
        CheckpointError: an entry that sizes are read from is missing.
    """
    try:
        levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.conv_blocks."))
        blocks = 1 + max(int(key.split(".")[4]) for key in state if key.startswith("encoder.conv_blocks.0.res."))
        channels, image_channels = state["encoder.conv_in.weight"].shape[:2]
        widths = [state[f"encoder.conv_blocks.{i}.res.0.conv1.weight"].shape[0] for i in range(levels)]
        decoder = [state[f"decoder.conv_blocks.{levels - 1 - i}.res.0.conv1.weight"].shape[0] for i in range(levels)]
        vocabulary, codes = state["quantize.embedding.weight"].shape
        latent = state["encoder.conv_out.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"the state dict lacks an entry of the FlexVAR tokenizer: {error}") from None
    quantizer = {name: overrides[name] for name in ("beta", "unit_norm") if overrides.get(name) is not None}
    return FlexVQConfig(
        AutoencoderConfig(
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            blocks=blocks,
            latent_channels=latent,
            image_channels=image_channels,
            attention="encoder.mid.1.q.weight" in state,
            norm_groups=overrides.get("norm_groups") or 32,
        ),
        FlexQuantizerConfig(vocabulary, codes, **quantizer),
        tuple(width // channels for width in decoder) if decoder != widths else None,
        ScaleSchedule.parse(overrides.get("schedule") or STANDARD),
    )
