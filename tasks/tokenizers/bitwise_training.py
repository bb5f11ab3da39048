"""Training Infinity's tokenizer: reconstruction, commitment and the entropy of bits.

The official repository has no code for it; terms and weights are those its configuration names (arXiv 2412.04431,
section 3.2; Zhao et al. 2024, arXiv 2406.07548, section 3.3). The released "reg" tokenizers were trained to look right
from their early scales too, which ``early`` does here: at each step a drawn beginning of the pyramid is decoded beside
all of it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Batch, Metrics
from nextscale.tasks.data import Load, tokenizer_of
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig
from nextscale.tasks.tokenizers.bitwise_vq import AUTOENCODER, BitwiseOutput, BitwiseVQ, BitwiseVQConfig
from nextscale.tasks.tokenizers.recipe import TokenizerRecipe, take_autoencoder
from nextscale.tasks.tokenizers.training import TokenizerLossConfig, TokenizerTraining


class BitwiseTokenizerTraining(TokenizerTraining):
    """Trains a :class:`BitwiseVQ`; a batch holds ``image``, (batch, 3, height, width) in [-1, 1].

    The usage that is logged is the share of bit values that come up: below 1, some bit has stopped to tell anything.

    Args:
        early: weight of the reconstruction from a drawn beginning of the pyramid; 0: none.
        seed: (seed, step) decides which, alike on all processes and after an interruption.
    """

    def __init__(self, tokenizer: BitwiseVQ, config: TokenizerLossConfig, *, early: float = 0.0, seed: int = 0) -> None:
        super().__init__(tokenizer, config)
        self.early, self.seed = early, seed

    def early_scales(self, step: int) -> int | None:
        """How many scales are decoded beside all of them."""
        scales = len(self.tokenizer.config.schedule)
        if not self.early or scales == 1:
            return None
        return random.Random(f"{self.seed} {step}").randrange(1, scales)

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        if phase == "discriminator":
            return super().loss(phase, module, batch, step)
        images = batch["image"]
        output: BitwiseOutput = module(images, None, self.early_scales(step))
        prediction = output.reconstruction.float()
        terms, metrics = self._reconstruction(prediction, images)
        if output.early is not None:
            early, early_metrics = self._reconstruction(output.early.float(), images)
            terms = terms + self.early * early
            metrics["psnr_early"] = early_metrics["psnr"]
        self._record(output.quantizer.tokens, output.quantizer.rests)
        return self._complete(batch, step, prediction, terms, output.quantizer.loss, metrics)

    @torch.no_grad()
    def after_step(self, step: int) -> Metrics:
        """Log the share of bit values in use, per scale."""
        if step % 10:
            return {}
        used = self._in_use()
        metrics: Metrics = {f"usage/scale{k}": share for k, share in enumerate(used.float().mean(1).tolist())}
        metrics["usage/all"] = float(used.any(0).float().mean())
        return metrics


@dataclass(frozen=True)
class BitwiseTokenizerRecipe(TokenizerRecipe):
    """Train Infinity's tokenizer on images.

    Attributes:
        scales: token maps, coarse to fine; the last times the stride (and the quantiser's patch) is the image size.
        autoencoder: its latent channels are the quantiser's bits, whatever is named here.
        init: tokenizer to start from. Of Infinity's, all is taken, sizes too; of another, the weights of autoencoder
            parts that have the same names and shapes here.
        early: weight of the reconstruction from a drawn beginning of the pyramid; 0: none.
    """

    scales: str = "1 2 4 6 8 12 16"
    autoencoder: AutoencoderConfig = AUTOENCODER
    quantizer: BitwiseQuantizerConfig = field(default_factory=BitwiseQuantizerConfig)  # type: ignore[assignment]
    loss: TokenizerLossConfig = field(default_factory=lambda: TokenizerLossConfig(absolute=4.0, squared=0.0))
    early: float = 0.0

    def __post_init__(self) -> None:
        if self.early < 0:
            raise ValueError(f"early is {self.early}; expected 0 or more")

    def start(self, schedule: ScaleSchedule, load: Load) -> BitwiseVQ:
        source = None if self.init is None else tokenizer_of(load(self.init))
        if isinstance(source, BitwiseVQ):
            source.config = replace(source.config, schedule=schedule)
            return source
        autoencoder = replace(self.autoencoder, latent_channels=self.quantizer.bits)
        tokenizer = BitwiseVQ(BitwiseVQConfig(autoencoder, self.quantizer, schedule))
        if source is not None:
            take_autoencoder(tokenizer, source, str(self.init))
        return tokenizer

    def task(self, tokenizer: Any) -> BitwiseTokenizerTraining:
        return BitwiseTokenizerTraining(tokenizer, self.loss, early=self.early, seed=self.training.seed)
