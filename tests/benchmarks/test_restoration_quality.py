"""The benchmark of restoration on one tiny photograph, with a model that only smooths."""

import argparse
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nextscale
from nextscale.tasks.restoration.tiling import restore_tiled

SCRIPT = str(Path(__file__).resolve().parents[2] / "benchmarks" / "restoration_quality.py")


class Smooth:
    device = torch.device("cpu")

    def restore(self, image: torch.Tensor, *, progress=None, store=None) -> torch.Tensor:
        def mean(tiles: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(tiles, 3, 1, 1, count_include_pad=False)

        return restore_tiled(mean, image, tile=16, overlap=4, batch=2, progress=progress, store=store)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(coarse).resize((36, 32), Image.Resampling.BICUBIC).save(tmp_path / "photos/a.png")
    monkeypatch.setattr(nextscale, "load", lambda name, **options: Smooth())
    monkeypatch.syspath_prepend(str(Path(SCRIPT).parent))
    return tmp_path / "photos"


def test_it_runs(photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = photos.parent / "out"
    options = ["--images", str(photos), "--tuning", str(photos), "--tuning-side", "16", "--out", str(out)]
    tasks = ["--tasks", "Gaussian noise 25", "haze"]
    monkeypatch.setattr(sys, "argv", [SCRIPT, "with", "without", *options, *tasks])
    runpy.run_path(SCRIPT, run_name="__main__")
    noise, haze = json.loads((out / "figures.json").read_text())["tasks"]
    assert noise["models"]["with"] == noise["models"]["without"]
    assert noise["models"]["with"]["psnr"] > noise["input"]["psnr"] + 1
    assert set(haze["classical"]) == {"dcp", "clahe", "gamma"}
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0].startswith("| degradation | input | best classical | with | without | over input, dB")
    gain = noise["models"]["with"]["psnr"] - noise["input"]["psnr"]
    assert f"{gain:+.2f}" in lines[2] and (out / "sheet.png").is_file()


def test_a_large_photo_is_stopped_and_gone_on_with(photos: Path) -> None:
    large = runpy.run_path(SCRIPT, run_name="benchmark")["large"]
    options = argparse.Namespace(
        large="70x50", images=str(photos), seed=0, models=["mine"], device=None, out=str(photos.parent)
    )
    told = large(options)
    assert told["megapixels"] == pytest.approx(0.0035) and told["tiles"] == 24
    assert 4 < told["reports_of_progress"] < 12 and told["peak_gigabytes"] > 0
    assert not (photos.parent / "tiles").exists()
