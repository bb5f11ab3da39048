"""``nextscale control``: pictures drawn after a control, and control pictures alone."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import nextscale
from nextscale.cli import main
from nextscale.cli.train import load_initial
from nextscale.core.training import TrainingConfig
from nextscale.tasks.data import ImageData
from nextscale.tasks.generation.car import CAR, CARConfig
from nextscale.tasks.generation.car_recipe import CARRecipe
from nextscale.tasks.generation.car_training import initialize
from nextscale.tasks.generation.controls import Extraction, extract

Run = Callable[..., str]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forms: SimpleNamespace
) -> Run:
    """What a command prints, in a folder with `photo.png`, `photos/`, a base, and `canny`, an adapter on it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("photo.png", "photos/airplane/0.png", "photos/airplane/1.jpg", "photos/automobile/0.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize((48, 36)).save(path)
    base = forms.build(depth=2)
    base.save("base")
    torch.manual_seed(0)
    model = CAR(CARConfig(base.config, (4, 4, 4), Extraction("canny", 50, 120), guidance=1.5), base, "base")
    initialize(model, conv_std=None).save("canny")

    def typed(line: str, status: int = 0) -> str:
        assert main(shlex.split(line)) == status, capsys.readouterr()
        out, err = capsys.readouterr()
        return err if status else out + err

    return typed


def test_images_follow_a_control(run: Run, tmp_path: Path) -> None:
    text = run("control canny photo.png --class cat --num 2 --seed 3 --compare --out out")
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("control.png", "sheet.png", "control.json"),
        *(f"{stem}-000{i}.png" for stem in ("image", "without") for i in range(2)),
    }
    record = json.loads((out / "control.json").read_text())
    assert record["settings"]["extraction"]["low"] == 50 and record["settings"]["type"] == "canny"
    assert 0 <= record["files"]["edge_agreement"][1] <= 1 and "edge agreement without control: " in text
    photo = Image.open("photo.png").resize((16, 16))
    control = extract(torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255, Extraction("canny", 50, 120))
    assert np.array_equal(np.asarray(Image.open(out / "control.png")), control.permute(1, 2, 0).byte().numpy() * 255)
    images = nextscale.load("canny").generate("cat", 2, 3, control=control[None])
    written = np.asarray(Image.open(out / "image-0001.png"))
    assert np.abs(written - images[1].permute(1, 2, 0).numpy() * 255).max() <= 0.51


def test_a_control_may_be_given(run: Run, tmp_path: Path) -> None:
    run("control canny photo.png --extracted --fit crop --num 1 --strength 0.5 --out out")
    assert json.loads((tmp_path / "out" / "control.json").read_text())["settings"]["extraction"] is None
    size = Image.open(tmp_path / "out" / "control.png").size
    assert size == (16, 16)


def test_extracting_alone(run: Run, tmp_path: Path) -> None:
    text = run("control --extract-only photo.png --low 20 --high 50 --out edges")
    edges = np.asarray(Image.open(tmp_path / "edges" / "photo.png"))
    assert edges.shape == (36, 48, 3) and set(np.unique(edges)) == {0, 255}
    assert "canny controls in edges: photo.png, 1 in all" in text
    run("control --extract-only photos --type sketch --resolution 64 --out sketches")
    tree = tmp_path / "sketches"
    found = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.png"))
    assert found == ["airplane/0.png", "airplane/1.png", "automobile/0.png"]
    # The tree fits the photographs to train on: an adapter for ready-made controls.
    data = ImageData("photos", size=16)
    training = TrainingConfig(output="run", epochs=1, batch_size=3)
    recipe = CARRecipe(data=data, base="base", folder="sketches", control=Extraction("sketch"), training=training)
    trainer = recipe.trainer(load_initial)
    trainer.run()
    again = nextscale.load(recipe.finish(trainer))
    assert again.config.control_type == "sketch" and again.base_name is not None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("control canny", "give a model and an image"),
        ("control base photo.png", "is a VAR, which follows no control pictures"),
        ("control canny photo.png --type depth", "follows canny, not depth"),
        ("control canny photo.png --num 0", "--num is 0"),
        ("control canny nowhere.png", "nowhere.png"),
        ("control --extract-only photo.png --type depth", "need a depth model"),
        ("control --extract-only photo.png --type pose", "'pose' controls are not made of images here"),
        ("control canny photo.png --base canny", "is a CAR, expected a VAR"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run: Run, line: str, message: str) -> None:
    text = run(line, status=2)
    assert message in text and text.count("\n") == 1
