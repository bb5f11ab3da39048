"""The training loop every task runs on: resumable, interruptible, distributed by Hugging Face Accelerate.

A task says what its loss is; the loop owns optimisers, schedules, precision, averaging of weights,
checkpoints and logs.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nextscale.core.checkpoint import CheckpointError, read_tensors, write_tensors
from nextscale.core.interrupt import Interrupted, InterruptGuard
from nextscale.core.optim import ExponentialAverage, Schedule, parameter_groups
from nextscale.core.runlog import Means, Metrics, RunLog
from nextscale.core.transformer import NextScaleTransformer

Batch = dict[str, Any]


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The defaults are VAR's recipe.

    Attributes:
        output: folder for checkpoints, logs and sample sheets.
        epochs: length of the run, in passes over the data.
        batch_size: samples per optimiser step, over all processes and accumulated micro-batches.
        accumulation: micro-batches per optimiser step.
        learning_rate: peak rate per 256 samples: the rate used is this times batch_size / 256.
        schedule, start_rate, end_rate: see :class:`nextscale.core.optim.Schedule`.
        warmup_epochs: None: one fiftieth of the run.
        weight_decay_end: None: as ``weight_decay``.
        grad_clip: largest global gradient norm; 0 turns clipping off.
        average: decay of an exponential moving average of the weights, which is what is kept at the end; 0: none.
        precision: arithmetic of the blocks; weights stay float32.
        log_every, save_every, sample_every, validate_every: in steps; 0: only at the end.
        keep: checkpoints to keep, the newest.
    """

    output: str = "runs/training"
    epochs: float = 200.0
    batch_size: int = 768
    accumulation: int = 1
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    schedule: str = "lin0"
    warmup_epochs: float | None = None
    start_rate: float = 0.005
    end_rate: float = 0.1
    grad_clip: float = 2.0
    average: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    workers: int = 0
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 0
    validate_every: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.accumulation < 1 or self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} must be a positive multiple of accumulation {self.accumulation}"
            )
        if self.keep < 1:
            raise ValueError(f"keep is {self.keep}, at least the newest checkpoint must be kept: give 1 or more")

    def plan(self, steps_per_epoch: float) -> Schedule:
        """Learning rate and weight decay over the steps of the run."""
        warmup = self.epochs / 50 if self.warmup_epochs is None else self.warmup_epochs
        return Schedule(
            kind=self.schedule,
            warmup=warmup * steps_per_epoch,
            total=max(round(self.epochs * steps_per_epoch), 1),
            start=self.start_rate,
            end=self.end_rate,
            decay=self.weight_decay,
            decay_end=self.weight_decay if self.weight_decay_end is None else self.weight_decay_end,
        )


