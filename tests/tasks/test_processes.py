"""Two processes train as one: a VAR on a folder of images, by DDP and by FSDP2, and a tokenizer against its critic."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nextscale.core.checkpoint import read_folder

from ..processes import run_program

pytestmark = pytest.mark.timeout(900)  # seconds where nothing else runs, minutes where much does


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_program(Path(__file__).with_name("process_runs.py"), folder)


def largest_difference(log: list[dict[str, float]], other: list[dict[str, float]], name: str = "loss") -> float:
    pairs = [(a[name], b[name]) for a, b in zip(log, other, strict=True) if name in a]
    assert len(pairs) >= 5
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_fifty_steps_of_a_var_are_those_of_one_process(sharding: str, runs: tuple[Path, Any]) -> None:
    folder, found = runs
    alone, two = found["alone"], found[sharding]
    assert [row["step"] for row in two] == [*range(1, 51), 50]
    assert largest_difference(alone, two) < 1e-4
    assert abs(alone[-1]["validation/loss"] - two[-1]["validation/loss"]) < 1e-4
    assert alone[0]["loss"] - alone[49]["loss"] > 0.05, "nothing was learned"
    kept, (state, _) = read_folder(folder / "alone" / "model")[0], read_folder(folder / sharding / "model")
    for name, value in kept.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-3)


def test_a_tokenizer_and_its_critic(runs: tuple[Path, Any]) -> None:
    _, found = runs
    for name in ("loss", "discriminator/loss", "adversarial_weight"):
        assert largest_difference(found["tokenizer"], found["tokenizer_2"], name) < 1e-3
