"""Training a tokenizer on images: how close its reconstructions come, and for codebooks, how they are used.

VAR's tokenizer loss as the paper states it (arXiv 2404.02905, equation 5): reconstruction, quantisation, a
perceptual and an adversarial term. The official repository has no code for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.processes import mean_over_processes, rows_of_processes
from nextscale.core.random import step_draws
from nextscale.core.training import Batch, Metrics, TrainingTask
from nextscale.tasks.tokenizers.discriminator import PatchDiscriminator
from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer
from nextscale.tasks.tokenizers.residual_vq import TokenizerOutput


@dataclass(frozen=True)
class ReconstructionLossConfig:
    """Weights of the terms.

    Attributes:
        absolute, squared: of mean |x - y| and mean (x - y)^2, images in [-1, 1].
        perceptual: of the perceptual term: LPIPS where ``lpips_weights`` and ``vgg_weights`` name files,
            else the stated substitute 1 - SSIM, averaged over the image at full, half and quarter size.
        adversarial: of the hinge term of a patch discriminator, balanced against the reconstruction by the
            ratio of their gradients at the decoder's last layer (Esser et al. 2021); 0: no discriminator.
        adversarial_start: step from which the discriminator takes part.
        discriminator_channels, discriminator_levels: its width, and its strided convolutions after the first:
            3 for 256 pixels, fewer for small images.
    """

    absolute: float = 0.0
    squared: float = 1.0
    perceptual: float = 1.0
    vgg_weights: str | None = None
    lpips_weights: str | None = None
    adversarial: float = 0.0
    adversarial_start: int = 10_000
    discriminator_channels: int = 64
    discriminator_levels: int = 3


@dataclass(frozen=True)
class TokenizerLossConfig(ReconstructionLossConfig):
    """Attributes:

    quantizer: weight of the codebook and commitment terms.
    dead_after: a code that no cell has used for about so many steps is moved onto what is badly explained.
    """

    quantizer: float = 1.0
    dead_after: int = 200


def structural_loss(
    prediction: Float[Tensor, "batch 3 height width"], target: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, ""]:
    """1 - SSIM, mean over the image at full, half and quarter size (those of at least 7 pixels a side)."""
    from kornia.metrics import ssim

    prediction, target = (prediction.float() + 1) / 2, (target.float() + 1) / 2
    terms = []
    for _ in range(3):
        if min(prediction.shape[-2:]) < 7:
            break
        terms.append(1 - ssim(prediction, target, window_size=7).mean())
        prediction, target = F.avg_pool2d(prediction, 2), F.avg_pool2d(target, 2)
    if not terms:
        raise ValueError(f"images of {tuple(target.shape[-2:])} pixels are too small for SSIM: set perceptual to 0")
    return torch.stack(terms).mean()


class ReconstructionTraining(TrainingTask):
    """Trains a tokenizer to rebuild images; a batch holds ``image``, (batch, 3, height, width) in [-1, 1]."""

    name = "tokenizer"

    def __init__(self, tokenizer: ImageTokenizer, config: ReconstructionLossConfig) -> None:
        self.tokenizer: Any = tokenizer
        self.config: Any = config
        self.phases = {"tokenizer": tokenizer}
        patches = (config.discriminator_channels, config.discriminator_levels)
        self.discriminator = PatchDiscriminator(*patches) if config.adversarial else None
        if self.discriminator is not None:
            side = min(tokenizer.image_size())
            if side < self.discriminator.smallest_side:
                raise ValueError(
                    f"images of {side} pixels are too small for the discriminator, which needs "
                    f"{self.discriminator.smallest_side}: set adversarial to 0"
                )
            self.phases["discriminator"] = self.discriminator
        self._perceptual = perceptual_loss(config)

    def active(self, phase: str, step: int) -> bool:
        return phase == "tokenizer" or step >= self.config.adversarial_start

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        images = batch["image"]
        if phase == "discriminator":
            real, fake = module(torch.cat((images, batch["reconstruction"]))).chunk(2)
            loss = (F.relu(1 - real) + F.relu(1 + fake)).mean() / 2
            return loss, {"real": real.detach().mean(), "fake": fake.detach().mean()}
        return self._tokenizer_loss(module, batch, step)

    def _tokenizer_loss(self, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        """The loss of the tokenizer's turn; a subclass computes it of what its tokenizer gives."""
        raise NotImplementedError

    def _reconstruction(self, prediction: Tensor, images: Tensor) -> tuple[Tensor, Metrics]:
        """The terms that compare an image with what it should show."""
        absolute, squared = F.l1_loss(prediction, images), F.mse_loss(prediction, images)
        structural = absolute.new_zeros(())
        if self._perceives(images):
            structural = self._perceptual(prediction, images)
        loss = self.config.absolute * absolute + self.config.squared * squared + self.config.perceptual * structural
        return loss, {"psnr": (10 * torch.log10(4 / squared)).detach(), "perceptual": structural.detach()}

    def _perceives(self, images: Tensor) -> bool:
        """Whether the perceptual term takes part for images of this size."""
        return self.config.perceptual > 0

    def _sum(
        self, batch: Batch, step: int, prediction: Tensor, reconstruction: Tensor, rest: Tensor, metrics: Metrics
    ) -> tuple[Tensor, Metrics]:
        """The whole loss: with the discriminator's opinion, once it takes part.

        Args:
            rest: the weighted terms of what lies between encoder and decoder.
        """
        loss = reconstruction + rest
        if self.discriminator is not None and self.active("discriminator", step):
            adversarial, weight = self._adversarial(prediction, reconstruction)
            loss = loss + self.config.adversarial * weight * adversarial
            metrics |= {"adversarial": adversarial.detach(), "adversarial_weight": weight}
        batch["reconstruction"] = prediction.detach()  # for the discriminator's turn at the same micro-batch
        return loss, metrics

    def _adversarial(self, prediction: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)
        adversarial = -self.discriminator(prediction).mean()
        self.discriminator.requires_grad_(True)
        last = self.tokenizer.decoder.last_layer
        terms = (reconstruction, adversarial)
        found = (torch.autograd.grad(term, last, retain_graph=True)[0] for term in terms)
        wanted, given = (mean_over_processes(gradient).norm() for gradient in found)
        return adversarial, (wanted / (given + 1e-4)).clamp(max=1e4).detach()


