"""``nextscale prepare shapes``, ``prepare gbuffers`` and ``evaluate shapes``."""

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh

from nextscale.cli import main
from nextscale.datasets.gbuffers import find_objects
from nextscale.datasets.shapes import ShapeSet

SMALL = ["--surface", "300", "--uniform", "200", "--near", "100", "--workers", "0"]


def meshes(root: Path, scale: float = 1.0) -> Path:
    for name, made in {"a": trimesh.creation.box((1, 1, 2)), "b": trimesh.creation.icosphere(2)}.items():
        for number in range(2):
            made.apply_scale((scale, 1, 1 + number))
            path = root / name / f"{number}.ply"
            path.parent.mkdir(parents=True, exist_ok=True)
            made.export(path)
    return root


def test_prepare_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = meshes(tmp_path / "in")
    (root / "a" / "bad.glb").write_bytes(b"nothing")
    words = ["prepare", "shapes", str(tmp_path / "out"), "--source", str(root), *SMALL]
    assert main([*words, "--sheet", str(tmp_path / "sheet.png")]) == 0
    said = capsys.readouterr()
    assert "4 objects" in said.out and "1 files refused" in said.out and "a/bad.glb" in said.err
    assert len(ShapeSet(tmp_path / "out")) == 4 and (tmp_path / "sheet.png").is_file()
    assert main([*words[:3], "--source", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_prepare_gbuffers(tmp_path: Path) -> None:
    words = ["prepare", "gbuffers", str(tmp_path / "out"), "--number", "2", "--classes", "cup", "bed"]
    assert main([*words, "--views", "2", "--size", "16", "--workers", "0"]) == 0
    assert [category for _, category in find_objects(tmp_path / "out")] == ["cup", "bed"]


def test_evaluate_a_folder_against_itself_and_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import nextscale.evaluation.shapes as figures

    few = {
        name: convention.__class__(**{**vars(convention), "points": 4000})
        for name, convention in figures.CONVENTIONS.items()
    }
    monkeypatch.setattr(figures, "CONVENTIONS", few)
    root, wider = meshes(tmp_path / "in"), meshes(tmp_path / "wider", 1.3)
    reports = {}
    for name, folder in (("same", root), ("wider", wider)):
        out = tmp_path / name
        assert main(["evaluate", "shapes", str(folder), "--reference", str(root), "--out", str(out)]) == 0
        reports[name] = json.loads((out / "report.json").read_text())
        assert len((out / "shapes.jsonl").read_text().splitlines()) == 4 and (out / "shapes.png").is_file()
    same, other = (reports[name]["means"]["all"] for name in ("same", "wider"))
    assert reports["same"]["task"] == "reconstruction" and "3DShape2VecSet" in reports["same"]["convention"]
    assert same["iou"] == 1 and same["chamfer_sum"] < 0.1 and same["normals"] > 0.9
    assert other["iou"] < 0.9 and other["chamfer_sum"] > same["chamfer_sum"]
    words = ["evaluate", "shapes", "g3pt-objects", "--reference", str(root), "--limit", "1", "--resolution", "24"]
    words += ["--task", "reconstruction", "--by-scale"]
    assert main([*words, "--out", str(tmp_path / "scales")]) == 0
    report = json.loads((tmp_path / "scales" / "report.json").read_text())
    means = report["means"]
    assert report["refused"] == {}
    assert list(means) == ["all", "a", *(f"{k} of 5 scales" for k in range(1, 5))]
    assert means["all"]["iou"] > means["1 of 5 scales"]["iou"]
    assert main(["evaluate", "shapes", str(root), "--reference", str(root), "--by-scale"]) == 2
    assert "--by-scale asks for a tokenizer" in capsys.readouterr().err
    prepared = tmp_path / "prepared"
    assert main(["prepare", "shapes", str(prepared), "--source", str(root), *SMALL]) == 0
    # What is no solid is left out, and said.
    sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
    sheet.export(wider / "sheet.ply")
    assert main(["evaluate", "shapes", str(wider), "--reference", str(wider), "--out", str(tmp_path / "left")]) == 0
    report = json.loads((tmp_path / "left" / "report.json").read_text())
    assert report["means"]["all"]["shapes"] == 4 and list(report["refused"]) == ["sheet.ply"]
    assert "left out: sheet.ply: " in capsys.readouterr().out
    words = ["evaluate", "shapes", str(root), "--reference", str(root), "--task", "generation"]
    assert main([*words, "--out", str(tmp_path / "sets")]) == 0
    sets = json.loads((tmp_path / "sets" / "report.json").read_text())
    assert sets["sets"]["coverage"] == 1 and sets["whole"] == 1 and sets["floor"] is not None
    assert np.isfinite(sets["sets"]["mmd"])
