"""A ladder of sizes from the command line: trained once, taken up where it stopped, its laws fitted and drawn."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nextscale.cli import main
from nextscale.cli.train import load_initial
from nextscale.core.interrupt import Interrupted
from nextscale.core.training import TrainingConfig
from nextscale.datasets.tokens import TokenWriter
from nextscale.evaluation.power_law import fit_power_law
from nextscale.planning import plan, valueless
from nextscale.planning_subjects import subject_of
from nextscale.scaling import Cost, Rung, cost_of, fit_laws, read_rung, rung
from nextscale.tasks.generation.var_recipe import VARRecipe
from nextscale.tasks.shapes.g3pt_data import ShapeData
from nextscale.tasks.shapes.g3pt_recipe import G3PTRecipe
from nextscale.tasks.tokenizers.tokenize import fingerprint

CONFIG = """
tokenizer: model
tokens: tokens
validation_tokens: tokens
width: 16
depth: 1
heads: 1
training: {epochs: 2, batch_size: 8, learning_rate: 0.02, validate_every: 1, warmup_epochs: 0}
"""


@pytest.fixture
def project(tmp_path: Path, forms: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tokens of 16 images, a tokenizer and a configuration."""
    forms.model.tokenizer.save(tmp_path / "model")
    schedule = forms.model.config.schedule
    metadata = {
        "vocabulary": 32, "schedule": str(schedule), "tokenizer": fingerprint(forms.model.tokenizer), "views": 1,
        "classes": None, "num_classes": 2, "images": 16, "size": 16,
    }  # fmt: skip
    with TokenWriter(tmp_path / "tokens", metadata=metadata) as writer:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(8, (16, schedule.length), generator=generator)
        writer.write(tokens, torch.arange(16) % 2, torch.arange(16))
    (tmp_path / "var-tiny.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(line: str) -> int:
    return main(shlex.split(line))


def test_a_ladder(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "scaling var-tiny.yaml --depths 1,2 --out ladder"
    assert typed(line) == 0
    out = capsys.readouterr().out
    assert "[2 of 2] var of depth 2 and width 32" in out and "exponent" in out and "correlation" in out
    ladder = project / "ladder"
    content = json.loads((ladder / "scaling.json").read_text())
    small, large = content["runs"]
    assert (small["width"], large["width"]) == (16, 32) and len(small["curve"]) == 4
    assert large["curve"][-1]["compute"] == 4 * large["flops"] > small["curve"][-1]["compute"]
    losses = [run["curve"][-1]["test loss"] for run in content["runs"]]
    found = {(law["figure"], law["against"]): law for law in content["laws"]}
    assert len(found) == 8
    law = fit_power_law([run["parameters"] / 1e9 for run in content["runs"]], losses)
    fitted = found["test loss", "parameters"]["law"]
    assert (fitted["exponent"], fitted["at_one"]) == (law.exponent, law.at_one)
    assert (ladder / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "| test loss, last scale | compute |" in (ladder / "scaling.md").read_text()
    # Once finished, a run is only read; another option for all is refused for it.
    (ladder / "depth-01" / "checkpoints" / "step-00000004.pt").unlink()
    assert typed(line) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert typed(f"{line} --set training.seed=1") == 2
    assert "training.seed was 0, now 1" in capsys.readouterr().err


def test_it_goes_on_where_it_was_stopped(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    line = "scaling var-tiny.yaml --depths 1,2 --set training.epochs=1 training.validate_every=0"

    def stopped(self: Any) -> None:
        raise Interrupted("stopped at step 0 of 2; run the same command to go on")

    with monkeypatch.context() as patch:
        patch.setattr("nextscale.core.training.Trainer.run", stopped)
        assert typed(line) == 130
    assert typed(line) == 0
    capsys.readouterr()
    folder = project / "runs" / "scaling-var-tiny"
    assert typed(line.replace("1,2", "2,3").replace("--set", "--widths 32,16 --set")) == 0
    assert capsys.readouterr().out.count("finished before") == 1
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["depth-01", "depth-02", "depth-03"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--depths 2,x", "--depths is '2,x'; expected whole numbers"),
        ("--depths 1,2 --widths 16", "--widths has 1 numbers, --depths 2"),
        ("--depths 2,2", "names a depth twice"),
        ("--depths 1,2 --widths 16,40", "width 40 is no multiple of the heads' size, 16"),
        ("--depths 0,1", "depth 0 is no depth"),
        ("--depths 1 --set epochs", "--set takes NAME=VALUE"),
        ("--depths 1 --kind tokens", "expected one of"),
        ("--depths 1 --set validation_tokens=null", "the configuration names none"),
    ],
)
def test_mistakes(project: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(f"scaling var-tiny.yaml {options}") == 2
    assert message in capsys.readouterr().err


def test_sizes_follow_the_recipe() -> None:
    recipe = VARRecipe(tokenizer="t", tokens="k")
    sizes = [rung(recipe, depth, "out") for depth in (2, 6)]
    assert [(size.width, size.heads) for size in sizes] == [(128, 2), (384, 6)]
    assert sizes[0].training.output == "out" and rung(recipe, 6, "out", 256).heads == 4
    small = G3PTRecipe(tokenizer="t", data=ShapeData("d"), width=144, depth=5, heads=6)
    sizes = [rung(small, depth, "out") for depth in (2, 3, 5, 8)]
    assert [(size.width, size.heads) for size in sizes] == [(48, 2), (96, 4), (144, 6), (240, 10)]
    with pytest.raises(ValueError, match="leave init out"):
        rung(replace(recipe, init="var-d16"), 2, "out")
    with pytest.raises(ValueError, match="has no depth, width and heads"):
        rung(SimpleRecipe(), 2, "out")


class SimpleRecipe(TrainingConfig):
    """Has no size."""


def test_costs_are_the_papers_and_the_plans(project: Path) -> None:
    training = TrainingConfig(str(project / "run"), epochs=1, batch_size=4)
    recipe = VARRecipe(tokenizer="model", tokens="tokens", depth=2, width=32, heads=2, training=training)
    runner = recipe.trainer(load_initial)
    before = torch.get_rng_state()
    cost = cost_of(recipe, runner)
    assert torch.equal(torch.get_rng_state(), before)
    # 18 d w^2 of matrices, and their biases: the paper's count. One head scale each for the cosine attention.
    assert cost.parameters == 2 * (18 * 32**2 + (6 + 1 + 2 + 4 + 1) * 32 + 2)
    with valueless():
        planned = plan(subject_of("var", recipe, 16))
    assert cost.flops == planned.flops and cost.steps == 4
    assert all(p.grad is None for p in runner.task.model.parameters())


def test_laws_are_of_what_all_runs_have(tmp_path: Path) -> None:
    def made(depth: int, losses: list[float], **more: float) -> Rung:
        cost = Cost(depth, 64 * depth, depth, 73728 * depth**3, 10**12 * depth**3, 20)
        curve = [((i + 1) * 10 * cost.flops, {"test loss": loss, **more}) for i, loss in enumerate(losses)]
        return Rung(cost, tuple(curve), 1.0)

    laws = fit_laws([made(1, [6.0, 5.0], **{"token error": 0.0}), made(2, [5.5, 4.0], **{"token error": 0.1})])
    assert [(law.figure, law.against, len(law.points)) for law in laws] == [
        ("test loss", "parameters", 2),
        ("test loss", "compute", 3),
        ("token error", "parameters", 2),
        ("token error", "compute", 1),
    ]
    assert laws[0].law is not None and laws[0].law.exponent == pytest.approx(
        torch.tensor(0.8).log() / torch.tensor(8.0).log()
    )
    assert laws[2].law is None, "an error of 0 has no logarithm"
    with pytest.raises(ValueError, match="has no figures of held-out data"):
        (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        read_rung(tmp_path, Cost(1, 64, 1, 1, 1, 1))
