"""Training FlexVAR's tokenizer: maps of drawn sizes are decoded, each beside the image at that size.

Jiao et al. 2025 (arXiv 2502.20313, section 3.2) decode every scale and apply LlamaGen's losses to each; they publish no
code for it. Here each step decodes the finest scale and a few drawn ones: a coarse map has few cells, but the decoder's
time for all of them would exceed that for the image.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Batch, Metrics, Trainer
from nextscale.tasks.data import Examples, Load, tokenizer_of
from nextscale.tasks.tokenizers.flex_vq import (
    LLAMAGEN,
    FlexOutput,
    FlexQuantizerConfig,
    FlexVQ,
    FlexVQConfig,
    reduced,
)
from nextscale.tasks.tokenizers.recipe import TokenizerRecipe, example_images, take_autoencoder
from nextscale.tasks.tokenizers.training import TokenizerLossConfig, TokenizerTraining


class FlexTokenizerTraining(TokenizerTraining):
    """Trains a :class:`FlexVQ`; a batch holds ``image``, (batch, 3, height, width) in [-1, 1].

    Args:
        drawn: how many scales are decoded at each step beside the finest.
        coarse: weight of those scales' mean beside the finest scale's terms.
        seed: (seed, step) decides which are drawn, alike on all processes and after an interruption.
    """

    def __init__(
        self, tokenizer: FlexVQ, config: TokenizerLossConfig, *, drawn: int = 2, coarse: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__(tokenizer, config)
        self.drawn, self.coarse, self.seed = drawn, coarse, seed
        # Below this side an image has no structure to compare: the window of SSIM, or VGG's four halvings.
        self._smallest = 7 if config.lpips_weights is None else 16

    def _usage_rows(self) -> int:
        return 1  # the scales of a step are drawn, so their codes are counted together

    def scales(self, step: int) -> ScaleSchedule:
        """The scales that are decoded at a step, coarse to fine."""
        schedule = self.tokenizer.config.schedule
        coarse = range(len(schedule) - 1)
        chosen = sorted(random.Random(f"{self.seed} {step}").sample(coarse, min(self.drawn, len(coarse))))
        return ScaleSchedule((*(schedule[index] for index in chosen), schedule.final))

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        if phase == "discriminator":
            return super().loss(phase, module, batch, step)
        images = batch["image"]
        output: FlexOutput = module(images, self.scales(step))
        predictions = [made.float() for made in output.reconstructions]
        terms, metrics = self._reconstruction(predictions[-1], images)
        if len(predictions) > 1:
            parts = [self._reconstruction(made, reduced(images, made)) for made in predictions[:-1]]
            terms = terms + self.coarse * torch.stack([part for part, _ in parts]).mean()
            metrics["psnr_coarse"] = torch.stack([torch.as_tensor(each["psnr"]) for _, each in parts]).mean()
        self._record([torch.cat(output.quantizer.tokens, dim=1)], output.quantizer.cells)
        return self._complete(batch, step, predictions[-1], terms, output.quantizer.loss, metrics)

    def _perceives(self, images: Tensor) -> bool:
        return super()._perceives(images) and min(images.shape[-2:]) >= self._smallest


@dataclass(frozen=True)
class FlexTokenizerRecipe(TokenizerRecipe):
    """Train FlexVAR's tokenizer on images.

    Attributes:
        scales: the grids that may be drawn, such as 3 or 3x4, and last the one that is the image.
        init: tokenizer or whole model to start from. Of FlexVAR's, all is taken, sizes too; of another, the weights
            of autoencoder parts that have the same names and shapes here.
        drawn: how many scales are decoded at each step beside the finest.
        coarse: weight of those scales' mean beside the finest scale's terms.
    """

    scales: str = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16"
    autoencoder: AutoencoderConfig = LLAMAGEN
    quantizer: FlexQuantizerConfig = field(default_factory=FlexQuantizerConfig)  # type: ignore[assignment]
    drawn: int = 2
    coarse: float = 1.0

    def __post_init__(self) -> None:
        if self.drawn < 0:
            raise ValueError(f"drawn is {self.drawn}; expected 0 or more")

    def start(self, schedule: ScaleSchedule, load: Load) -> FlexVQ:
        source = None if self.init is None else tokenizer_of(load(self.init))
        if isinstance(source, FlexVQ):
            source.config = replace(source.config, schedule=schedule)
            return source
        tokenizer = FlexVQ(FlexVQConfig(self.autoencoder, self.quantizer, schedule=schedule))
        if source is not None:
            take_autoencoder(tokenizer, source, str(self.init))
        return tokenizer

    def task(self, tokenizer: Any) -> FlexTokenizerTraining:
        return FlexTokenizerTraining(
            tokenizer, self.loss, drawn=self.drawn, coarse=self.coarse, seed=self.training.seed
        )

    def examples(self, run: Trainer) -> Examples:
        """Originals over the reconstructions from four of the scales, all enlarged to one size."""
        assert isinstance(run.task, TokenizerTraining)
        tokenizer, schedule = run.task.tokenizer, run.task.tokenizer.config.schedule
        images = example_images(self.data, self.training.seed).to(next(tokenizer.parameters()).device)
        maps = tokenizer.quantizer.decode(tokenizer.encode(images), schedule)
        rows = [("images", list((images.cpu() + 1) / 2))]
        with torch.no_grad():
            for index in sorted({(len(schedule) - 1) * part // 3 for part in range(4)}):
                pictures = (tokenizer.decode_features(maps[index]).cpu() + 1) / 2
                rows.append((str(schedule[index]), list(F.interpolate(pictures, size=images.shape[-2:]))))
        return Examples(rows)
