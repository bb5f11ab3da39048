"""Training a KL autoencoder: reconstruction, and a little pull of latents towards the standard normal distribution.

Rombach et al. 2022 (arXiv 2112.10752, section 3.1 and appendix G): a perceptual and an adversarial term beside the
error, and the divergence with a weight of 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Batch, Metrics, Trainer
from nextscale.tasks.data import Load, tokenizer_of
from nextscale.tasks.tokenizers.kl_autoencoder import KL16, KLAutoencoder, KLConfig, KLOutput
from nextscale.tasks.tokenizers.recipe import AutoencoderRecipe, take_autoencoder
from nextscale.tasks.tokenizers.training import ReconstructionLossConfig, ReconstructionTraining


@dataclass(frozen=True)
class KLLossConfig(ReconstructionLossConfig):
    """Attributes:

    divergence: weight of the divergence, in nats per number of the image.
    """

    absolute: float = 1.0
    squared: float = 0.0
    divergence: float = 1e-6


class KLTraining(ReconstructionTraining):
    """Trains a :class:`KLAutoencoder`; a batch holds ``image``, (batch, 3, height, width) in [-1, 1].

    Logged beside the terms: ``spread``, the standard deviation of all latents drawn in a batch, and ``divergence``, in
    nats per image.
    """

    name = "kl"

    def _tokenizer_loss(self, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        images, output = batch["image"], module(batch["image"])
        assert isinstance(output, KLOutput)
        prediction, posterior = output.reconstruction.float(), output.posterior
        reconstruction, metrics = self._reconstruction(prediction, images)
        divergence = posterior.divergence().mean()
        spread = (posterior.mean.var() + posterior.log_variance.exp().mean()).sqrt()
        metrics = {**metrics, "divergence": divergence.detach(), "spread": spread.detach()}
        rest = self.config.divergence * divergence / images[0].numel()
        return self._sum(batch, step, prediction, reconstruction, rest, metrics)


@dataclass(frozen=True)
class KLRecipe(AutoencoderRecipe):
    """Train a KL autoencoder on images.

    The finished one's ``latent_scale`` makes its latents vary by 1, measured on images of the training data.

    Attributes:
        scales: of the models to be trained on it; the last times the autoencoder's stride is the image size.
        autoencoder: sizes; ``latent_channels`` are those of a latent.
        decoder_attention: levels of the decoder with attention after each block.
        init: tokenizer to start from. Of a KL autoencoder, all is taken, sizes too; of another kind, the weights of
            autoencoder parts that have the same names and shapes here.
    """

    scales: str = "1 2 4 8 16"
    autoencoder: AutoencoderConfig = KL16
    decoder_attention: list[int] = field(default_factory=list)
    loss: KLLossConfig = field(default_factory=KLLossConfig)

    def start(self, schedule: ScaleSchedule, load: Load) -> KLAutoencoder:
        source = None if self.init is None else tokenizer_of(load(self.init))
        if isinstance(source, KLAutoencoder):
            source.config = replace(source.config, schedule=schedule)
            return source
        tokenizer = KLAutoencoder(KLConfig(self.autoencoder, tuple(self.decoder_attention), schedule=schedule))
        if source is not None:
            take_autoencoder(tokenizer, source, str(self.init))
        return tokenizer

    def task(self, tokenizer: Any) -> KLTraining:
        return KLTraining(tokenizer, self.loss)

    def finished(self, run: Trainer) -> KLAutoencoder:
        tokenizer: KLAutoencoder = super().finished(run)
        if not self.decoder_only:  # else models are trained on these latents already
            tokenizer.config = replace(tokenizer.config, latent_scale=1 / self._spread(tokenizer))
        return tokenizer

    @torch.no_grad()
    def _spread(self, tokenizer: KLAutoencoder, images: int = 2048, batch: int = 64) -> float:
        """Standard deviation of latents drawn of training images, about zero."""
        dataset = self.data.training_images(self.training.seed, labels=False)
        device, count = next(tokenizer.parameters()).device, min(images, len(dataset))
        squares = []
        for start in range(0, count, batch):
            pictures = dataset.fetch(range(start, min(start + batch, count)))["image"]
            posterior = tokenizer.posterior(pictures.to(device))
            squares.append((posterior.mean.square() + posterior.log_variance.exp()).flatten(1).mean(1))
        return float(torch.cat(squares).mean().sqrt())
