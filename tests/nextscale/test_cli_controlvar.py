"""ControlVAR from the command line: trained on photographs, pairs from a class, controls followed and perceived."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import nextscale
from nextscale.cli import main
from nextscale.cli.train import load_initial
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.data import ImageData
from nextscale.tasks.generation.controls import Extraction
from nextscale.tasks.generation.controlvar_data import Kinds
from nextscale.tasks.generation.controlvar_recipe import ControlVARRecipe
from nextscale.tasks.generation.controlvar_training import from_var

TRAINING = "--training.epochs 1 --training.batch_size 4 --training.sample_every 0 --training.output runs/pairs"


@pytest.fixture
def project(tmp_path: Path, forms: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photographs of two classes, depth pictures of them, and a ControlVAR that knows canny and masks."""
    rng = np.random.default_rng(0)
    for tree, mode in (("photos", "jpg"), ("depth", "png")):
        for name in ("blue", "red"):
            (tmp_path / tree / name).mkdir(parents=True)
            for i in range(2):
                coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
                coarse.resize((16, 16), Image.Resampling.BICUBIC).save(tmp_path / tree / name / f"{i}.{mode}")
    torch.manual_seed(0)
    from_var(forms.model, control_types=("canny", "mask"), extractions=(Extraction("canny", 50, 100),)).save(
        tmp_path / "pairs"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(line: str) -> int:
    return main(shlex.split(line))


def test_pairs_of_classes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("generate pairs --classes cat dog --type canny --seed 3 --animate --out out") == 0
    assert {"image-0000.png", "control-0001.png", "sheet.png", "forming.webp"} <= {
        p.name for p in (project / "out").iterdir()
    }
    record = json.loads((project / "out" / "generate.json").read_text())
    model = nextscale.load(project / "pairs")
    control, image = model.pairs(["cat", "dog"], seed=3, control_type="canny", guidance=4.0)
    for name, picture in (("control", control), ("image", image)):
        pixels = np.asarray(Image.open(project / "out" / f"{name}-0001.png"))
        assert np.abs(pixels - picture[1].permute(1, 2, 0).numpy() * 255).max() <= 0.51
    assert record["files"]["controls"] == ["control-0000.png", "control-0001.png"]
    assert record["settings"]["type"] == "canny"


def test_a_control_is_followed_as_in_training(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("control pairs photos/red/0.jpg --type canny --class cat --num 2 --out out") == 0
    record = json.loads((project / "out" / "control.json").read_text())
    how = record["settings"]["extraction"]
    assert (how["low"], how["high"]) == (50, 100) and len(record["files"]["images"]) == 2


def test_masks_of_annotations_are_a_control(project: Path) -> None:
    runs = {"size": [32, 32], "counts": [200, 500, 324]}
    (project / "masks.json").write_text(json.dumps([{"segmentation": runs, "area": 500}]))
    assert typed("control pairs masks.json --type mask --class 3 --num 1 --out out") == 0
    painted = np.asarray(Image.open(project / "out" / "control.png"))
    assert painted.shape == (16, 16, 3) and painted.max() > 0


def test_controls_are_perceived(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("control pairs photos/red/0.jpg --perceive --type mask --num 2 --out out") == 0
    assert "2 mask pictures in out" in capsys.readouterr().out
    assert {"control-0000.png", "control-0001.png", "sheet.png"} <= {p.name for p in (project / "out").iterdir()}


def test_a_var_draws_no_pairs(project: Path, forms: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(f"generate {forms.folder} --type canny") != 0
    assert "--type is ControlVAR's" in capsys.readouterr().err
    assert typed(f"control {forms.folder} photos/red/0.jpg --perceive") != 0
    assert "draws no controls" in capsys.readouterr().err


def test_trained_on_edges_and_pictures_of_a_folder(
    project: Path, forms: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "recipe.yaml").write_text(
        f"init: {forms.folder}\ndata: {{source: photos, validation: photos, size: 16, resize_ratio: 1.0, flip: true}}\n"
        "extract: [{kind: canny, low: 20, high: 40}]\nfolders: {depth: depth}\nvalidation_folders: {depth: depth}\n"
        "either_order: true\n"
    )
    assert typed(f"train controlvar --config recipe.yaml {TRAINING}") == 0
    assert (project / "runs" / "pairs" / "samples" / "step-00000001.png").is_file()
    model = nextscale.load(project / "runs" / "pairs")
    assert model.config.control_types == ("canny", "depth") and model.config.extractions == (
        Extraction("canny", 20, 40),
    )
    assert model.config.classes == 2 and model.config.class_names == ("blue", "red")
    recipe = ControlVARRecipe(
        ImageData("photos", size=16), init="runs/pairs/model", extract=[Extraction("canny", 9, 9)]
    )
    further = recipe.build(recipe.open(), load_initial)
    assert further.config == replace(model.config, extractions=(Extraction("canny", 9, 9),), either_order=False)
    assert torch.equal(further.head.linear.weight, model.head.linear.weight)


def test_pairs_are_cropped_and_mirrored_alike(project: Path, forms: SimpleNamespace) -> None:
    data = {"source": "photos", "size": 12, "flip": True, "resize_ratio": 1.0}
    recipe = ControlVARRecipe(
        ImageData(**data), init="x", folders={"depth": "photos"}, extract=[Extraction("hed", resolution=64)]
    )
    keys = [(epoch, i) for epoch in range(6) for i in range(4)]
    batch = recipe.open().fetch(keys)
    chosen = batch["type"] == 1
    assert 4 < chosen.sum() < 20 and torch.equal(batch["control"][chosen], batch["image"][chosen])
    assert batch["type_uniform"].unique().numel() == len(keys)
    again = recipe.open().fetch(keys[5:9])
    assert torch.equal(again["control"], batch["control"][5:9]) and torch.equal(again["type"], batch["type"][5:9])


def test_a_new_model_is_made_for_a_tokenizer(project: Path, forms: SimpleNamespace) -> None:
    data = ImageData("photos", size=16, resize_ratio=1.0)
    recipe = ControlVARRecipe(
        data, tokenizer=str(forms.folder), depth=1, extract=[Extraction()], halves="one-way", scales="1 4"
    )
    model = recipe.build(recipe.open(), load_initial)
    assert str(model.config.schedule) == "1x1x1x2 4x4x1x2" and model.config.halves == "one-way"
    assert (
        model.config.transformer.width == 64 and ScaleSchedule.parse("1 4").length * 2 == model.config.schedule.length
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "x"}, "no control to train with"),
        ({"init": "x", "extract": [Extraction("depth")]}, "depth controls need a model"),
        ({"init": "x", "tokenizer": "y", "extract": [Extraction()]}, "one of the two"),
        ({"init": "x", "folders": {"depth": "d"}}, "give validation_folders"),
        ({"init": "x", "extract": [Extraction()], "folders": {"canny": "d"}}, "'canny' is given twice"),
    ],
)
def test_recipes_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControlVARRecipe(ImageData("photos", validation="photos"), **options)


def test_a_tree_of_other_pictures_is_refused(project: Path) -> None:
    (project / "depth" / "red" / "0.png").rename(project / "depth" / "red" / "3.png")
    recipe = ControlVARRecipe(ImageData("photos", size=16), init="x", folders={"depth": "depth"})
    with pytest.raises(ValueError, match=r"image .*red/0\.jpg has .*red/1\.png in its place among the depth controls"):
        recipe.open()
    assert Kinds((Extraction(),)).names == ("canny",)
