"""Commands on a model that draws any size: generate and edit with scales of their own, files both ways."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nextscale
from nextscale.cli import main
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.transformer import TransformerConfig
from nextscale.tasks.generation.flexvar import FlexVAR, FlexVARConfig
from nextscale.tasks.generation.flexvar_training import initialize
from nextscale.tasks.tokenizers.flex_vq import FlexQuantizerConfig, FlexVQ, FlexVQConfig

Run = Callable[..., str]


@pytest.fixture(scope="module")
def model() -> FlexVAR:
    """Stride 4; 16 x 16 pixels unless another size is asked for."""
    torch.manual_seed(0)
    sizes = AutoencoderConfig(channels=32, multipliers=(1, 1, 2), blocks=1, latent_channels=8)
    tokenizer = FlexVQ(FlexVQConfig(sizes, FlexQuantizerConfig(32, 8), schedule=ScaleSchedule.squares(1, 2, 4)))
    config = FlexVARConfig(TransformerConfig(32, 1, 2), 10, 32, 8, ScaleSchedule.squares(1, 2, 4))
    return initialize(FlexVAR(config, tokenizer), modulation=1, gate=1, head=1).eval()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: FlexVAR) -> Run:
    """What a command prints; MODEL stands for the saved model, photo.png for an image of 30 x 20 pixels."""
    monkeypatch.chdir(tmp_path)
    model.save("model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save("photo.png")

    def typed(line: str, status: int = 0) -> str:
        assert main(shlex.split(line.replace("MODEL", "model"))) == status, capsys.readouterr()
        out, err = capsys.readouterr()
        return err if status else out + err

    return typed


def size(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_generate_at_other_sizes_and_steps(run: Run) -> None:
    run('generate MODEL --num 2 --classes 3 --scales "1 2x3 4x6" --out a --animate --tokens')
    assert size("a/image-0000.png") == (24, 16)
    record = json.loads(Path("a/generate.json").read_text())
    assert record["settings"]["scales"] == "1 2x3 4x6"
    with np.load("a/tokens.npz") as file:
        assert file["scales"].tolist() == [[1, 1], [2, 3], [4, 6]] and file["tokens"].shape == (2, 1 + 6 + 24)
    run("generate MODEL --num 1 --size 8x24 --steps 4 --out b")
    assert size("b/image-0000.png") == (24, 8)
    assert len(json.loads(Path("b/generate.json").read_text())["settings"]["scales"].split()) == 4
    run("generate MODEL --num 1 --steps 4 --out c")
    assert size("c/image-0000.png") == (16, 16)
    for options, message in (
        ("--scales 1 --size 8", "give either --scales, or --size and --steps"),
        ("--size big", "--size is 'big'; expected pixels such as 48"),
        ("--size 10", "images of 10 x 10 pixels are not possible: sides are multiples of 4"),
        ("--steps 99", "99 steps to 4 x 4 cells are not possible; expected at most 7"),
    ):
        assert message in run(f"generate MODEL --num 1 --out d {options}", status=2)


def test_other_models_have_their_scales(run: Run) -> None:
    assert "--scales, --size and --steps are for models that take any" in run(
        "generate var-cifar10 --num 1 --size 48 --out d", status=2
    )
    assert "--mode expand is for models whose scales stand alone" in run(
        "edit var-cifar10 photo.png --mode expand --size 48 --out d", status=2
    )


def test_edit_at_other_sizes(run: Run) -> None:
    text = run("edit MODEL photo.png --mode expand --size 16x32 --class 3 --num 2 --out a")
    assert "resized to the model's 16 x 16" in text
    assert size("a/expand-0001.png") == (32, 16)
    text = run("edit MODEL photo.png --mode refine --keep 2 --size 16x24 --num 1 --out a")
    assert "resized to the model's 24 x 16" in text and "centre cropped" not in text
    assert size("a/refine-0000.png") == (24, 16)
    run("edit MODEL photo.png --box 0,0,0.5,0.5 --size 16x24 --num 1 --out a")
    assert size("a/inpaint-0000.png") == (24, 16)
    for options, message in (
        ("--mode expand", "--mode expand needs --size"),
        ("--mode refine", "--mode refine needs --keep"),
        ("--mode refine --keep 3", "3 scales of 3 are to be kept; expected 1 to 2"),
        ("--mode expand --size 32 --box 0,0,1,1", "--mode expand takes neither --box nor --mask"),
        ("--mode inpaint --box 0,0,1,.5 --class 3", "--mode inpaint takes no --class"),
        ("--mode expand --size 16", "leaves nothing to draw"),
    ):
        assert message in run(f"edit MODEL photo.png {options} --num 1 --out b", status=2)


def test_official_files_and_back(run: Run, model: FlexVAR, tmp_path: Path) -> None:
    torch.save({"trainer": {"var_wo_ddp": model.to_official()}}, "FlexVARd1-epo9.pth")
    torch.save({"model": model.tokenizer.to_official()}, "FlexVAE.pth")
    loaded = nextscale.load("FlexVARd1-epo9.pth", schedule="1 2 4")
    assert isinstance(loaded, FlexVAR) and loaded.config.official_sampling is not None
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    text = run("info FlexVARd1-epo9.pth")
    assert "flexvar" in text
    text = run("info MODEL")
    assert "1 2 4 (21 tokens)" in text
    run("convert MODEL there --to official")
    assert sorted(path.name for path in Path("there").iterdir()) == ["FlexVAE.pth", "FlexVARd1.pth"]
