"""The training loop: resumed is the same as unbroken, and what goes wrong is said."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nextscale.core.checkpoint import CheckpointError
from nextscale.core.training import Batch, Hooks, Interrupted, Metrics, Trainer, TrainingConfig, TrainingTask

SAMPLES = 32


class Noisy(TrainingTask):
    """Fits a line; dropout makes the result depend on the global generator, ``seen`` on every step."""

    name = "noisy"

    def __init__(self, phases: int = 1) -> None:
        torch.manual_seed(5)
        self.phases = {
            f"part{i}": nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 1)) for i in range(phases)
        }
        self.seen = torch.zeros(())
        self.poison: int | None = None

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        loss = (module(batch["x"]) - batch["y"]).square().mean()
        if step == self.poison:
            loss = loss * float("nan")
        return loss, {"size": float(len(batch["x"]))}

    def after_step(self, step: int) -> Metrics:
        self.seen = self.seen * 0.9 + step
        return {"seen": self.seen}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"].clone()


class Plain(Noisy):
    """Without dropout, so that micro-batches and processes may be compared."""

    name = "plain"

    def __init__(self, phases: int = 1) -> None:
        super().__init__(phases)
        for module in self.phases.values():
            module[1].p = 0.0  # type: ignore[index]


def data(start: int, micro_batch: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 3, generator=generator)
    y = x.sum(1, keepdim=True)
    while True:
        rows = torch.arange(start * micro_batch, (start + 1) * micro_batch) % SAMPLES
        yield {"x": x[rows], "y": y[rows], "name": ["a"]}
        start += 1


def config(folder: Path, **changes: Any) -> TrainingConfig:
    usual = TrainingConfig(
        output=str(folder), epochs=6, batch_size=16, learning_rate=0.1, average=0.9, log_every=5, save_every=4
    )
    return replace(usual, **changes)


def trainer(folder: Path, task: TrainingTask | None = None, hooks: Hooks | None = None, **changes: Any) -> Trainer:
    return Trainer(config(folder, **changes), task or Noisy(), data, SAMPLES, hooks)


def rows(folder: Path) -> list[dict[str, float]]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def weights(run: Trainer) -> list[Tensor]:
    """Of all phases: the parameters as they are and their averages."""
    parameters = [p.detach().clone() for m in run.task.phases.values() for p in m.parameters()]
    with run.averaged():
        return parameters + [p.detach().clone() for m in run.task.phases.values() for p in m.parameters()]


def stop_at(step: int, number: int = signal.SIGINT) -> Hooks:
    return Hooks(progress=lambda done, steps, metrics: os.kill(os.getpid(), number) if done == step else None)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    folder = tmp_path_factory.mktemp("unbroken")
    run = trainer(folder, Noisy(2))
    run.run()
    return folder, weights(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_stops_and_goes_on_as_if_nothing_had_been(
    number: int, unbroken: tuple[Path, list[Tensor]], tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped at step 7 of 12; run the same command"):
        trainer(tmp_path, Noisy(2), stop_at(6, number)).run()  # noticed when the next step is done
    assert signal.getsignal(number) is before
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] != []
    (tmp_path / "checkpoints" / ".step-00000008.pt.abc.tmp").write_text("of a killed run")
    again = trainer(tmp_path, Noisy(2))
    again.run()
    assert rows(tmp_path) == rows(unbroken[0])  # the window of step 10 began before the interruption
    assert same(weights(again), unbroken[1])
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000008.pt", "step-00000012.pt"]
    again.run()  # a finished run has nothing to do, and repeats no row
    assert rows(tmp_path) == rows(unbroken[0])


PROGRAM = """
import importlib.util, os, signal, sys, pathlib
spec = importlib.util.spec_from_file_location("here", sys.argv[1])
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
here.trainer(pathlib.Path(sys.argv[2]), here.Noisy(2), here.stop_at(int(sys.argv[3]), signal.SIGKILL)).run()
"""


def test_a_killed_run_goes_on_bit_for_bit(unbroken: tuple[Path, list[Tensor]], tmp_path: Path) -> None:
    step = torch.randint(1, 12, (), generator=torch.Generator().manual_seed(os.getpid())).item()
    command = [sys.executable, "-c", PROGRAM, __file__, str(tmp_path), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = trainer(tmp_path, Noisy(2))
    assert again.resume() == (step > 4)  # the hook runs before the step's own checkpoint
    again.run()
    assert rows(tmp_path) == rows(unbroken[0]), f"killed at step {step}"
    assert same(weights(again), unbroken[1]), f"killed at step {step}"


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / str(n), Plain(), accumulation=n, average=0.0) for n in (1, 2)]
    for run in runs:
        run.run()
    for whole, parts in zip(*(weights(run) for run in runs), strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    whole, parts = (rows(tmp_path / str(n)) for n in (1, 2))
    assert [r["loss"] for r in parts] == pytest.approx([r["loss"] for r in whole], rel=1e-5)
    assert (whole[0]["size"], parts[0]["size"]) == (16, 8)


def test_average_is_in_place_only_inside(tmp_path: Path) -> None:
    shown: dict[str, Any] = {}
    task = Plain()
    module = task.phases["part0"]

    def validate(step: int) -> Metrics:
        torch.rand(3)  # draws of a hook change nothing
        shown["training"], shown["average"] = module.training, [p.detach().clone() for p in module.parameters()]
        return {"score": 2.0}

    hooks = Hooks(validate=validate, sample=lambda step: shown.update(sampled=step))
    run = trainer(tmp_path, task, hooks, validate_every=6, epochs=3)
    run.run()
    assert module.training
    assert shown["training"] is False
    assert shown["sampled"] == 6
    assert not same(shown["average"], list(module.parameters()))
    assert same(shown["average"], weights(run)[4:])
    assert rows(tmp_path)[-1] == {"step": 6, "validation/score": 2.0}


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path: Path) -> None:
    task = Noisy()
    task.poison = 6
    with pytest.raises(ValueError, match="the loss is nan at step 8; lower the learning rate"):
        trainer(tmp_path, task, save_every=4, log_every=0).run()
    assert [p.stem for p in trainer(tmp_path).checkpoints()] == ["step-00000004"]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_every=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))

    run.hooks.progress = fill
    try:
        with pytest.raises(OSError, match=r"step-00000004\.pt could not be written: File too large\. What was"):
            run.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002.pt"]
    again = trainer(tmp_path)
    assert again.resume()
    assert again.step == 2


def test_unreadable_samples_are_counted_and_named_once(tmp_path: Path) -> None:
    def batches(start: int, size: int) -> Iterator[Batch]:
        for number, batch in enumerate(data(start, size), start):
            yield {**batch, "skipped": ("a.png",) if number % 2 else ("b\nc.png",)}

    for epochs in (1, 2):  # the second run goes on with the first
        Trainer(config(tmp_path, epochs=epochs, log_every=1), Plain(), batches, SAMPLES).run()
    assert (tmp_path / "skipped.txt").read_text().splitlines() == ["b c.png", "a.png"]
    assert [row["skipped"] for row in rows(tmp_path)][:2] == [1, 2]


class Wider(Noisy):
    def __init__(self) -> None:
        super().__init__()
        self.phases["part0"] = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.2), nn.Linear(5, 1))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Plain, "is a checkpoint of 'noisy', this run trains 'plain': give another output folder"),
        (Wider, "does not fit this configuration: .*size mismatch"),
        (lambda: Noisy(2), "has no part 'part1': it was written under another configuration"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    task: Callable[[], TrainingTask], message: str, tmp_path: Path
) -> None:
    trainer(tmp_path, epochs=1).run()
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        trainer(tmp_path, task()).run()


def test_averaging_may_be_turned_on_later(tmp_path: Path) -> None:
    first = trainer(tmp_path, epochs=3, average=0.0)
    first.run()
    second = trainer(tmp_path, epochs=3, average=0.9)
    assert second.resume()
    half = len(weights(second)) // 2
    assert same(weights(second)[half:], weights(first)[:half])


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_runs_of_different_precision_follow_each_other(precision: Any, tmp_path: Path) -> None:
    for each in ("no", precision, "no"):
        run = trainer(tmp_path / each, Plain(), precision=each, epochs=1)
        run.run()
        assert run.accelerator.mixed_precision == each
    assert all(p.dtype == torch.float32 for p in weights(run))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 10, "accumulation": 3}, "batch_size 10 must be a positive multiple of accumulation 3"),
        ({"keep": 0}, "keep is 0"),
    ],
)
def test_wrong_configurations_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)
