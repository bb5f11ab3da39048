"""Both benchmarks of VAR run, on a model of a few thousand weights, and their figures are of the right kind."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--depth", "1", "--scales", "1 2", "--channels", "32", "--classes", "3", "--batch", "2", "--rounds", "1"]


@pytest.mark.parametrize(
    ("script", "rate"), [("var_sampling.py", "images_per_second"), ("var_training.py", "tokens_per_second")]
)
def test_a_benchmark_runs(
    script: str, rate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, figures = str(BENCHMARKS / script), tmp_path / "figures.json"
    options = ["--device", "cpu", "--threads", "1", "--dtype", "float32", "--json", str(figures)]
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [path, *TINY, *options])
    runpy.run_path(path, run_name="__main__")
    assert "nextscale float32" in capsys.readouterr().out
    result: dict[str, Any] = json.loads(figures.read_text())
    (figure,) = result["figures"]
    assert figure[rate] > 0 and 0 < figure["utilisation"] < 2
    assert 50 * 2**20 < figure["peak_memory"] < 2**31
    assert result["settings"]["depth"] == 1 and result["operations_per_image"] > 0


def test_what_is_no_checkout_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from official_var import OfficialVAR

    with pytest.raises(FileNotFoundError, match=r"holds no models/basic_var\.py: give a checkout of https"):
        OfficialVAR(tmp_path, None, None, None)
