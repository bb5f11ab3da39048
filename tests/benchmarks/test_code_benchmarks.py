"""CoDe's benchmarks run on models of a few thousand weights, and count memory as the models take it."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / script), *options])
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")


def test_speed_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--drafter", "2", "--refiner", "1", "--draft-scales", "1", "--scales", "1 2", "--channels", "32"]
    tiny += ["--classes", "3", "--batch", "2", "--rounds", "1", "--device", "cpu", "--dtype", "float32"]
    run("code_speed.py", [*tiny, "--threads", "1", "--json", str(tmp_path / "figures.json")], monkeypatch)
    result = json.loads((tmp_path / "figures.json").read_text())
    assert [(f["side"], f["image_decoder"]) for f in result["figures"]] == [
        (side, decode) for decode in (False, True) for side in ("drafter alone", "together")
    ]
    assert all(f["images_per_second"] > 0 for f in result["figures"])
    counted = result["counted"]
    # float32, 128 rows, keys and values of depth x width numbers at each position.
    assert counted["drafter_cache_whole"] == 4 * 128 * 5 * 2 * 2 * 128
    assert (counted["drafter_cache"], counted["refiner_cache"]) == (4 * 128 * 2 * 2 * 128, 4 * 128 * 5 * 2 * 64)
    weights = counted["drafter_weights"] + counted["tokenizer"]
    assert counted["alone"] == weights + counted["drafter_cache_whole"]
    assert counted["together"] == weights + counted["refiner_weights"] + counted["refiner_cache"]
    assert "Weights and cache at batch 64" in capsys.readouterr().out


def test_released_sizes_take_less_than_half(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("code_speed.py", ["--count-only", "--device", "cpu"], monkeypatch)
    assert "which is 0.43 of it" in capsys.readouterr().out
