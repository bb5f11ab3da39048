"""A small model with random weights, in every form a model can come in."""

from types import SimpleNamespace

import pytest
import torch

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def small_model(depth: int = 1, width: int = 32) -> VAR:
    """Draws 16 x 16 pixels of 10 classes in 3 scales; the official layout can say all of it."""
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(channels=32, multipliers=(1, 1, 1), blocks=1, latent_channels=8)
    schedule = ScaleSchedule.squares(1, 2, 4)
    tokenizer = ResidualVQ(ResidualVQConfig(autoencoder, QuantizerConfig(vocabulary=32, channels=8), schedule))
    torch.nn.init.normal_(tokenizer.quantizer.codebook.weight)
    config = VARConfig(
        TransformerConfig(width, depth, 2),
        classes=10,
        vocabulary=32,
        code_channels=8,
        schedule=schedule,
        class_names=NAMES,
    )
    model = VAR(config, tokenizer)
    for name, parameter in model.named_parameters():
        if not name.startswith("tokenizer.") and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`model`; `folder`: saved by this library; `transformer`, `tokenizer`: official files, beside each other;
    `checkpoint`: of the official trainer, with both inside; `build`: :func:`small_model`.
    """
    root = tmp_path_factory.mktemp("models")
    model = small_model()
    transformer, tokenizer = root / "var_small.pth", root / "vae_small.pth"
    checkpoint = root / "elsewhere" / "ar-ckpt-last.pth"
    checkpoint.parent.mkdir()
    torch.save(model.to_official(), transformer)
    torch.save(model.tokenizer.to_official(), tokenizer)
    wrapped = {f"module._orig_mod.{name}": value for name, value in model.to_official().items()}
    inside = {"var_wo_ddp": wrapped, "vae_local": model.tokenizer.to_official(), "config": {"depth": 1}}
    torch.save({"epoch": 7, "iter": 0, "trainer": inside, "args": {"bs": 768, "tblr": 1e-4}}, checkpoint)
    return SimpleNamespace(
        model=model,
        folder=model.save(root / "folder"),
        transformer=transformer,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        build=small_model,
    )


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are compared bit by bit, so they stay on the CPU also where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