class TrainingTask:
    """What is trained: modules in one or more phases per step, and the loss of each.

    Attributes:
        name: of the system; a checkpoint of another system is refused.
        phases: modules with an optimiser of their own, in the order they are updated at every step. Most
            tasks have one; an adversarial tokenizer has its discriminator as a second.
    """

    name: str
    phases: dict[str, nn.Module]

    def active(self, phase: str, step: int) -> bool:
        """Whether a phase is updated at this step."""
        return True

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        """The loss of a phase on a micro-batch, and what to log.

        Args:
            module: the phase's module as it must be called (wrapped for distributed training).
        """
        raise NotImplementedError

    def after_step(self, step: int) -> Metrics:
        """Called after every optimiser step, on every process; what it returns is logged."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must be kept beside weights and optimisers to resume."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class _Phase:
    module: nn.Module
    wrapped: nn.Module
    optimizer: Any
    average: ExponentialAverage | None


@dataclass
class Hooks:
    """What a run shows along the way; each is called on the main process with the averaged weights in place.

    Attributes:
        sample: draws a sample sheet, given the step.
        validate: measures on held-out data, given the step.
        progress: called at every step with (step, steps, metrics of the last log).
    """

    sample: Callable[[int], None] | None = None
    validate: Callable[[int], Metrics] | None = None
    progress: Callable[[int, int, dict[str, float]], None] | None = None


class Trainer:
    """Runs a task.

    Args:
        config: how.
        task: what.
        batches: gives the endless stream of micro-batches of one process from a micro-batch number on:
            ``batches(start, micro_batch_size)``; the same number always gives the same batch. A batch may name
            under ``skipped`` the samples that could not be read: they are counted and listed in the output folder.
        samples_per_epoch: size of the data.
    """

    def __init__(
        self,
        config: TrainingConfig,
        task: TrainingTask,
        batches: Callable[[int, int], Iterator[Batch]],
        samples_per_epoch: int,
        hooks: Hooks | None = None,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import set_seed

        set_seed(config.seed)
        # Accelerate keeps one precision per process; a run after one in another precision starts afresh.
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.precision:
            AcceleratorState._reset_state()
        self.config, self.task, self.hooks = config, task, hooks or Hooks()
        cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
        self.accelerator = Accelerator(mixed_precision=config.precision, cpu=cpu)
        per_step = config.accumulation * self.accelerator.num_processes
        if config.batch_size % per_step:
            raise ValueError(
                f"batch_size {config.batch_size} does not divide over {self.accelerator.num_processes} processes "
                f"x {config.accumulation} accumulated micro-batches"
            )
        self.micro_batch = config.batch_size // per_step
        self.plan = config.plan(samples_per_epoch / config.batch_size)
        self.samples_per_epoch = samples_per_epoch
        self.batches = batches
        self._folder = Path(config.output)
        self._peak = config.learning_rate * config.batch_size / 256
        self._phases = {name: self._prepare(module) for name, module in task.phases.items()}
        self._sums = Means()
        self.step = 0
        self.seconds = 0.0

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.plan.total

    def _prepare(self, module: nn.Module) -> _Phase:
        config = self.config
        if config.gradient_checkpointing:
            for part in module.modules():
                if isinstance(part, NextScaleTransformer):
                    part.gradient_checkpointing = True
        module.train()
        groups = parameter_groups(module, config.weight_decay)
        fused = self.accelerator.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, lr=self._peak, betas=config.betas, fused=fused or None)
        callable_module = torch.compile(module) if config.compile else module
        wrapped, optimizer = self.accelerator.prepare(callable_module, optimizer)
        average = ExponentialAverage(module, config.average) if config.average else None
        return _Phase(module, wrapped, optimizer, average)

    # --- checkpoints -------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints of the run, oldest first."""
        return sorted(p for p in (self._folder / "checkpoints").glob("step-*.pt") if re.fullmatch(r"step-\d+", p.stem))

    def save(self) -> Path | None:
        """Write a checkpoint of the current step (main process), keeping the newest few."""
        path = self._folder / "checkpoints" / f"step-{self.step:08d}.pt"
        if self.accelerator.is_main_process:
            content = {
                "task": self.task.name,
                "step": self.step,
                "seconds": self.seconds,
                "config": json.dumps(asdict(self.config)),
                "phases": {
                    name: {
                        "module": _trained_state(phase.module),
                        "optimizer": phase.optimizer.state_dict(),
                        "average": phase.average.state_dict() if phase.average else None,
                    }
                    for name, phase in self._phases.items()
                },
                "means": self._sums.state_dict(),
                "extra": self.task.state_dict(),
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            }
            write_tensors(path, content)
            for old in self.checkpoints()[: -self.config.keep]:
                old.unlink()
        self.accelerator.wait_for_everyone()
        return path

    def resume(self) -> bool:
        """Continue from the newest checkpoint of the output folder, if there is one.

        Raises:
            CheckpointError: the checkpoint is of another system or other sizes.
        """
        found = self.checkpoints()
        if not found:
            return False
        content = read_tensors(found[-1])
        if content.get("task") != self.task.name:
            raise CheckpointError(
                f"{found[-1]} is a checkpoint of {content.get('task')!r}, this run trains {self.task.name!r}: "
                "give another output folder"
            )
        for name, phase in self._phases.items():
            saved = content["phases"].get(name)
            if saved is None:
                raise CheckpointError(f"{found[-1]} has no part {name!r}: it was written under another configuration")
            try:
                missing, unexpected = phase.module.load_state_dict(saved["module"], strict=False)
            except RuntimeError as error:
                raise CheckpointError(f"{found[-1]} does not fit this configuration: {error}") from None
            missing = sorted(set(missing) & set(_trained_state(phase.module)))
            if missing or unexpected:
                raise CheckpointError(
                    f"{found[-1]} does not fit this configuration: missing {missing[:3]}, unknown {unexpected[:3]}"
                )
            phase.optimizer.load_state_dict(saved["optimizer"])
            if phase.average is not None and saved["average"] is not None:
                phase.average.load_state_dict(saved["average"])
            elif phase.average is not None:
                phase.average = ExponentialAverage(phase.module, self.config.average)
        self._sums.load_state_dict(content["means"])
        self.task.load_state_dict(content["extra"])
        torch.set_rng_state(content["random"])
        if torch.cuda.is_available() and content["random_cuda"]:
            torch.cuda.set_rng_state_all(content["random_cuda"])
        self.step, self.seconds = content["step"], content["seconds"]
        return True

    # --- the loop ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            Interrupted: Ctrl-C or a termination signal; the state is saved first.
            ValueError: the loss is not finite.
        """
        self.resume()
        if self.accelerator.is_main_process:
            for unfinished in (self._folder / "checkpoints").glob(".step-*.tmp"):
                unfinished.unlink()  # of a run that was killed while it saved
        log = RunLog(self._folder, self.step, self.accelerator.is_main_process)
        batches = self.batches(self.step * self.config.accumulation, self.micro_batch)
        sums, latest, mark = self._sums, {}, time.perf_counter()
        logged = self.step
        with InterruptGuard() as interrupt:
            while self.step < self.steps:
                micro_batches = [next(batches) for _ in range(self.config.accumulation)]
                for batch in micro_batches:
                    log.skip(batch.pop("skipped", ()))
                self._train_step(micro_batches, sums)
                self.step += 1
                stop = interrupt.caught is not None  # looked at once: a later signal waits for the next step
                save = stop or self._due(self.config.save_every)
                if save or self._due(self.config.log_every):
                    means = self._over_processes(sums.means())
                    if not math.isfinite(means["loss"]):
                        raise ValueError(
                            f"the loss is {means['loss']} at step {self.step}; lower the learning rate or use "
                            f"float32. The last checkpoint in {self._folder} is from before"
                        )
                if self._due(self.config.log_every):
                    latest = means
                    sums.clear()
                    now = time.perf_counter()
                    elapsed, mark = now - mark, now
                    self.seconds += elapsed
                    latest["samples_per_second"] = (self.step - logged) * self.config.batch_size / elapsed
                    logged = self.step
                    if log.skipped:
                        latest["skipped"] = float(len(log.skipped))
                    log.write(self.step, {**latest, "seconds": self.seconds})
                if self.hooks.progress is not None:
                    self.hooks.progress(self.step, self.steps, latest)
                if save:
                    self.save()
                self._show(log)
                if stop and self.step < self.steps:
                    raise Interrupted(f"stopped at step {self.step} of {self.steps}; run the same command to go on")

    def _over_processes(self, means: dict[str, float]) -> dict[str, float]:
        """Mean over all processes, each of which calls this."""
        if self.accelerator.num_processes == 1:
            return means
        values = torch.tensor(list(means.values()), device=self.accelerator.device)
        return dict(zip(means, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def _due(self, every: int) -> bool:
        return self.step == self.steps or (every > 0 and self.step % every == 0)

    def _train_step(self, micro_batches: list[Batch], sums: Means) -> None:
        config, accelerator = self.config, self.accelerator
        micro_batches = [_to_device(batch, accelerator.device) for batch in micro_batches]
        for name, phase in self._phases.items():
            if not self.task.active(name, self.step):
                continue
            rate = self.plan.apply(phase.optimizer, self._peak, self.step)
            for number, batch in enumerate(micro_batches):
                last = number == len(micro_batches) - 1
                with accelerator.no_sync(phase.wrapped) if not last else nullcontext(), accelerator.autocast():
                    loss, metrics = self.task.loss(name, phase.wrapped, batch, self.step)
                    accelerator.backward(loss / config.accumulation)
                prefix = "" if len(self._phases) == 1 or name == next(iter(self._phases)) else f"{name}/"
                sums.add({f"{prefix}loss": loss.detach(), **{f"{prefix}{k}": v for k, v in metrics.items()}})
            if config.grad_clip:
                norm = accelerator.clip_grad_norm_(phase.wrapped.parameters(), config.grad_clip)
                sums.add({f"{prefix}grad_norm": norm.detach()})
            phase.optimizer.step()
            phase.optimizer.zero_grad(set_to_none=True)
            if phase.average is not None:
                phase.average.update(phase.module)
            sums.add({f"{prefix}learning_rate": rate})
        sums.add(self.task.after_step(self.step))

    def _show(self, log: RunLog) -> None:
        """Sample sheets and validation, on the averaged weights."""
        config = self.config
        sample = self.hooks.sample if self._due(config.sample_every) else None
        validate = self.hooks.validate if self._due(config.validate_every) else None
        if (sample is None and validate is None) or not self.accelerator.is_main_process:
            return
        with self.averaged():
            if sample is not None:
                sample(self.step)
            if validate is not None:
                log.write(self.step, {f"validation/{k}": float(v) for k, v in validate(self.step).items()})

    def averaged(self) -> _Averaged:
        """A context in which the modules hold their averaged weights, in evaluation form."""
        return _Averaged(list(self._phases.values()))


class _Averaged:
    def __init__(self, phases: list[_Phase]) -> None:
        self._phases = phases

    def __enter__(self) -> None:
        self._random = torch.get_rng_state()
        # By parameter and not by name: adapters may be folded into the weights meanwhile.
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        for phase in self._phases:
            names = phase.average.shadow if phase.average else {}
            self._kept += [(p, p.detach().clone()) for n, p in phase.module.named_parameters() if n in names]
            if phase.average:
                phase.average.copy_to(phase.module)
            phase.module.eval()

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for parameter, value in self._kept:
                parameter.copy_(value)
        for phase in self._phases:
            phase.module.train()
        torch.set_rng_state(self._random)


def _trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Buffers, and the parameters that take gradients: frozen parts come from their own files."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
