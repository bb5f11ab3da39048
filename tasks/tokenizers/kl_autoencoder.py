"""The KL autoencoder: an image as a normal distribution over continuous latent maps.

Rombach et al. 2022 (arXiv 2112.10752, section 3.1), as MAR trained it for stride 16 (Li et al. 2024, arXiv 2406.11838;
official code and weights LTH14/mar, ``kl16.ckpt``). FlowAR's tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.autoencoder import AutoencoderConfig, Decoder, Encoder
from nextscale.core.checkpoint import CheckpointError, KeyMap, assign, find_state_dict, weightless
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.tokenizers.autoencoder_layout import fused, separated
from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer
from nextscale.tasks.tokenizers.kl_pyramid import LatentPyramid
from nextscale.tasks.tokenizers.residual_vq import autoencoder_rules

SYSTEM = "kl"
DOUBLING = ScaleSchedule.squares(1, 2, 4, 8, 16)
"""FlowAR's scales at 256 px."""
KL16 = AutoencoderConfig(channels=128, latent_channels=16)
LATENT_SCALE = 0.2325
"""What makes the latents of ``kl16.ckpt`` vary by about 1."""
LOG_VARIANCES = (-30.0, 20.0)


@dataclass(frozen=True)
class KLConfig:
    """The defaults are those of ``kl16.ckpt``.

    Attributes:
        autoencoder: sizes; ``latent_channels`` are those of a latent, of which the encoder gives means and variances.
        decoder_attention: levels of the decoder with attention after each block; empty: its middle alone has some.
        variational: False: the encoder gives means only, and every variance is e.
        latent_scale: by which latents are multiplied for the models that draw them.
        schedule: the scales used where none are given.
    """

    autoencoder: AutoencoderConfig = KL16
    decoder_attention: tuple[int, ...] = ()
    variational: bool = True
    latent_scale: float = LATENT_SCALE
    schedule: ScaleSchedule = DOUBLING

    def __post_init__(self) -> None:
        if not self.latent_scale > 0:
            raise ValueError(f"latent_scale is {self.latent_scale}; expected more than 0")

    @property
    def channels(self) -> int:
        """Numbers per cell of a latent."""
        return self.autoencoder.latent_channels

    @property
    def encoder(self) -> AutoencoderConfig:
        """Sizes of the encoder."""
        return replace(self.autoencoder, latent_channels=2 * self.channels)

    @property
    def decoder(self) -> AutoencoderConfig:
        """Sizes of the decoder."""
        return replace(self.autoencoder, level_attention=self.decoder_attention)


