"""VAR's tokenizer: a convolutional autoencoder around a multi-scale residual quantiser.

Tian et al. 2024 (arXiv 2404.02905); official code FoundationVision/VAR. Shared by VAR, STAR, CAR,
ControlVAR, CoDe, LiteVAR, VarFormer and DepthART.
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
from nextscale.core.checkpoint import (
    CheckpointError,
    KeyMap,
    assign,
    find_state_dict,
    weightless,
)
from nextscale.core.quantizer import QuantizerConfig, QuantizerOutput, ResidualQuantizer
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer

SYSTEM = "residual-vq"
SCHEDULE_256 = ScaleSchedule.squares(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCHEDULE_512 = ScaleSchedule.squares(1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
SCHEDULE_1024 = ScaleSchedule.squares(1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)


@dataclass(frozen=True)
class ResidualVQConfig:
    """The defaults are the released tokenizer's (``vae_ch160v4096z32.pth``).

    Attributes:
        schedule: the scales used where none are given.
        quant_conv_kernel: kernel of the convolutions between autoencoder and quantiser.
        separate_smoothers: official files name the smoothers as if each belonged to one scale; only the names
            differ.
    """

    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    schedule: ScaleSchedule = SCHEDULE_256
    quant_conv_kernel: int = 3
    separate_smoothers: bool = False


@dataclass
class TokenizerOutput:
    """A training pass: the reconstruction (not clamped) and what the quantiser gave."""

    reconstruction: Float[Tensor, "batch channels height width"]
    quantizer: QuantizerOutput


class ResidualVQ(ImageTokenizer):
    """Image in [-1, 1] <-> token pyramid."""

    system = SYSTEM
    config_class = ResidualVQConfig

    def __init__(self, config: ResidualVQConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ResidualVQConfig()
        latent, codes = config.autoencoder.latent_channels, config.quantizer.channels
        if latent != codes:
            raise ValueError(f"the autoencoder has {latent} latent channels, the codes have {codes}; make them equal")
        kernel = config.quant_conv_kernel
        self.encoder = Encoder(config.autoencoder)
        self.quant_conv = nn.Conv2d(codes, codes, kernel, padding=kernel // 2)
        self.quantizer = ResidualQuantizer(config.quantizer)
        self.post_quant_conv = nn.Conv2d(codes, codes, kernel, padding=kernel // 2)
        self.decoder = Decoder(config.autoencoder)

    @torch.no_grad()
    def decode_ragged(
        self, tokens: Int[Tensor, "batch length"], schedule: ScaleSchedule | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """The official code's experimental path: each scale's codes are smoothed at their own size.

        The sum grows with the scales, enlarged bicubically from one to the next. Models are not trained
        this way; it shows what a prefix of the pyramid looks like at its own resolution.
        """
        schedule = schedule or self.config.schedule
        total = self.quantizer.begin(len(tokens), schedule.prefix(1))
        for index, scale_tokens in enumerate(schedule.split(tokens)):
            grid = schedule[index].grid
            codes = self.quantizer.lookup(scale_tokens).mT.unflatten(-1, grid)
            total = F.interpolate(total, size=grid, mode="bicubic") + self.quantizer.smooth(codes, schedule, index)
        return self.decode_features(total)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], schedule: ScaleSchedule | None = None
    ) -> TokenizerOutput:
        """The training pass, with the straight-through estimator through the quantiser."""
        quantized = self.quantizer(self.features(images), schedule or self.config.schedule)
        return TokenizerOutput(self.decoder(self.post_quant_conv(quantized.features)), quantized)

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """Squared error plus the quantiser's terms for ``batch["image"]`` in [-1, 1], and what to log.

        The perceptual and adversarial terms are :class:`nextscale.tasks.tokenizers.training.TokenizerTraining`'s.
        """
        output = self(batch["image"])
        squared = F.mse_loss(output.reconstruction.float(), batch["image"])
        metrics = {"squared": squared.detach(), "quantizer": output.quantizer.loss.detach()}
        return squared + output.quantizer.loss, metrics

    def to_official(self) -> dict[str, Tensor]:
        """The official state dict; loads strictly into the official code."""
        keys = key_map(self.config)
        state = {keys.to_official(name): value for name, value in self.state_dict().items()}
        # Usage statistics: the official file has them, they carry no information for inference.
        state[_USAGE] = torch.zeros(len(self.config.schedule), self.config.quantizer.vocabulary)
        return state

    @property
    def official_name(self) -> str:
        codes = self.config.quantizer
        return f"vae_ch{self.config.autoencoder.channels}v{codes.vocabulary}z{codes.channels}.pth"

    def official_differences(self) -> list[str]:
        autoencoder, quantizer = self.config.autoencoder, self.config.quantizer
        found = []
        if autoencoder.norm_groups != 32:
            found.append(f"norms of {autoencoder.norm_groups} groups, where it has 32")
        if not autoencoder.attention:
            found.append("no attention in the autoencoder, where it has some")
        if quantizer.unit_norm:
            found.append("a search by angle (its option using_znorm)")
        if quantizer.smoothers != 4 or quantizer.smoothing != 0.5:
            found.append(f"{quantizer.smoothers} smoothing convolutions of share {quantizer.smoothing}")
        return found

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[ResidualVQConfig, dict[str, Tensor]]:
        state = find_state_dict(content, _NESTED, "quantize.embedding.weight")
        return config_from_official(state, **overrides), state

    @classmethod
    def from_official(cls, content: Mapping[str, Any], **overrides: Any) -> ResidualVQ:
        """Build from an official file's content; sizes are read from its keys and shapes.

        Args:
            overrides: what a file cannot tell: ``schedule``, ``unit_norm``, ``smoothing``, ``beta``, ``norm_groups``.

        Raises:
            CheckpointError: the content is not such a tokenizer.
        """
        config, state = cls.read_official(content, **overrides)
        with weightless():
            model = cls(config)
        keys = key_map(config)
        state.pop(_USAGE, None)
        assign(model, {keys.from_official(name): value for name, value in state.items()}, "the VAR tokenizer")
        return model.eval()


_NESTED = (("trainer", "vae_local"), ("state_dict",), ("model",))
_USAGE = "quantize.ema_vocab_hit_SV"
_SCHEDULES = {len(s): s for s in (SCHEDULE_1024, SCHEDULE_256)}


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is this tokenizer, in the official layout."""
    try:
        state = find_state_dict(content, (("state_dict",), ("model",)), "quantize.embedding.weight")
    except CheckpointError:
        return False
    return "encoder.down.0.block.0.norm1.weight" in state and "post_quant_conv.weight" in state


