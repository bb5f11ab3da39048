"""Training from the command line, from photographs to a model that draws; stopping and going on."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import nextscale
from nextscale.cli import main
from nextscale.cli.train import HARMLESS, load_initial, recipe_parser
from nextscale.cli.training_view import describe, duration
from nextscale.core.training import TrainingConfig

RECIPES = Path(nextscale.__file__).parent / "recipes"

TOKENIZER = """
data: {source: photos, validation: photos, size: 16, resize_ratio: 1.0}
scales: 1 2 4
autoencoder: {channels: 8, multipliers: [1, 1, 1], blocks: 1, latent_channels: 8, attention: false, norm_groups: 8}
quantizer: {vocabulary: 16, channels: 8}
training: {output: runs/tokenizer, epochs: 1, batch_size: 4, log_every: 2}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with photographs of two classes."""
    rng = np.random.default_rng(0)
    for name in ("blue", "red"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "tokenizer.yaml").write_text(TOKENIZER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(line: str) -> int:
    return main(shlex.split(line))


def test_from_photographs_to_drawn_images(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("train tokenizer --config tokenizer.yaml --training.sample-every 1") == 0
    out = capsys.readouterr().out
    assert "training 2 steps of 4 in runs/tokenizer" in out and "step 2 of 2  loss" in out
    run = project / "runs" / "tokenizer"
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-00000001.png", "step-00000002.png"]
    assert typed("tokenize runs/tokenizer photos tokens --mirrored --resize-ratio 1.0") == 0
    assert "8 images (2 classes), views of each: 2, tokens of a view: 21, in tokens" in capsys.readouterr().out
    line = "train var --tokens tokens --tokenizer runs/tokenizer --depth 1 --training.epochs 1 --training.batch_size 4"
    assert typed(f"{line} --training.output runs/var") == 0
    assert [p.name for p in (project / "runs" / "var" / "samples").iterdir()] == ["step-00000002.png"]
    assert typed("generate runs/var --classes red --num 2 --out images") == 0
    assert "2 images in images" in capsys.readouterr().out
    # The configuration that was used trains the same again, elsewhere.
    assert typed("train var --config runs/var/config.yaml --training.output runs/again") == 0
    first, again = (json.loads((project / "runs" / n / "model" / "config.json").read_text()) for n in ("var", "again"))
    assert first == again, "also the checksum of the weights"


def test_a_run_goes_on_only_with_its_own_configuration(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("train tokenizer --config tokenizer.yaml") == 0
    assert typed("train tokenizer --config tokenizer.yaml --training.epochs 1.5 --training.log_every 1") == 0
    assert "training 3 steps of 4 in runs/tokenizer, taken up from step-00000002.pt" in capsys.readouterr().out
    assert typed("train tokenizer --config tokenizer.yaml --loss.absolute 2 --training.seed 3") == 2
    error = capsys.readouterr().err
    assert "loss.absolute was 0.0, now 2.0" in error and "training.seed was 0, now 3" in error
    assert error.count("\n") == 1
    kept = yaml.safe_load((project / "runs" / "tokenizer" / "config.yaml").read_text())
    assert kept["training"]["epochs"] == 1.5 and kept["loss"]["absolute"] == 0.0


def test_ctrl_c_saves_and_says_how_to_go_on(project: Path) -> None:
    line = "train tokenizer --config tokenizer.yaml --training.epochs 5000 --training.log-every 1"
    command = [sys.executable, "-m", "nextscale.cli", *shlex.split(line)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    for text in process.stdout:
        if "step 2 of" in text:
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert error.splitlines()[-1].startswith("nextscale: stopped at step") and "run the same command to go on" in error
    assert len(list((project / "runs" / "tokenizer" / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("kind", ["tokenizer", "var"])
def test_every_option_and_recipe_is_read(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(f"train {kind} --print_config") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert set(HARMLESS) < set(shown["training"]) and shown["training"]["batch_size"] == 768
    recipes = sorted(RECIPES.glob(f"{kind}-*.yaml"))
    for path in recipes:
        options = recipe_parser(kind).parse_args(["--config", str(path)])
        assert options.training.output.startswith("runs/")


def test_fine_tuning_starts_from_any_form(forms: SimpleNamespace) -> None:
    own = load_initial(str(forms.folder), forms.model.tokenizer)
    official = load_initial(str(forms.transformer), forms.model.tokenizer)
    beside = load_initial(str(forms.transformer), None)
    other = SimpleNamespace(config=SimpleNamespace(quantizer=SimpleNamespace(vocabulary=7, channels=8)))
    strange = load_initial(str(forms.transformer), other)
    for model in (own, official, beside, strange):
        assert torch.equal(model.head.linear.weight, forms.model.head.linear.weight)
    assert strange.tokenizer.quantizer.codebook.weight.is_meta, "only a place for the new one"


def test_the_harmless_options_exist_and_figures_are_short() -> None:
    assert set(HARMLESS) <= set(TrainingConfig.__dataclass_fields__)
    assert duration(59.6) == "1:00" and duration(3725) == "1:02:05"
    assert describe({"loss": 1.23456, "psnr": 20, "other": 1, "samples_per_second": 12.345}) == (
        "loss 1.235  psnr 20  12.35 samples/s"
    )