class TokenizerTraining(ReconstructionTraining):
    """Trains a multi-scale tokenizer with a codebook."""

    def __init__(self, tokenizer: ImageTokenizer, config: TokenizerLossConfig) -> None:
        super().__init__(tokenizer, config)
        # Smoothed counts per scale and code: what share of the codebook is in use, and which codes are dead.
        self._usage = torch.zeros(self._usage_rows(), tokenizer.config.quantizer.vocabulary)
        self._rests: list[Tensor] = []

    def _usage_rows(self) -> int:
        return len(self.tokenizer.config.schedule)

    def _tokenizer_loss(self, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        output: TokenizerOutput = module(batch["image"])
        prediction = output.reconstruction.float()
        reconstruction, metrics = self._reconstruction(prediction, batch["image"])
        self._record(output.quantizer.tokens, output.quantizer.rests)
        return self._complete(batch, step, prediction, reconstruction, output.quantizer.loss, metrics)

    def _complete(
        self, batch: Batch, step: int, prediction: Tensor, reconstruction: Tensor, quantizer: Tensor, metrics: Metrics
    ) -> tuple[Tensor, Metrics]:
        """The whole loss, with the quantiser's terms."""
        rest, metrics = self.config.quantizer * quantizer, {**metrics, "quantizer": quantizer.detach()}
        return self._sum(batch, step, prediction, reconstruction, rest, metrics)

    # --- the codebook ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _record(self, tokens: Sequence[Tensor], rests: Sequence[Tensor]) -> None:
        """Count the codes of each scale, and keep what they were to explain."""
        codes = self._usage.shape[1]
        counts = torch.stack([torch.bincount(t.flatten(), minlength=codes) for t in tokens]).float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)  # every process must find the same codes dead
        self._usage = self._usage.to(counts.device).lerp(counts, 1 / max(self.config.dead_after, 1))
        self._rests = [rest.detach() for rest in rests]

    @torch.no_grad()
    def after_step(self, step: int) -> Metrics:
        """Log the share of codes in use per scale; now and then move dead codes onto present features."""
        if step % 10 == 0:
            used = self._in_use()
            metrics: Metrics = {f"usage/scale{k}": share for k, share in enumerate(used.float().mean(1).tolist())}
            metrics["usage/all"] = float(used.any(0).float().mean())
        else:
            metrics = {}
        interval = max(self.config.dead_after // 4, 1)
        trained = self.tokenizer.quantizer.codebook.weight.requires_grad
        if trained and step % interval == 0 and self._rests:
            metrics["usage/revived"] = float(self._revive(step))
        return metrics

    def _in_use(self) -> Tensor:
        """bool (scales, codes): drawn at least about once in ``dead_after`` steps."""
        return self._usage >= 0.5 / max(self.config.dead_after, 1)

    def _revive(self, step: int) -> int:
        """The same codes and features in every process, and on any number of them."""
        dead = (~self._in_use().any(0)).nonzero()[:, 0]
        rests = torch.cat([rows_of_processes(rest) for rest in self._rests])
        count, generator = min(len(dead), len(rests)), step_draws(step, "dead codes")
        if count == 0:
            return 0
        dead = dead[torch.randperm(len(dead), generator=generator)[:count].to(dead.device)]
        fresh = rests[torch.randint(len(rests), (count,), generator=generator).to(rests.device)]
        codebook = self.tokenizer.quantizer.codebook.weight
        codebook[dead] = fresh.to(codebook.dtype)
        self._usage[:, dead] = 1.0 / len(self._usage)
        return count

    def state_dict(self) -> dict[str, Any]:
        return {"usage": self._usage}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._usage = state["usage"].clone()


def perceptual_loss(config: ReconstructionLossConfig) -> Any:
    """What compares pictures as they are seen: LPIPS where its weights are given, else a structural distance.

    Raises:
        ValueError: one of LPIPS' two files is missing.
    """
    if config.vgg_weights is None and config.lpips_weights is None:
        return structural_loss
    if config.vgg_weights is None or config.lpips_weights is None:
        raise ValueError("LPIPS needs both vgg_weights and lpips_weights; give both files or neither")
    from nextscale.evaluation.lpips import LPIPS

    return LPIPS.from_files(config.vgg_weights, config.lpips_weights)
