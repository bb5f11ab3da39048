"""The configuration of a tokenizer's training run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.core.autoencoder import AutoencoderConfig, lay_out_channels_last
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Hooks, Metrics, Trainer, TrainingConfig
from nextscale.datasets.images import ImageDataset
from nextscale.tasks.data import Examples, ImageData, Load, tokenizer_of, trainer
from nextscale.tasks.tokenizers.image_tokenizer import ImageTokenizer
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig
from nextscale.tasks.tokenizers.training import ReconstructionTraining, TokenizerLossConfig, TokenizerTraining


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Train a tokenizer of any kind on images.

    Attributes:
        scales: sides of the token maps, coarse to fine; the last times the autoencoder's stride is the image size.
        init: tokenizer to start from (a file or folder); its sizes then replace those given.
        decoder_only: train what follows the tokens; these stay as they are, and so do the transformers
            trained on them. With ``init``.
    """

    data: ImageData
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output="runs/tokenizer", epochs=20))
    scales: str = "1 2 3 4 5 6 8 10 13 16"
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    init: str | None = None
    decoder_only: bool = False

    # --- what a kind of tokenizer says -------------------------------------------------------------------

    def start(self, schedule: ScaleSchedule, load: Load) -> Any:
        """The tokenizer before training, new or from ``init``, with the scales of the run."""
        raise NotImplementedError

    def task(self, tokenizer: Any) -> ReconstructionTraining:
        """How it is trained."""
        raise NotImplementedError

    def finished(self, run: Trainer) -> Any:
        """The tokenizer to save, of the trained one."""
        assert isinstance(run.task, ReconstructionTraining)
        return run.task.tokenizer

    # --- the run -----------------------------------------------------------------------------------------

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the data."""
        return self.data.size, self.data.size

    def build(self, load: Load) -> Any:
        """The tokenizer to train: new, or from ``init``.

        Raises:
            ValueError: the scales do not end at the image size.
        """
        schedule = ScaleSchedule.parse(self.scales)
        tokenizer = self.start(schedule, load)
        made, given = tokenizer.image_size(), self.image_size
        if made != given:
            fitting = (given[0] / tokenizer.stride, given[1] / tokenizer.stride)
            raise ValueError(
                f"the scales '{schedule}' with stride {tokenizer.stride} stand for images of {_sides(made)} pixels, "
                f"the data has {_sides(given)}: the last scale must be {_sides(fitting)}"
            )
        if self.decoder_only:
            if self.init is None:
                raise ValueError("decoder_only keeps the codes of a trained tokenizer: give init")
            for part in (tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantizer):
                part.requires_grad_(False)
        lay_out_channels_last(tokenizer)
        return tokenizer

    def trainer(self, load: Load, hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start; validation is added to ``hooks`` where there are held-out images.

        Args:
            load: reads a model, given its file or folder.
        """
        torch.manual_seed(self.training.seed)
        hooks, tokenizer = hooks or Hooks(), self.build(load)
        held_out = self.data.open_validation(labels=False)
        if held_out is not None and hooks.validate is None:
            hooks.validate = lambda step: validate(tokenizer, held_out)
        dataset = self.data.training_images(self.training.seed, labels=False)
        return trainer(self.training, self.task(tokenizer), dataset, hooks)

    def examples(self, run: Trainer) -> Examples:
        """Originals over their reconstructions from the first scale, half of the scales, and all."""
        assert isinstance(run.task, ReconstructionTraining)
        tokenizer, schedule = run.task.tokenizer, run.task.tokenizer.config.schedule
        images = example_images(self.data, self.training.seed).to(next(tokenizer.parameters()).device)
        with torch.no_grad():
            totals = tokenizer.quantizer.decode(tokenizer.encode(images), schedule)
            stages = sorted({0, len(schedule) // 2, len(schedule) - 1})
            pictures = [(tokenizer.decode_features(totals[stage]).cpu() + 1) / 2 for stage in stages]
        rows = [("images", list((images.cpu() + 1) / 2))]
        return Examples(
            rows + [(f"{stage + 1} scales", list(part)) for stage, part in zip(stages, pictures, strict=True)]
        )

    def finish(self, run: Trainer) -> Path:
        """Write the trained (averaged) tokenizer; returns its folder."""
        with run.averaged():
            return Path(self.finished(run).save(Path(self.training.output) / "model"))


@dataclass(frozen=True)
class TokenizerRecipe(AutoencoderRecipe):
    """Train a multi-scale tokenizer on images.

    Attributes:
        init: tokenizer to start from (a file or folder); its sizes then replace ``autoencoder`` and ``quantizer``.
        autoencoder_init: tokenizer whose encoder and decoder are started from, with new codes, as for other scales.
    """

    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    autoencoder_init: str | None = None

    def start(self, schedule: ScaleSchedule, load: Load) -> Any:
        if self.init is not None and self.autoencoder_init is not None:
            raise ValueError("give init, for a whole tokenizer, or autoencoder_init, for all of it but its codes")
        if self.init is None:
            tokenizer = ResidualVQ(ResidualVQConfig(self.autoencoder, self.quantizer, schedule))
            if self.autoencoder_init is not None:
                source = tokenizer_of(load(self.autoencoder_init))
                take_autoencoder(tokenizer, source, self.autoencoder_init, convolutions=True)
            return tokenizer
        # Inside a whole model it is frozen, and a file may hold it in half precision.
        tokenizer = tokenizer_of(load(self.init)).float().requires_grad_(True)
        tokenizer.config = replace(tokenizer.config, schedule=schedule)
        return tokenizer

    def task(self, tokenizer: Any) -> TokenizerTraining:
        return TokenizerTraining(tokenizer, self.loss)


def take_autoencoder(tokenizer: nn.Module, source: nn.Module, name: str, convolutions: bool = False) -> None:
    """Start from another kind of tokenizer: its encoder's and decoder's weights, where names and shapes agree.

    Args:
        name: of the source, for the error.
        convolutions: take those before and after the quantiser too, where both work on the same latents.

    Raises:
        ValueError: none agrees.
    """
    own = tokenizer.state_dict()
    parts = ("encoder.", "decoder.", *(("quant_conv.", "post_quant_conv.") if convolutions else ()))
    fitting = {
        key: value
        for key, value in source.state_dict().items()
        if key.startswith(parts) and key in own and own[key].shape == value.shape
    }
    if not fitting:
        raise ValueError(
            f"no weight of the autoencoder in {name} has the shape it needs here: give its sizes as autoencoder"
        )
    tokenizer.load_state_dict(fitting, strict=False)


def _sides(size: tuple[float, float]) -> str:
    """``8`` of a square, else ``6 x 8``."""
    return f"{size[0]:g}" if size[0] == size[1] else f"{size[0]:g} x {size[1]:g}"


def example_images(data: ImageData, seed: int, count: int = 8) -> Tensor:
    """Images to show a tokenizer's reconstructions of, spread over the held-out set, (count, 3, height, width)."""
    dataset = data.open_validation(labels=False) or data.training_images(seed, labels=False)
    places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=torch.float64).round().long()
    return dataset.fetch(places.tolist())["image"]


@torch.no_grad()
def validate(tokenizer: ImageTokenizer, dataset: ImageDataset, images: int = 2000, batch: int = 64) -> Metrics:
    """PSNR in dB on held-out images, of all scales and of each prefix of the pyramid."""
    total, count = torch.zeros(()), 0
    limit = min(images, len(dataset))
    device = next(tokenizer.parameters()).device
    for start in range(0, limit, batch):
        pictures = dataset.fetch(range(start, min(start + batch, limit)))["image"].to(device)
        rebuilt = tokenizer.decode(tokenizer.encode(pictures))
        error = (rebuilt - pictures).square().mean((1, 2, 3)).clamp(min=1e-10)
        total += (10 * torch.log10(4 / error)).sum().cpu()
        count += len(pictures)
    return {"psnr": float(total) / count}
