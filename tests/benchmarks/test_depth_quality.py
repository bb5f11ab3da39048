"""The benchmark of depth on a few tiny scenes, with a model that knows their mean map, and one that knows the truth."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import nextscale
from nextscale.datasets.depth import open_source
from nextscale.datasets.scenes import SceneSettings
from nextscale.datasets.scenes_write import write_scenes

SCRIPT = str(Path(__file__).resolve().parents[2] / "benchmarks" / "depth_quality.py")


@pytest.fixture
def scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(Path(SCRIPT).parent))
    write_scenes(tmp_path / "scenes", SceneSettings(width=32, height=24), 3, workers=0)
    return tmp_path / "scenes"


class Knowing:
    """Finds a photo among the scenes, and gives its depth times a factor."""

    def __init__(self, scenes: Path, unit: str, factor: float) -> None:
        self.pairs, self.unit, self.factor = open_source("scenes", scenes), unit, factor

    def predict(self, photo: torch.Tensor) -> Any:
        pixels = (photo * 255).round().byte().permute(1, 2, 0).numpy()
        index = next(i for i in range(len(self.pairs)) if (self.pairs.image(i) == pixels).all())
        return SimpleNamespace(depth=torch.from_numpy(self.pairs.depth(index)[0] * self.factor))


def test_it_compares_models_with_both_floors(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"relative": Knowing(scenes, "relative", 3.0), "metric": Knowing(scenes, "metre", 1.1)}
    monkeypatch.setattr(nextscale, "load", lambda name, **options: models[name])
    out = scenes.parent / "out"
    words = ["relative", "metric", "--train", str(scenes), "--test", str(scenes), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *words])
    runpy.run_path(SCRIPT, run_name="__main__")
    figures = json.loads((out / "figures.json").read_text())
    assert (figures["images"], figures["training_pairs"]) == (3, 3)
    rows = figures["figures"]
    assert "metric" not in rows["relative"]
    assert rows["relative"]["aligned"]["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert rows["metric"]["metric"]["abs_rel"] == pytest.approx(0.1, abs=1e-6)
    assert rows["metric"]["aligned"]["d1"] == 1.0
    floors = [rows[name]["aligned"]["d1"] for name in ("best constant", "mean map of the training pairs")]
    assert max(floors) < 1
    table = (out / "table.md").read_text().splitlines()
    assert len(table) == 2 + 5 and table[-1].startswith("| metric | none | 0.100 |")
    assert (out / "depth.png").is_file()


def test_the_folder_of_predictions_that_is_timed_is_evaluated(scenes: Path) -> None:
    script = runpy.run_path(SCRIPT, run_name="benchmark")
    script["made_up"].__globals__["PREDICTIONS"] = 2
    folder = script["made_up"](scenes.parent / "folder")
    pairs = open_source("folder", folder / "pairs.yaml")
    assert len(pairs) == 2
    depth, valid = pairs.depth(1)
    ratio = np.load(folder / "predictions" / "001.npy")[valid] / depth[valid]
    assert ratio.min() > 0.79 and ratio.max() < 1.21 and np.ptp(ratio) < 1e-2
    words = ["evaluate", "depth", folder / "predictions", "--data", folder / "pairs.yaml", "--dataset", "folder"]
    assert script["timed"]([*map(str, words), "--out", str(scenes.parent / "evaluated"), "--top", "0"])["seconds"] > 0
    with pytest.raises(RuntimeError, match="nothing ended with 2"):
        script["timed"](["evaluate", "depth", str(folder / "nothing")])
