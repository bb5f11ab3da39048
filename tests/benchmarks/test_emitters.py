"""Models of classes and of texts side by side: one that ships, one with random weights, figures of the right kind."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.generation.infinity import Infinity
from nextscale.tasks.generation.infinity_config import InfinityConfig
from nextscale.tasks.generation.infinity_training import initialize
from nextscale.tasks.generation.infinity_transformer import InfinityBlocksConfig
from nextscale.tasks.generation.text import TextEncoderConfig
from nextscale.tasks.generation.text_small import make_encoder
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ, BitwiseVQConfig

SCRIPT = str(Path(__file__).resolve().parents[2] / "benchmarks" / "emitters.py")
CLASSES = 10


class Classifier(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means = images.flatten(2).mean(2)
        return torch.cat([means, images[:, :, 0, 0]], 1), means.repeat(1, 4)[:, :10]


def write_infinity(folder: Path) -> Path:
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(8, (1, 1, 1), 1, 6, attention=False, norm_groups=4)
    schedule = ScaleSchedule.parse("1 2 8")
    tokenizer = BitwiseVQ(BitwiseVQConfig(autoencoder, BitwiseQuantizerConfig(6), schedule))
    encoder = make_encoder(folder / "words", ["a red blue cat dog"], width=16, max_length=8)
    config = InfinityConfig(
        InfinityBlocksConfig(width=16, depth=1, heads=2),
        text_width=16,
        text_length=8,
        pool_heads=2,
        token_bits=6,
        schedule=schedule,
        text=TextEncoderConfig(str(encoder), max_length=8),
    )
    return initialize(Infinity(config, tokenizer)).save(folder / "tiny-infinity")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name in (f"class{number}" for number in range(CLASSES)):
        (tmp_path / "real" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "real" / name / f"{number}.png")
    torch.jit.script(Classifier()).save(str(tmp_path / "classifier.pt"))
    models = ["var-cifar10", str(write_infinity(tmp_path))]
    words = ["--classifier", str(tmp_path / "classifier.pt"), "--real", str(tmp_path / "real"), "--per-class", "2"]
    words += ["--rounds", "1", "--batch", "2", "--guidance", "var-cifar10=1.5", "--out", str(tmp_path / "out")]
    monkeypatch.syspath_prepend(str(Path(SCRIPT).parent))
    monkeypatch.setattr(sys, "argv", [SCRIPT, *models, *words])
    runpy.run_path(SCRIPT, run_name="__main__")
    result = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert result["images"] == 2 * CLASSES
    index, bits = result["figures"]["var-cifar10"], result["figures"]["tiny-infinity"]
    assert (index["emits"], bits["emits"]) == ("indices", "bits")
    assert (index["tokens"], bits["tokens"]) == (103, 69)
    assert 0 < index["codes used"] < 1 and 0 < bits["entropy in bits"] <= 6
    assert "colour as asked" in bits and "colour as asked" not in index
    for figures in (index, bits):
        assert 0 <= figures["classified"] <= 1 and figures["distance"] > 0
        assert figures["seconds an image, batch 2"] > 0
    assert "seconds an image, batch 2" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "samples.png") as sheet:
        assert sheet.width > CLASSES * 64
    monkeypatch.setattr(sys, "argv", [SCRIPT, *models, *words, "--per-class", "4"])
    with pytest.raises(ValueError, match="a class has 3 images, expected 4"):
        runpy.run_path(SCRIPT, run_name="__main__")
