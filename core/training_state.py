"""What a checkpoint of a run holds, and how it is put back: of one process's file or of all processes' folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextscale.core.checkpoint import CheckpointError, read_tensors
from nextscale.core.distributed_checkpoint import STATE_FILE, FolderReader
from nextscale.core.optim import ExponentialAverage
from nextscale.core.phases import Phase, trained_state
from nextscale.core.sharding import fill

Phases = Mapping[str, Phase]


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first: files of one process, folders of several."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+(\.pt)?", path.name)]
    whole = [path for path in found if path.suffix == ".pt" or (path / STATE_FILE).is_file()]
    return sorted(whole, key=lambda path: int(path.stem.removeprefix("step-")))


# --- names of tensors ---------------------------------------------------------------------------------


def _optimized(phase: Phase) -> dict[str, torch.nn.Parameter]:
    """Parameters by name, in the optimiser's order."""
    names = {id(parameter): name for name, parameter in phase.module.named_parameters()}
    return {names[id(p)]: p for group in phase.optimizer.param_groups for p in group["params"]}


def tensors_of(phases: Phases) -> dict[str, Tensor]:
    """All tensors of phases, by name: PHASE/module/NAME, PHASE/average/NAME, PHASE/optimizer/NAME/KEY."""
    tensors: dict[str, Tensor] = {}
    for name, phase in phases.items():
        tensors |= {f"{name}/module/{key}": value.detach() for key, value in trained_state(phase.module).items()}
        if phase.average is not None:
            tensors |= {f"{name}/average/{key}": value for key, value in phase.average.shadow.items()}
        for key, parameter in _optimized(phase).items():
            state = phase.optimizer.state.get(parameter, {})
            tensors |= {f"{name}/optimizer/{key}/{kind}": value for kind, value in state.items()}
    return tensors


def file_content(phases: Phases) -> dict[str, Any]:
    """The same, as one process's file holds it."""
    return {
        name: {
            "module": trained_state(phase.module),
            "optimizer": phase.optimizer.state_dict(),
            "average": phase.average.state_dict() if phase.average else None,
        }
        for name, phase in phases.items()
    }


def folder_content(phases: Phases) -> dict[str, Any]:
    """What is no tensor of the phases."""
    return {name: {"updates": phase.average.updates if phase.average else 0} for name, phase in phases.items()}


# --- reading ------------------------------------------------------------------------------------------


class Saved:
    """A checkpoint that is read.

    Attributes:
        content: plain values.
        shapes: of tensors, named as by :func:`tensors_of`.

    Raises:
        CheckpointError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            self._folder = FolderReader(path)
            self.content, self.shapes = self._folder.content, self._folder.shapes
        else:
            self.content = read_tensors(path)
            self._held = {
                f"{phase}/{part}/{key}": value
                for phase, saved in self.content["phases"].items()
                for part, values in (
                    ("module", saved["module"]),
                    ("average", (saved["average"] or {}).get("shadow", {})),
                )
                for key, value in values.items()
            }
            self.shapes = {name: tuple(value.shape) for name, value in self._held.items()}

    def name_optimizer(self, name: str, phase: Phase) -> None:
        """A file counts the optimiser's parameters; give what it holds of them its names.

        Raises:
            CheckpointError: there are others.
        """
        if self.path.is_dir():
            return
        saved, names = self.content["phases"][name]["optimizer"], list(_optimized(phase))
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        if len(numbers) != len(names):
            raise self.unfit(f"{len(numbers)} parameters were trained, now {len(names)} are")
        for number, key in zip(numbers, names, strict=True):
            for kind, value in saved["state"].get(number, {}).items():
                self._held[f"{name}/optimizer/{key}/{kind}"] = value
                self.shapes[f"{name}/optimizer/{key}/{kind}"] = tuple(value.shape)

    def updates(self, name: str) -> int:
        """How often the averaged weights were updated."""
        saved = self.content["phases"][name]
        updates: int = saved["updates"] if self.path.is_dir() else saved["average"]["updates"]
        return updates

    def under(self, prefix: str) -> list[str]:
        """Names of tensors that begin so, without it."""
        return [name.removeprefix(prefix) for name in self.shapes if name.startswith(prefix)]

    def read(self, targets: dict[str, Tensor]) -> None:
        """Fill tensors in place.

        Raises:
            CheckpointError: one has another shape.
        """
        for name, target in targets.items():
            if self.shapes[name] != tuple(target.shape):
                key = name.split("/", 2)[2]
                raise self.unfit(f"size mismatch of {key}: {self.shapes[name]} there, {tuple(target.shape)} here")
        if self.path.is_dir():
            self._folder.read(targets)
        else:
            for name, target in targets.items():
                fill(target, self._held[name])

    def unfit(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} does not fit this configuration: {why}")


def restore(phases: Phases, saved: Saved) -> None:
    """Put weights, averages and optimisers back, whatever the number of processes that saved them.

    Raises:
        CheckpointError: they are of another model.
    """
    targets: dict[str, Tensor] = {}
    anew = []
    for name, phase in phases.items():
        if name not in saved.content["phases"]:
            raise CheckpointError(f"{saved.path} has no part {name!r}: it was written under another configuration")
        saved.name_optimizer(name, phase)
        own, there = phase.module.state_dict(), saved.under(f"{name}/module/")
        missing, unknown = sorted(set(trained_state(phase.module)) - set(there)), sorted(set(there) - set(own))
        if missing or unknown:
            raise saved.unfit(f"missing {missing[:3]}, unknown {unknown[:3]}")
        targets |= {f"{name}/module/{key}": own[key].detach() for key in there}
        if phase.average is not None:
            if set(phase.average.shadow) <= set(saved.under(f"{name}/average/")):
                targets |= {f"{name}/average/{key}": value for key, value in phase.average.shadow.items()}
                phase.average.updates = saved.updates(name)
            else:  # it was turned on meanwhile
                anew.append(phase)
        for key, parameter in _optimized(phase).items():
            kinds = saved.under(f"{name}/optimizer/{key}/")
            state = {kind: _state(kind, parameter, phase.optimizer) for kind in kinds}
            phase.optimizer.state[parameter] = state
            targets |= {f"{name}/optimizer/{key}/{kind}": value for kind, value in state.items()}
    saved.read(targets)
    for phase in anew:
        assert phase.average is not None
        phase.average = ExponentialAverage(phase.module, phase.average.decay)


def _state(kind: str, parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
    """A tensor as the optimiser keeps it for a parameter."""
    if kind == "step":
        fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        return torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
    return torch.zeros_like(parameter, memory_format=torch.preserve_format)