@dataclass(frozen=True, eq=False)
class Posterior:
    """Independent normal distributions of a latent's values, float32, not yet scaled.

    Attributes:
        mean: of each value.
        log_variance: within [-30, 20].
    """

    mean: Float[Tensor, "batch channels height width"]
    log_variance: Float[Tensor, "batch channels height width"]

    @classmethod
    def of(cls, moments: Float[Tensor, "batch twice_channels height width"]) -> Posterior:
        """From means and logarithms of variances, one after the other."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return cls(mean, log_variance.clamp(*LOG_VARIANCES))

    def sample(self, noise: Tensor | None = None) -> Float[Tensor, "batch channels height width"]:
        """mean + standard deviation times ``noise``, standard normal; drawn where it is not given."""
        return self.mean + (self.log_variance / 2).exp() * (torch.randn_like(self.mean) if noise is None else noise)

    def divergence(self) -> Float[Tensor, " batch"]:
        """From the standard normal distribution (Kullback-Leibler), in nats per image."""
        terms = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * terms.flatten(1).sum(1)


@dataclass
class KLOutput:
    """A training pass: the reconstruction from a drawn latent (not clamped), and the distribution it was drawn from."""

    reconstruction: Float[Tensor, "batch 3 height width"]
    posterior: Posterior


class KLAutoencoder(ImageTokenizer):
    """Image in [-1, 1] <-> pyramid of continuous latents; tokens are float32, (batch, length, channels)."""

    system = SYSTEM
    config_class = KLConfig
    config: KLConfig
    quantizer: LatentPyramid

    def __init__(self, config: KLConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or KLConfig()
        channels = config.channels
        self.encoder = Encoder(config.encoder)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels if config.variational else channels, 1)
        self.quantizer = LatentPyramid(channels)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.decoder = Decoder(config.decoder)

    def moments(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch twice_channels high wide"]:
        """Means and logarithms of variances, one after the other, of images in [-1, 1]."""
        found = super().features(images)
        return found if self.config.variational else torch.cat((found, torch.ones_like(found)), dim=1)

    def posterior(self, images: Float[Tensor, "batch 3 height width"]) -> Posterior:
        """What the encoder makes of images in [-1, 1]."""
        return Posterior.of(self.moments(images))

    def features(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch channels height/stride width/stride"]:
        """The likeliest latent, scaled, float32."""
        return self.posterior(images).mean * self.config.latent_scale

    def decode_features(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 3 height*stride width*stride"]:
        """The image of a scaled latent of any size, clamped to [-1, 1], float32."""
        return super().decode_features(features / self.config.latent_scale)

    # --- what is kept of images: distributions, so that latents can be drawn anew in every epoch ---------

    def stored_as(self) -> dict[str, Any]:
        return {"values": "float16"}

    def stored(
        self, images: Float[Tensor, "batch 3 height width"], schedule: ScaleSchedule | None = None
    ) -> Float[Tensor, "batch numbers"]:
        """:meth:`moments`, in one row per image."""
        return self.moments(images).flatten(1)

    def restored(self, rows: Float[Tensor, "batch numbers"], schedule: ScaleSchedule | None = None) -> Posterior:
        """The distribution that :meth:`stored` keeps."""
        return Posterior.of(
            rows.unflatten(1, (2 * self.config.channels, *(schedule or self.config.schedule).final.grid))
        )

    # --- training ----------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> KLOutput:
        """The training pass: a latent is drawn and decoded."""
        posterior = self.posterior(images)
        return KLOutput(self.decoder(self.post_quant_conv(posterior.sample())), posterior)

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """Squared error plus 1e-6 of the divergence for ``batch["image"]`` in [-1, 1], and what to log.

        :class:`nextscale.tasks.tokenizers.kl_training.KLTraining` has the other terms, and weights for all.
        """
        output = self(batch["image"])
        squared = F.mse_loss(output.reconstruction.float(), batch["image"])
        divergence = output.posterior.divergence().mean()
        metrics = {"squared": squared.detach(), "divergence": divergence.detach()}
        return squared + 1e-6 * divergence / batch["image"][0].numel(), metrics

    # --- the official layout -----------------------------------------------------------------------------

    official_name, official_entry = "kl16.ckpt", "model"

    def to_official(self) -> dict[str, Tensor]:
        """The official state dict, which files hold under ``official_entry``; loads strictly into the official code."""
        return {_KEYS.to_official(name): value for name, value in separated(self.state_dict())}

    def official_differences(self) -> list[str]:
        autoencoder = self.config.autoencoder
        found = []
        if autoencoder.norm_groups != 32:
            found.append(f"norms of {autoencoder.norm_groups} groups, where it has 32")
        if not autoencoder.attention:
            found.append("no attention in the middle of the autoencoder, where it has some")
        if not math.isclose(self.config.latent_scale, LATENT_SCALE):
            found.append(f"latents times {self.config.latent_scale:g}, where it has {LATENT_SCALE}")
        return found

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[KLConfig, dict[str, Tensor]]:
        found = find_state_dict(content, _NESTED, "quant_conv.weight")
        # Files of the latent-diffusion code hold the discriminator and the perceptual network of training too.
        state = {name: value for name, value in found.items() if name.startswith(_PARTS)}
        return config_from_official(state, **overrides), state

    @classmethod
    def from_official(cls, content: Mapping[str, Any], **overrides: Any) -> KLAutoencoder:
        """Build from an official file's content; sizes are read from its keys and shapes.

        Args:
            overrides: what a file cannot tell: ``schedule``, ``latent_scale``, ``norm_groups``.

        Raises:
            CheckpointError: the content is not such an autoencoder.
        """
        config, state = cls.read_official(content, **overrides)
        with weightless():
            model = cls(config)
        own = {_KEYS.from_official(name): value for name, value in fused(state)}
        assign(model, own, "the KL autoencoder")
        return model.eval()


_NESTED = (("model",), ("state_dict",))
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_KEYS = KeyMap(autoencoder_rules())


def is_official(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a KL autoencoder, in the official layout."""
    try:
        state = find_state_dict(content, _NESTED, "quant_conv.weight")
    except CheckpointError:
        return False
    needed = {"encoder.down.0.block.0.norm1.weight", "post_quant_conv.weight", "decoder.conv_in.weight"}
    return needed <= set(state) and not any(name.startswith("quantize.") for name in state)


def config_from_official(state: Mapping[str, Tensor], **overrides: Any) -> KLConfig:
    """The configuration that an official state dict's keys and shapes imply.

    Raises:
        CheckpointError: an entry that sizes are read from is missing.
    """
    try:
        levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
        blocks = 1 + max(int(key.split(".")[4]) for key in state if key.startswith("encoder.down.0.block."))
        base, image_channels = state["encoder.conv_in.weight"].shape[:2]
        widths = [state[f"encoder.down.{i}.block.{blocks - 1}.conv2.weight"].shape[0] for i in range(levels)]
        channels = state["post_quant_conv.weight"].shape[1]
        variational = state["quant_conv.weight"].shape[0] == 2 * channels
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"the state dict lacks an entry of the KL autoencoder: {error}") from None
    attention = "encoder.mid.attn_1.q.weight" in state
    encoder, decoder = (
        tuple(i for i in range(levels) if f"{part}.{i}.attn.0.q.weight" in state)
        for part in ("encoder.down", "decoder.up")
    )
    autoencoder = AutoencoderConfig(
        channels=base,
        multipliers=tuple(width // base for width in widths),
        blocks=blocks,
        latent_channels=channels,
        image_channels=image_channels,
        attention=attention,
        norm_groups=overrides.get("norm_groups") or 32,
        level_attention=None if encoder == ((levels - 1,) if attention else ()) else encoder,
    )
    scale = overrides.get("latent_scale") or LATENT_SCALE
    return KLConfig(
        autoencoder, decoder, variational, scale, ScaleSchedule.parse(overrides.get("schedule") or DOUBLING)
    )
