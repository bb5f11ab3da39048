"""Runs of a small transformer over one, two and three processes; ``test_training_distributed.py`` reads the results."""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.core.checkpoint import write_json
from nextscale.core.random import sample_draws, step_draws
from nextscale.core.training import Batch, Hooks, Metrics, Trainer, TrainingConfig, TrainingTask
from nextscale.core.transformer import NextScaleTransformer, TransformerConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from processes import launch, warm_up  # beside this folder, also where it runs as a program

SAMPLES, STEPS = 24, 12


class Net(nn.Module):
    """A transformer with a frozen part, a part outside of the blocks, and a buffer that training changes."""

    def __init__(self, conditioning: str) -> None:
        super().__init__()
        sizes = TransformerConfig(8, 3, 2, mlp_ratio=2, drop_path=0.4, conditioning=conditioning)  # type: ignore[arg-type]
        self.enter, self.transformer, self.head = nn.Linear(3, 8), NextScaleTransformer(sizes), nn.Linear(8, 1)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.spare = nn.Parameter(torch.zeros(2))  # no loss reaches it
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x + self.frozen(x))
        return self.transformer(x, self.transformer.modulate(x.mean(1)))


class Fitting(TrainingTask):
    """Fits a line under noise; what is drawn is the sample's and the step's. A method of the network is used outside
    of its forward pass."""

    name = "fitting"

    def __init__(self, conditioning: str = "block", phases: int = 1) -> None:
        torch.manual_seed(3)
        self.net = Net(conditioning)
        self.phases: dict[str, nn.Module] = {"net": self.net}
        if phases == 2:
            self.phases["judge"] = nn.Linear(8, 1)
        self.after = torch.zeros(())

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        if phase == "judge":
            return module(batch["hidden"]).square().mean(), {}
        noise = sample_draws(batch, "noise").normal((len(batch["x"]), 1, 1), batch["x"].device)
        common = torch.randn((), generator=step_draws(step, "common"))
        hidden = module(batch["x"] + 0.1 * noise + 0.1 * common)
        batch["hidden"] = hidden.detach()
        self.net.seen += 1
        loss = (self.net.head(hidden) - batch["y"]).square().mean()
        return loss, {"noise": noise.mean()}

    def after_step(self, step: int) -> Metrics:
        self.after = self.after + step
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"after": self.after}

    def load_state_dict(self, state: Any) -> None:
        self.after = state["after"].clone()


def data(start: int, micro_batch: int) -> Iterator[Batch]:
    """Consecutive samples, of which each process has its part."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 4, 3, generator=generator)
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    while True:
        rows = (torch.arange(micro_batch) + (start * ranks + rank) * micro_batch).tolist()
        places = [row % SAMPLES for row in rows]
        yield {"x": x[places], "y": x[places].sum(2, keepdim=True), "seeds": rows, "skipped": [f"{rank}.png"]}
        start += 1


def trainer(folder: Path, task: TrainingTask, hooks: Hooks | None = None, **changes: Any) -> Trainer:
    usual = TrainingConfig(
        output=str(folder), epochs=6, batch_size=12, learning_rate=0.2, average=0.9, log_every=1, save_every=4
    )
    return Trainer(replace(usual, **changes), task, data, SAMPLES, hooks)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def finished(run: Trainer) -> dict[str, Any]:
    """The end of a run, as the main process has it."""
    if not run.processes.main:
        return {}
    with run.averaged():
        state = {f"{name}.{k}": v.tolist() for name, m in run.task.phases.items() for k, v in m.state_dict().items()}
    return {"state": state, "after": float(run.task.after), "log": rows(Path(run.config.output))}  # type: ignore[attr-defined]


def train(folder: Path, conditioning: str = "block", phases: int = 1, **changes: Any) -> Any:
    run = trainer(folder, Fitting(conditioning, phases), **changes)
    validated = []
    run.hooks.validate = lambda step: validated.append(len(list(run.task.phases["net"].parameters()))) or {"v": 1.0}  # type: ignore[func-returns-value]
    run.run()
    return finished(run)


def stopped(folder: Path, step: int, rank: int, **changes: Any) -> Any:
    """Stopped in one process; tells how all end."""

    def interrupt(done: int, steps: int, metrics: Any) -> None:
        if done == step and int(os.environ.get("RANK", 0)) == rank:
            for _ in range(2 if "RANK" in os.environ else 1):  # what starts several processes sends several signals
                os.kill(os.getpid(), signal.SIGTERM)

    trainer(folder, Fitting(), Hooks(progress=interrupt), **changes).run()


def full_disk(folder: Path, rank: int, **changes: Any) -> Any:
    """One process cannot write from step 5 on."""

    def fill(done: int, steps: int, metrics: Any) -> None:
        if done == 5:
            run._writer.finish()  # the checkpoint of step 4
            if int(os.environ["RANK"]) == rank:
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = trainer(folder, Fitting(), Hooks(progress=fill), log_every=0, **changes)
    run.run()


def names(folder: Path) -> Sequence[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def main(folder: Path) -> None:
    found: dict[str, Any] = {}
    warm_up()

    def alone(name: str, **options: Any) -> Any:
        return _forked(lambda: train(folder / name, **options))

    found["alone"] = alone("alone")
    found["ddp"] = launch(2, lambda rank: train(folder / "ddp"))[0]
    found["fsdp"] = launch(2, lambda rank: train(folder / "fsdp", sharding="full"))[0]
    more = {"conditioning": "shared", "phases": 2, "accumulation": 2, "gradient_checkpointing": True}
    found["more_alone"] = alone("more_alone", **more)
    found["more_ddp"] = launch(2, lambda rank: train(folder / "more_ddp", **more))[0]
    found["more_fsdp"] = launch(2, lambda rank: train(folder / "more_fsdp", sharding="full", **more))[0]
    half = {"precision": "bf16", "average": 0.0}
    found["half_alone"] = alone("half_alone", **half)
    found["half_fsdp"] = launch(2, lambda rank: train(folder / "half_fsdp", sharding="full", **half))[0]
    found["muon_alone"] = alone("muon_alone", optimizer="muon")
    found["muon_fsdp"] = launch(2, lambda rank: train(folder / "muon_fsdp", sharding="full", optimizer="muon"))[0]

    found["stopped"] = launch(2, lambda rank: stopped(folder / "stopped", 5, 1, sharding="full"))
    found["stopped_names"] = names(folder / "stopped")
    for ranks in (1, 3):
        shutil.copytree(folder / "stopped", folder / f"on_{ranks}")
    found["on_1"] = alone("on_1")
    found["on_1_names"] = names(folder / "on_1")
    found["on_3"] = launch(3, lambda rank: train(folder / "on_3", sharding="full"))[0]
    found["on_3_names"] = names(folder / "on_3")
    _forked(lambda: stopped(folder / "file", 5, 0))
    found["file_names"] = names(folder / "file")
    found["of_file"] = launch(2, lambda rank: train(folder / "file", sharding="full"))[0]

    for rank in (0, 1):
        place = folder / f"full_{rank}"
        found[f"full_{rank}"] = launch(2, lambda _, rank=rank, place=place: full_disk(place, rank))  # type: ignore[misc]
        found[f"full_{rank}_names"] = names(place)
    write_json(folder / "results.json", found)


def _forked(function: Any) -> Any:
    """In a process of its own that belongs to no group."""

    def child(rank: int) -> Any:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        return function()

    return launch(1, child)[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
