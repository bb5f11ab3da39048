"""Next scale against next token: figures of two small models with random weights are of the right kind."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "raster.py"


def test_times_of_models_with_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["--depth", "1", "--scales", "1 2 3", "--channels", "32", "--batch", "2", "--rounds", "1"]
    options = ["--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)]
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *tiny, *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "times as fast" in capsys.readouterr().out
    result = json.loads((tmp_path / "figures.json").read_text())
    scale, token = result["sizes"]["next-scale"], result["sizes"]["raster"]
    assert scale["parameters of the blocks"] == token["parameters of the blocks"]
    assert (scale["tokens"], scale["passes"], token["tokens"], token["passes"]) == (14, 3, 9, 9)
    assert scale["training GFLOPs an image"] > token["training GFLOPs an image"] > 0
    assert [row["measured"] for row in result["times"]] == ["with decoding", "transformer alone"]
    assert all(row["ratio"] > 0 and min(row["seconds an image"].values()) > 0 for row in result["times"])


def test_half_of_a_pair_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--var", "var-cifar10"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "give --var, --raster, --classifier and --real together" in capsys.readouterr().err
