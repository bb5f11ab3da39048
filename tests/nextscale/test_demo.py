"""The demo: one page with everything on it, made anew at the second time, other files kept."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from nextscale.cli import main
from nextscale.demo import TITLE, _photographs


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextscale.demo.PER_CLASS", 2)
    monkeypatch.setattr("nextscale.demo.CLASSES", 3)
    monkeypatch.setattr("nextscale.demo_tasks.PER_PROMPT", 1)
    monkeypatch.setattr("nextscale.demo_tasks.SCENES", 1)
    monkeypatch.setattr("nextscale.demo_tasks.SHAPES_PER_CLASS", 1)
    monkeypatch.setattr("nextscale.demo_tasks.SHAPE_GRID", 24)


def test_the_page_and_its_pictures(forms: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--model", str(forms.folder), "--out", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"the page and its pictures: {out.resolve() / 'index.html'}"
    page = (out / "index.html").read_text()
    assert TITLE in page and "every token is the same" in page and "airplane" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the page stands alone"
    names = {path.name for path in out.iterdir()}
    pictures = [
        "samples",
        "more-samples",
        "forming",
        "seeds",
        "guidance",
        "edits",
        "reconstructions",
        "tokens",
        "codes",
        "prompts",
        "restored",
        "depth",
        "depth-scenes",
        "shapes",
    ]
    assert names == {f"{name}.png" for name in pictures} | {"forming.webp", "index.html"}
    assert all(f'<h2 id="{task}">' in page for task in ("prompts", "restoration", "depth", "shapes"))
    (out / "mine.txt").write_text("kept")
    assert main(["demo", "--model", str(forms.folder), "--out", str(out), "--device", "cpu", "--also", "depth"]) == 0
    assert {path.name for path in out.iterdir()} == names | {"mine.txt"}


def test_a_page_of_someone_else_is_kept(forms: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<h1>mine</h1>")
    assert main(["demo", "--model", str(forms.folder), "--out", str(tmp_path), "--also"]) == 0
    assert (tmp_path / "index.html").read_text() == "<h1>mine</h1>"
    assert TITLE in (tmp_path / "index-0001.html").read_text()


def test_an_unknown_task_is_named(forms: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", str(forms.folder), "--also", "music"]) == 2
    assert "--also 'music' is none of prompts, restoration, depth, shapes" in capsys.readouterr().err


def test_photographs_come_with_a_dependency() -> None:
    found = _photographs(32)
    assert len(found) >= 4
    assert all(picture.shape == (3, 32, 32) and 0 <= picture.min() <= picture.max() <= 1 for picture in found.values())


def test_a_tokenizer_alone_has_no_demo(forms: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", str(forms.tokenizer)]) == 2
    assert "which draws no images" in capsys.readouterr().err
