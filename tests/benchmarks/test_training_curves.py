"""Curves of runs, from the logs that training writes."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = str(Path(__file__).resolve().parents[2] / "benchmarks" / "training_curves.py")


def run(folder: Path, values: list[float]) -> Path:
    folder.mkdir()
    rows = [{"step": 10 * i, "loss": 1.0, **({"validation/d1": v} if i else {})} for i, v in enumerate(values)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_two_runs_in_one_picture(tmp_path, monkeypatch, capsys):
    first, second = run(tmp_path / "first", [0, 0.5, 0.6]), run(tmp_path / "second", [0, 0.4, 0.75, 0.7])
    words = [str(first), f"other={second}", "--figures", "validation/d1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *words])
    runpy.run_path(SCRIPT, run_name="__main__")
    curves = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert curves["first"]["validation/d1"] == [[10, 0.5], [20, 0.6]]
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert table[2:] == ["| first | 20 | 0.6 |", "| other | 30 | 0.7 |"]
    with Image.open(tmp_path / "out" / "curves.png") as picture:
        assert picture.size[0] > 500 and len(picture.convert("RGB").getcolors(1 << 20)) > 5
    assert "| other | 30 | 0.7 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("figure", "said"), [("validation/rmse", "has loss, validation/d1"), (None, "holds no log.jsonl")]
)
def test_what_is_not_there_is_named(tmp_path, monkeypatch, figure, said):
    folder = run(tmp_path / "run", [0, 1]) if figure else tmp_path
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(folder), "--figures", figure or "loss", "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit, match=said):
        runpy.run_path(SCRIPT, run_name="__main__")
