"""A drafter and a refiner at the command line and in Python: found, put together, converted."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nextscale
from nextscale import models
from nextscale.cli import main
from nextscale.core.checkpoint import CheckpointError
from nextscale.tasks.generation.code import CoDe
from nextscale.tasks.generation.var import VAR


@pytest.fixture(scope="module")
def pair(forms: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`drafter`, `refiner`: official files with the tokenizer beside them; `folder`: the drafter saved."""
    root = tmp_path_factory.mktemp("pair")
    drafter = forms.build(depth=2)
    files = {"drafter_2": drafter, "refiner_2": forms.model, "vae_small": drafter.tokenizer}
    for name, model in files.items():
        torch.save(model.to_official(), root / f"{name}.pth")
    model = CoDe([drafter, forms.build()], [2]).eval()
    return SimpleNamespace(
        root=root,
        drafter=root / "drafter_2.pth",
        refiner=root / "refiner_2.pth",
        folder=drafter.save(root / "saved"),
        model=model,
        expected=model.generate(3, seed=5, top_k=0),
    )


def test_every_way_to_a_pair_gives_the_same(pair: SimpleNamespace, forms: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = str(pair.root / "vae_small.pth")
    for model in (
        nextscale.load(pair.drafter, refiner=pair.refiner, draft_scales=2),
        nextscale.load(pair.drafter, "code", draft_scales=2),
        nextscale.load(pair.folder, refiner=str(pair.refiner), draft_scales=2),
        nextscale.load(pair.drafter, refiner=nextscale.load(forms.folder), draft_scales=2, tokenizer=tokenizer),
        nextscale.load(pair.model.save(tmp_path)),
    ):
        assert isinstance(model, CoDe) and not model.training
        assert torch.equal(model.generate(3, seed=5, top_k=0), pair.expected)
        assert model.tokenizer.config.schedule == model.config.schedule


def test_a_named_pair_knows_its_refiner_and_its_scales(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"code-8": pair.drafter, "code-8-refiner": pair.refiner, "var-tokenizer": pair.root / "vae_small.pth"}
    monkeypatch.setattr("nextscale.loading.locate", lambda model: places[model.name])
    monkeypatch.setitem(models.MODELS["code-8"].options, "draft_scales", 2)  # type: ignore[arg-type]
    assert torch.equal(nextscale.load("code-8").generate(3, seed=5, top_k=0), pair.expected)
    assert nextscale.load("code-8", draft_scales=1).config.handovers == (1,)
    assert isinstance(nextscale.load("code-8-refiner"), VAR)


def test_what_is_missing_is_named(pair: SimpleNamespace, forms: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="how many scales does the first model draw"):
        nextscale.load(pair.drafter, refiner=pair.refiner)
    with pytest.raises(ValueError, match="expected 1 rising numbers from 1 to 2"):
        nextscale.load(pair.drafter, refiner=pair.refiner, draft_scales=3)
    with pytest.raises(ValueError, match="is a ResidualVQ, expected a VAR"):
        nextscale.load(pair.drafter, refiner=pair.root / "vae_small.pth", draft_scales=2)
    with pytest.raises(CheckpointError, match="holds a saved 'residual-vq', expected code"):
        nextscale.load(forms.model.tokenizer.save(tmp_path / "t"), refiner=pair.refiner, draft_scales=2)
    with pytest.raises(ValueError, match="refiner: a folder saved by this library says all of this itself"):
        nextscale.load(pair.model.save(tmp_path / "p"), refiner=pair.refiner)


def test_commands(pair: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--refiner", str(pair.refiner), "--draft-scales", "2"]
    assert main(["generate", str(pair.drafter), *both, "--classes", "3", "--seed", "5", "--top-k", "0",
                 "--out", str(tmp_path / "images")]) == 0  # fmt: skip
    assert (tmp_path / "images" / "sheet.png").is_file()
    each = ["--top-k", "0", "9", "5", "--temperature", "1.1", "1", "1", "--guidance", "2", "1", "0.5", "--top-p", "0"]
    assert main(["generate", str(pair.folder), *both, "--num", "1", *each, "--out", str(tmp_path / "each")]) == 0
    record = json.loads((tmp_path / "each" / "generate.json").read_text())["settings"]
    assert (record["top_k"], record["top_p"], record["guidance"]) == ([0, 9, 5], 0.0, [2.0, 1.0, 0.5])
    assert (record["refiner"], record["draft_scales"]) == (str(pair.refiner), 2)
    assert main(["convert", str(pair.folder), str(tmp_path / "saved"), *both, "--to", "nextscale"]) == 0
    assert torch.equal(nextscale.load(tmp_path / "saved").generate(3, seed=5, top_k=0), pair.expected)
    assert main(["convert", str(tmp_path / "saved"), str(tmp_path / "official")]) == 0
    written = sorted(path.name for path in (tmp_path / "official").iterdir())
    assert written == ["drafter_2.pth", "refiner_2.pth", "vae_ch32v32z8.pth"]
    again = nextscale.load(tmp_path / "official" / "drafter_2.pth", "code", draft_scales=2)
    assert torch.equal(again.generate(3, seed=5, top_k=0), pair.expected)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "saved")]) == 0
    text = capsys.readouterr().out
    assert "drafter" in text and "refiner" in text and "tokenizer" in text
    assert main(["generate", str(pair.drafter), *both[:2]]) != 0
    assert "--draft-scales 6 on the command line" in capsys.readouterr().err