def config_from_official(state: Mapping[str, Tensor], **overrides: Any) -> ResidualVQConfig:
    """The configuration that an official state dict's keys and shapes imply.

    Raises:
        CheckpointError: an entry that sizes are read from is missing.
    """
    try:
        levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
        blocks = 1 + max(int(key.split(".")[4]) for key in state if key.startswith("encoder.down.0.block."))
        channels, image_channels = state["encoder.conv_in.weight"].shape[:2]
        widths = [state[f"encoder.down.{i}.block.{blocks - 1}.conv2.weight"].shape[0] for i in range(levels)]
        vocabulary, codes = state["quantize.embedding.weight"].shape
        latent, kernel = state["encoder.conv_out.weight"].shape[0], state["quant_conv.weight"].shape[-1]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"the state dict lacks an entry of the VAR tokenizer: {error}") from None
    smoothers = {key.rsplit(".", 1)[0] for key in state if key.startswith("quantize.quant_resi.")}
    separate = bool(smoothers) and not any(".qresi" in key for key in smoothers)
    scales = state[_USAGE].shape[0] if _USAGE in state else 10
    schedule = overrides.pop("schedule", None) or _SCHEDULES.get(scales) or ScaleSchedule.squares(*range(1, scales + 1))
    norm_groups = overrides.pop("norm_groups", None) or 32
    quantizer = QuantizerConfig(vocabulary, codes, smoothing=0.5 if smoothers else 0.0, smoothers=len(smoothers))
    return ResidualVQConfig(
        autoencoder=AutoencoderConfig(
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            blocks=blocks,
            latent_channels=latent,
            image_channels=image_channels,
            **_attention(state, levels),
            norm_groups=norm_groups,
        ),
        quantizer=replace(quantizer, **{k: v for k, v in overrides.items() if v is not None}),
        schedule=ScaleSchedule.parse(schedule),
        quant_conv_kernel=kernel,
        separate_smoothers=separate,
    )


def _attention(state: Mapping[str, Tensor], levels: int) -> dict[str, Any]:
    """Where the autoencoder has self-attention: in the middle, in the lowest of its levels, in both or in neither."""
    middle = "encoder.mid.attn_1.qkv.weight" in state
    lowest = f"encoder.down.{levels - 1}.attn.0.qkv.weight" in state
    return {"attention": middle, "level_attention": None if middle == lowest else (levels - 1,) * lowest}


def autoencoder_rules() -> list[tuple[str, str]]:
    """Names of encoder and decoder in the latent-diffusion layout."""
    rules: list[tuple[str, str]] = []
    for part, level, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        rules += [
            (f"{part}.levels.*.blocks.*.shortcut", f"{part}.{level}.*.block.*.nin_shortcut"),
            (f"{part}.levels.*.blocks.*", f"{part}.{level}.*.block.*"),
            (f"{part}.levels.*.attentions.*.projection", f"{part}.{level}.*.attn.*.proj_out"),
            (f"{part}.levels.*.attentions.*", f"{part}.{level}.*.attn.*"),
            (f"{part}.levels.*.resample", f"{part}.{level}.*.{resample}"),
            (f"{part}.middle.block1", f"{part}.mid.block_1"),
            (f"{part}.middle.attention.projection", f"{part}.mid.attn_1.proj_out"),
            (f"{part}.middle.attention", f"{part}.mid.attn_1"),
            (f"{part}.middle.block2", f"{part}.mid.block_2"),
        ]
    return rules


def key_map(config: ResidualVQConfig) -> KeyMap:
    """Names of such a tokenizer's weights in the official layout."""
    if config.separate_smoothers:
        smoother = ("quantizer.smoothers.*.conv", "quantize.quant_resi.*")
    elif config.quantizer.smoothers == 1:
        smoother = ("quantizer.smoothers.0.conv", "quantize.quant_resi.qresi")
    else:
        smoother = ("quantizer.smoothers.*.conv", "quantize.quant_resi.qresi_ls.*")
    return KeyMap([*autoencoder_rules(), ("quantizer.codebook", "quantize.embedding"), smoother])
