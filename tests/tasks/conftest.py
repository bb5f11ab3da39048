"""Models small enough to build in milliseconds, and folders of small images."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.tasks.generation.flexvar import FlexVAR, FlexVARConfig
from nextscale.tasks.generation.flexvar_training import initialize as initialize_flexvar
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.generation.var_training import initialize
from nextscale.tasks.tokenizers.flex_vq import FlexQuantizerConfig, FlexVQ, FlexVQConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

SCHEDULE = ScaleSchedule.squares(1, 2, 4)
# 32 channels: the group norms of official files have 32 groups.
AUTOENCODER = AutoencoderConfig(channels=32, multipliers=(1, 1), blocks=1, latent_channels=4)


def scattered(module: nn.Module, seed: int, std: float = 0.1) -> None:
    """Weights as a trained model's: none is zero or as it was made."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)


def build_tokenizer(
    *, seed: int = 0, schedule: ScaleSchedule = SCHEDULE, separate: bool = False, **quantizer: Any
) -> ResidualVQ:
    """8 x 8 images as the scales 1, 2 and 4, unless told otherwise."""
    torch.manual_seed(seed)
    codes = QuantizerConfig(**{"vocabulary": 16, "channels": 4, **quantizer})
    tokenizer = ResidualVQ(ResidualVQConfig(AUTOENCODER, codes, schedule, separate_smoothers=separate))
    nn.init.normal_(tokenizer.quantizer.codebook.weight)
    return tokenizer.eval()


def build_var(
    tokenizer: ResidualVQ | None = None, *, seed: int = 0, classes: int = 5, schedule: ScaleSchedule | None = None,
    class_names: tuple[str, ...] | None = None, **transformer: Any
) -> VAR:  # fmt: skip
    tokenizer = tokenizer or build_tokenizer()
    sizes = TransformerConfig(**{"width": 16, "depth": 2, "heads": 2, "drop_path": 0.1 * 2 / 24, **transformer})
    quantizer = tokenizer.config.quantizer
    config = VARConfig(
        sizes,
        classes,
        quantizer.vocabulary,
        quantizer.channels,
        schedule or tokenizer.config.schedule,
        class_names=class_names,
    )
    torch.manual_seed(seed)
    model = initialize(VAR(config, tokenizer), modulation=1, gate=1, head=1)
    for part in (model.transformer, model.head):
        scattered(part, seed)
    return model.eval()


def build_flex_tokenizer(*, seed: int = 0, attention: bool = False, **quantizer: Any) -> FlexVQ:
    """Stride 2: 8 x 8 images as maps of any size up to 4 x 4, and beyond."""
    torch.manual_seed(seed)
    codes = FlexQuantizerConfig(**{"vocabulary": 16, "channels": 4, **quantizer})
    sizes = AutoencoderConfig(channels=32, multipliers=(1, 2), blocks=1, latent_channels=8, attention=attention)
    return FlexVQ(FlexVQConfig(sizes, codes, schedule=ScaleSchedule.squares(1, 2, 3, 4))).eval()


def build_flexvar(tokenizer: FlexVQ | None = None, *, seed: int = 0, classes: int = 5, **options: Any) -> FlexVAR:
    tokenizer = tokenizer or build_flex_tokenizer()
    names = ("conditioning", "attention")
    transformer = {name: options.pop(name) for name in names if name in options}
    config = FlexVARConfig(
        TransformerConfig(width=16, depth=2, heads=2, **transformer),
        classes,
        tokenizer.config.quantizer.vocabulary,
        tokenizer.config.quantizer.channels,
        SCHEDULE,
        position_side=8,
        **options,
    )
    torch.manual_seed(seed)
    model = initialize_flexvar(FlexVAR(config, tokenizer), modulation=1, gate=1, head=1)
    for part in (model.transformer, model.head):
        scattered(part, seed)
    return model.eval()


def write_images(folder: Path, per_class: int = 4, side: int = 8, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Class folders of smooth pictures."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            coarse = rng.integers(0, 256, (2, 2, 3), np.uint8)
            Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The functions above, such as `tiny.tokenizer`, `tiny.var` and `tiny.images`."""
    return SimpleNamespace(
        tokenizer=build_tokenizer,
        var=build_var,
        flex_tokenizer=build_flex_tokenizer,
        flexvar=build_flexvar,
        images=write_images,
        scattered=scattered,
    )


@pytest.fixture(scope="session")
def tokenizer() -> ResidualVQ:
    return build_tokenizer()


@pytest.fixture(scope="session")
def var(tokenizer: ResidualVQ) -> VAR:
    return build_var(tokenizer, class_names=("tench, Tinca tinca", "red fox", "grey fox", "owl", "boat"))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache folder out of the tests."""
    monkeypatch.setenv("NEXTSCALE_CACHE", str(tmp_path_factory.mktemp("cache")))
