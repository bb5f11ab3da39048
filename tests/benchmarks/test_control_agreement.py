"""The benchmark of control runs on an untrained adapter, and its figures are of the right kind."""

import io
import json
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nextscale
from nextscale.tasks.generation.car import CAR, CARConfig
from nextscale.tasks.generation.car_training import initialize
from nextscale.tasks.generation.controls import Extraction

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def shard(path: Path) -> None:
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for i in range(4):
            buffer = io.BytesIO()
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
            coarse.resize((32, 32), Image.Resampling.NEAREST).save(buffer, "png")
            for suffix, content in (("png", buffer.getvalue()), ("cls", str(i).encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base = nextscale.load("var-cifar10", device="cpu")
    adapter = CAR(CARConfig(base.config, (2, 2, 2), Extraction("canny")), base, "var-cifar10")
    folder = initialize(adapter).save(tmp_path / "adapter")
    shard(tmp_path / "test.tar")
    script = str(BENCHMARKS / "control_agreement.py")
    options = ["--images", str(tmp_path / "test.tar"), "--number", "4", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [script, str(folder), *options])
    runpy.run_path(script, run_name="__main__")
    (result,) = json.loads((tmp_path / "out" / "control_agreement.json").read_text())["models"]
    for tolerance in ("0", "1"):
        figures = result["tolerance"][tolerance]
        assert all(0 <= figures[name] <= 1 for name in ("controlled", "uncontrolled", "reconstructed"))
    assert result["tolerance"]["0"]["reconstructed"] < result["tolerance"]["1"]["reconstructed"]
    assert (tmp_path / "out" / "adapter.png").is_file() and "ratio" in capsys.readouterr().out
