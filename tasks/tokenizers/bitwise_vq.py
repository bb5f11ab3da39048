"""Infinity's tokenizer: a convolutional autoencoder around a multi-scale quantiser of bits.

Han et al. 2024 (arXiv 2412.04431); official code FoundationVision/Infinity and FoundationVision/BitVAE. Shared by
Infinity and VARGPT v1.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nextscale.core.autoencoder import AutoencoderConfig, Decoder, Encoder, Level
from nextscale.core.checkpoint import CheckpointError, KeyMap, assign, find_state_dict, weightless
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizer, BitwiseQuantizerConfig
from nextscale.tasks.tokenizers.bitwise_schedules import for_features, schedule_of
from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer
from nextscale.tasks.tokenizers.residual_vq import TokenizerOutput, autoencoder_rules

SYSTEM = "bitwise-vq"
AUTOENCODER = AutoencoderConfig(128, (1, 2, 4, 4, 4), blocks=2, latent_channels=32, attention=False)
SCHEDULE_1M = schedule_of(1.0, "1M")
TOKEN_STRIDE = 16
"""Pixels per token of all published models; of a tokenizer of stride 8, 2 x 2 cells make a token."""


@dataclass(frozen=True)
class BitwiseVQConfig:
    """The defaults are the released tokenizer's of 32 bits (``infinity_vae_d32reg.pth``).

    Attributes:
        schedule: the scales of tokens used where none are given.
        halvings: levels of the autoencoder after which the resolution halves; None: all but the last.
    """

    autoencoder: AutoencoderConfig = AUTOENCODER
    quantizer: BitwiseQuantizerConfig = field(default_factory=BitwiseQuantizerConfig)
    schedule: ScaleSchedule = SCHEDULE_1M
    halvings: int | None = None

    def __post_init__(self) -> None:
        levels = len(self.autoencoder.multipliers)
        if self.halvings is not None and not 0 <= self.halvings < levels:
            raise ValueError(f"halvings is {self.halvings}; an autoencoder of {levels} levels has at most {levels - 1}")
        if self.autoencoder.latent_channels != self.quantizer.bits:
            raise ValueError(
                f"the autoencoder has {self.autoencoder.latent_channels} latent channels, the quantiser "
                f"{self.quantizer.bits} bits; make them equal"
            )

    @property
    def cell(self) -> int:
        """Pixels per cell of the latent map, along each side."""
        return self.autoencoder.stride if self.halvings is None else int(2**self.halvings)


@dataclass
class BitwiseOutput(TokenizerOutput):
    """Attributes:

    early: what the first few scales look like, where it was asked for.
    """

    early: Float[Tensor, "batch channels height width"] | None = None


class BitwiseVQ(ImageTokenizer):
    """Image in [-1, 1] <-> pyramid of bits; tokens are bool, (batch, length, bits of a token)."""

    system = SYSTEM
    config_class = BitwiseVQConfig

    def __init__(self, config: BitwiseVQConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or BitwiseVQConfig()
        self.encoder = Encoder(config.autoencoder)
        self.quant_conv = nn.Identity()
        self.quantizer = BitwiseQuantizer(config.quantizer)
        self.post_quant_conv = nn.Identity()
        self.decoder = Decoder(config.autoencoder)
        if config.halvings is not None:
            for level in (*self.encoder.levels[config.halvings :], *self.decoder.levels[config.halvings + 1 :]):
                cast(Level, level).resample = None
        if config.autoencoder.norm_groups == 24:
            # The official rule: 32 groups where the width allows it, else 24.
            for norm in self.modules():
                if isinstance(norm, nn.GroupNorm) and norm.num_channels % 32 == 0:
                    norm.num_groups = 32

    @property
    def stride(self) -> int:
        """Image pixels per token of the finest map, along each side."""
        return self.config.cell * self.config.quantizer.patch

    def schedule_for(self, height: int, width: int) -> ScaleSchedule:
        """The scales of images of this many pixels: the configured ones where they fit, else the published list.

        Raises:
            ValueError: neither has this size.
        """
        grid = height // self.stride, width // self.stride
        if grid == self.config.schedule.final.grid:
            schedule: ScaleSchedule = self.config.schedule
            return schedule
        found = for_features(*grid)
        if found is None:
            raise ValueError(
                f"no published list of scales ends at {grid[0]} x {grid[1]} tokens ({height} x {width} pixels): "
                "give schedule"
            )
        return found

    @torch.no_grad()
    def encode(
        self, images: Float[Tensor, "batch 3 height width"], schedule: ScaleSchedule | None = None
    ) -> Bool[Tensor, "batch length token_bits"]:
        """Bits of all scales, in one sequence, of images in [-1, 1]; see :meth:`schedule_for`."""
        return super().encode(images, schedule or self.schedule_for(*images.shape[-2:]))

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        schedule: ScaleSchedule | None = None,
        early: int | None = None,
    ) -> BitwiseOutput:
        """The training pass, with the straight-through estimator through the quantiser.

        Args:
            early: decode the first so many scales too.
        """
        quantized, total = self.quantizer(self.features(images), schedule or self.config.schedule, early)
        return BitwiseOutput(
            self.decoder(quantized.features), quantized, None if total is None else self.decoder(total)
        )

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """Squared error plus the quantiser's terms for ``batch["image"]`` in [-1, 1], and what to log.

        The perceptual and adversarial terms are :class:`nextscale.tasks.tokenizers.training.TokenizerTraining`'s.
        """
        output = self(batch["image"])
        squared = F.mse_loss(output.reconstruction.float(), batch["image"])
        metrics = {"squared": squared.detach(), "quantizer": output.quantizer.loss.detach()}
        return squared + output.quantizer.loss, metrics

    # --- the official layout -----------------------------------------------------------------------------

    def to_official(self) -> dict[str, Tensor]:
        """The official state dict (an official file has it under "vae")."""
        state = {_wrap(_KEYS.to_official(name)): value for name, value in self.state_dict().items()}
        # Powers of two; the last of 64 overflows, as it does in the published file.
        mask = torch.tensor([1 << bit for bit in reversed(range(min(self.config.quantizer.bits, 63)))])
        if self.config.quantizer.bits > 63:
            mask = torch.cat((torch.tensor([torch.iinfo(torch.int64).min]), mask))
        return state | {name: mask.clone() for name in _MASKS}

    @property
    def official_name(self) -> str:
        quantizer = self.config.quantizer
        if quantizer.patch == 1:
            return f"infinity_vae_d{quantizer.bits}.pth"
        return f"infinity_vae_d{quantizer.token_bits}_f{self.config.cell}_{quantizer.bits}_patchify.pth"

    def official_differences(self) -> list[str]:
        groups = self.config.autoencoder.norm_groups
        found = ['the state dict itself where its loader asks a file for "vae"']
        if groups not in (24, 32):
            found.append(f"norms of {groups} groups, where it has 32 or 24")
        if self.config.autoencoder.attention:
            found.append("attention in the autoencoder, where it has none")
        return found

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[BitwiseVQConfig, dict[str, Tensor]]:
        state = _find(content)
        return config_from_official(state, **overrides), state

    @classmethod
    def from_official(cls, content: Mapping[str, Any], **overrides: Any) -> BitwiseVQ:
        """Build from an official file's content; sizes are read from its keys and shapes.

        Args:
            overrides: what a file cannot tell: ``schedule``, ``patch`` (None: 2 at stride 8, else 1), ``halvings``,
                ``norm_groups``.

        Raises:
            CheckpointError: the content is not such a tokenizer.
        """
        config, state = cls.read_official(content, **overrides)
        with weightless():
            model = cls(config)
        own = {_KEYS.from_official(name): value for name, value in state.items()}
        assign(model, own, "the bitwise tokenizer")
        return model.eval()


_NESTED = (("vae",), ("trainer", "vae_local"), ("state_dict",), ("model",))
_MASKS = ("quantizer.lfq.mask", "quantize.lfq.mask")
_KEYS = KeyMap(autoencoder_rules())


def _wrap(name: str) -> str:
    """Official files wrap every convolution and norm once more."""
    layer, leaf = name.rsplit(".", 1)
    return f"{layer}.{'norm' if 'norm' in layer.rsplit('.', 1)[-1] else 'conv'}.{leaf}"


def _unwrap(name: str) -> str:
    *path, layer, wrapper, leaf = ["", "", *name.split(".")]
    wrapped = wrapper == "norm" or (wrapper == "conv" and layer not in ("downsample", "upsample"))
    return ".".join([*path, layer, *([] if wrapped else [wrapper]), leaf]).lstrip(".")


def _find(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The flat state dict, every layer by one name whether it is wrapped in the file or not, without bit masks."""
    for key in ("encoder.conv_in.conv.weight", "encoder.conv_in.weight"):
        try:
            state = find_state_dict(content, _NESTED, key)
        except CheckpointError as error:
            problem = error
            continue
        return {_unwrap(name): value for name, value in state.items() if name not in _MASKS}
    raise problem


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is this tokenizer, in the official layout.

    A transformer's training file that keeps its tokenizer beside it is none.
    """
    try:
        state = find_state_dict(content, (("vae",), ("state_dict",), ("model",)), "encoder.conv_in.conv.weight")
    except CheckpointError:
        return False
    return "encoder.down.0.block.0.norm1.norm.weight" in state


def config_from_official(state: Mapping[str, Tensor], **overrides: Any) -> BitwiseVQConfig:
    """The configuration that an official state dict's keys and shapes imply.

    Args:
        state: as read by :meth:`BitwiseVQ.read_official`.

    Raises:
        CheckpointError: an entry that sizes are read from is missing.
    """
    try:
        levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
        blocks = 1 + max(int(key.split(".")[4]) for key in state if key.startswith("encoder.down.0.block."))
        channels, image_channels = state["encoder.conv_in.weight"].shape[:2]
        widths = [state[f"encoder.down.{i}.block.{blocks - 1}.conv2.weight"].shape[0] for i in range(levels)]
        bits = state["encoder.conv_out.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"the state dict lacks an entry of the bitwise tokenizer: {error}") from None
    halvings = overrides.get("halvings")
    if halvings is None:
        halvings = sum(f"encoder.down.{level}.downsample.conv.weight" in state for level in range(levels))
    autoencoder = AutoencoderConfig(
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=blocks,
        latent_channels=bits,
        image_channels=image_channels,
        attention="encoder.mid.attn_1.qkv.weight" in state,
        norm_groups=overrides.get("norm_groups") or (32 if all(width % 32 == 0 for width in widths) else 24),
    )
    patch = overrides.get("patch") or (2 if 2**halvings == TOKEN_STRIDE // 2 else 1)
    return BitwiseVQConfig(
        autoencoder,
        BitwiseQuantizerConfig(bits, patch),
        ScaleSchedule.parse(overrides.get("schedule") or SCHEDULE_1M),
        None if halvings == levels - 1 else halvings,
    )
