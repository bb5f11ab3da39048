"""Training VarFormer: both stages of the official recipe.

Official code siywang541/Varformer, ``varformer_idx_model.py``. First the prior learns to reproduce images, without a
restoration network; then that network learns with it. The tokens to be met are those of the clean image, the logits
those of the greedy roll-out on the degraded one: nothing is teacher-forced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.training import Batch, Metrics, TrainingTask
from nextscale.tasks.restoration.varformer import SYSTEM, VarFormer, VarFormerOutput
from nextscale.tasks.restoration.varformer_perceptual import VGG19Features


@dataclass(frozen=True)
class VarFormerLossConfig:
    """Weights of the terms; the defaults are the second stage's, the first has no ``psnr``.

    Attributes:
        l1: mean absolute error, images in [-1, 1].
        psnr: (10 / ln 10) ln(mean squared error + 1e-8), mean over images: minus PSNR but for a constant.
        perceptual: mean absolute error of VGG-19's features after relu5_4; needs ``vgg_weights``, and is left out where
            they are not given.
        feature: mean squared error between the latents of the clean image's tokens and the degraded one's, whose
            gradient reaches the latent enhancement.
        cross_entropy: of the roll-out's logits, against the clean image's tokens.
        vgg_weights: a file of torchvision's VGG-19.
    """

    l1: float = 1.0
    psnr: float = 0.5
    perceptual: float = 1.0
    feature: float = 0.5
    cross_entropy: float = 0.1
    vgg_weights: str | None = None


class VarFormerTraining(TrainingTask):
    """Trains a :class:`VarFormer`; a batch holds ``degraded`` and ``clean``, (batch, 3, side, side) in [-1, 1]."""

    name = SYSTEM

    def __init__(self, model: VarFormer, config: VarFormerLossConfig | None = None) -> None:
        self.model, self.config = model, config or VarFormerLossConfig()
        self.phases: dict[str, nn.Module] = {self.name: model}
        weights = self.config.vgg_weights
        self._perceptual = VGG19Features.from_file(weights) if weights and self.config.perceptual else None

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        output: VarFormerOutput = module(batch["degraded"])
        terms = self.terms(output, batch["clean"])
        squared = (output.pixels.detach() - batch["clean"]).square().mean((1, 2, 3))
        metrics: Metrics = {name: term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum(), metrics | {"quality": (10 * torch.log10(4 / squared)).mean()}

    def terms(self, output: VarFormerOutput, clean: Float[Tensor, "batch 3 side side"]) -> dict[str, Float[Tensor, ""]]:
        """The weighted terms of the loss; those of weight 0 are left out."""
        config, pixels = self.config, output.pixels
        terms: dict[str, Tensor] = {}
        if config.l1:
            terms["l1"] = F.l1_loss(pixels, clean)
        if config.psnr:
            squared = (pixels - clean).square().mean((1, 2, 3))
            terms["psnr"] = 10 / math.log(10) * (squared + 1e-8).log().mean()
        if self._perceptual is not None:
            terms["perceptual"] = self._perceptual(pixels, clean)
        if output.degraded is not None and output.roll_out is not None and (config.feature or config.cross_entropy):
            with torch.no_grad():
                target = self.model.read(clean, enhance=False)
            if config.feature:
                terms["feature"] = F.mse_loss(output.degraded.latent, target.latent.detach())
            if config.cross_entropy:
                terms["cross_entropy"] = F.cross_entropy(output.roll_out.logits.mT, target.tokens)
        return {name: getattr(config, name) * term for name, term in terms.items()}

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Metrics:
        """PSNR in dB of the restored and the degraded images, 8-bit values, and the loss's terms."""
        output = self.model(batch["degraded"])
        metrics: dict[str, Any] = dict(self.terms(output, batch["clean"]))
        for name, images in (("psnr_restored", output.pixels), ("psnr_degraded", batch["degraded"])):
            rounded = ((images + 1) * 127.5).round() / 127.5 - 1
            squared = (rounded - batch["clean"]).square().mean((1, 2, 3)).clamp(min=1e-10)
            metrics[name] = (10 * torch.log10(4 / squared)).mean()
        return metrics


def trainable(model: VarFormer, stage: int) -> Mapping[str, nn.Parameter]:
    """The parameters that a stage trains, by name: in the second those of the restoration network too."""
    chosen = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if stage == 1:
        return {name: p for name, p in chosen.items() if not name.startswith(("encoder.", "decoder."))}
    return chosen
