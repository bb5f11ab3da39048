"""The training loop every task runs on: resumable, interruptible, over one process or many.

A task says what its loss is; the loop owns optimisers, schedules, precision, averaging of weights,
checkpoints and logs. Hugging Face Accelerate finds devices and processes, and scales losses of half precision.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale.core.checkpoint import CheckpointError, write_tensors
from nextscale.core.distributed_checkpoint import FolderWriter
from nextscale.core.interrupt import Interrupted, InterruptGuard
from nextscale.core.phases import averages_in_place, gather, prepare, whole_copies
from nextscale.core.processes import Processes, Word, lost_processes_named
from nextscale.core.runlog import Means, Metrics, RunLog
from nextscale.core.sharding import twin, units
from nextscale.core.training_config import TrainingConfig
from nextscale.core.training_state import Saved, checkpoints, file_content, folder_content, restore, tensors_of

__all__ = ["Batch", "Hooks", "Interrupted", "Metrics", "Trainer", "TrainingConfig", "TrainingTask"]

Batch = dict[str, Any]


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

        Of a run over several processes each computes this on its part of the micro-batch. What is drawn for a sample
        comes from :func:`nextscale.core.random.sample_draws`, what the samples of a step share from
        :func:`nextscale.core.random.step_draws`: then a run does not depend on the number of processes. The global
        generator is seeded for each step and process.

        Args:
            module: the phase's module as it must be called (compiled, in the run's precision).
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
        task: what. Where it is sharded, a copy is trained; the one given then holds the whole averaged weights, in the
            main process, while hooks run and at the end.
        batches: gives the endless stream of micro-batches of one process from a micro-batch number on:
            ``batches(start, micro_batch_size)``; the same number always gives the same batch. A batch may name
            under ``skipped`` the samples that could not be read: they are counted and listed in the output folder.
            It may hold ``seeds``, see :func:`nextscale.core.random.sample_draws`.
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
        self.processes = Processes()
        per_step = config.accumulation * self.processes.count
        if config.batch_size % per_step:
            raise ValueError(
                f"batch_size {config.batch_size} does not divide over {self.processes.count} processes "
                f"x {config.accumulation} accumulated micro-batches"
            )
        self.micro_batch = config.batch_size // per_step
        self.plan = config.plan(samples_per_epoch / config.batch_size)
        self.samples_per_epoch = samples_per_epoch
        self.batches = batches
        self._folder = Path(config.output)
        self._peak = config.learning_rate * config.batch_size / 256
        sharded = config.sharding == "full" and self.processes.distributed
        self._sharded = sharded and any(units(module) for module in task.phases.values())
        self._trained = twin(task, self.processes.main) if self._sharded else task
        self._phases = {
            name: prepare(module, config, self.accelerator, self._peak) for name, module in self._trained.phases.items()
        }
        self._writer = FolderWriter(self.processes, self._forget_old)
        self._sums = Means()
        self.step = 0
        self.seconds = 0.0

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.plan.total

    # --- checkpoints -------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints of the run, oldest first."""
        return checkpoints(self._folder / "checkpoints")

    def save(self, wait: bool = True) -> Path:
        """Write a checkpoint of the current step, keeping the newest few; all processes call this.

        One process alone writes a file, several a folder, each its part of it.

        Args:
            wait: until all is on the disk; else several processes write while they go on.

        Raises:
            OSError: it could not be written, or the one before, which was still being written.
        """
        path = self._folder / "checkpoints" / f"step-{self.step:08d}"
        sums = self._sums.state_dict()
        content = {
            "task": self.task.name,
            "step": self.step,
            "seconds": self.seconds,
            "config": json.dumps(asdict(self.config)),
            "means": {**sums, "sums": self.processes.means(sums["sums"])},
            "extra": self._trained.state_dict(),
        }
        if self.accelerator.scaler is not None:
            content["scaler"] = self.accelerator.scaler.state_dict()
        if not self.processes.distributed:
            path = write_tensors(path.with_suffix(".pt"), {**content, "phases": file_content(self._phases)})
            self._forget_old()
            return path
        tensors = tensors_of(self._phases)
        self._writer.start(path, tensors, {**content, "phases": folder_content(self._phases), "tensors": list(tensors)})
        if wait:
            self._writer.finish()
        return path

    def _forget_old(self) -> None:
        for old in self.checkpoints()[: -self.config.keep]:
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()

    def resume(self) -> bool:
        """Continue from the newest checkpoint of the output folder, if there is one; all processes call this.

        Raises:
            CheckpointError: the checkpoint is of another system or other sizes.
        """
        found = self.checkpoints()
        if not found:
            return False
        saved = Saved(found[-1])
        content = saved.content
        if content.get("task") != self.task.name:
            raise CheckpointError(
                f"{found[-1]} is a checkpoint of {content.get('task')!r}, this run trains {self.task.name!r}: "
                "give another output folder"
            )
        restore(self._phases, saved)
        self._sums.load_state_dict(content["means"])
        self._trained.load_state_dict(content["extra"])
        if self.accelerator.scaler is not None and "scaler" in content:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.step, self.seconds = content["step"], content["seconds"]
        return True

    # --- the loop ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            Interrupted: Ctrl-C or a termination signal in any process; the state is saved first.
            ValueError: the loss is not finite.
            OSError: a checkpoint could not be written; in all processes.
            ProcessLost: another process has ended.
        """
        with lost_processes_named(f"Start the same command again: it goes on from the newest of {self._folder}"):
            self.resume()
            self.processes.wait()  # all have read before anything is removed
            if self.processes.main:
                for unfinished in (self._folder / "checkpoints").glob(".step-*.tmp"):  # of a run that was killed
                    shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
            with InterruptGuard(once=not self.processes.distributed) as interrupt:
                self._loop(interrupt)
            self._writer.finish()
            if self._sharded:
                self._gather()

    def _loop(self, interrupt: InterruptGuard) -> None:
        log = RunLog(self._folder, self.step, self.processes.main)
        batches = self.batches(self.step * self.config.accumulation, self.micro_batch)
        sums, latest, mark = self._sums, {}, time.perf_counter()
        logged = self.step
        while self.step < self.steps:
            micro_batches = [next(batches) for _ in range(self.config.accumulation)]
            for batch in micro_batches:
                log.skip(batch.pop("skipped", ()))
            self._train_step(micro_batches, sums)
            self.step += 1
            heard = self.processes.hear(self._word(interrupt))
            if heard is Word.FAILED:
                self.processes.hush()
                self._writer.finish()
            stop = heard is Word.STOP  # looked at once: a later signal waits for the next step
            save = stop or self._due(self.config.save_every)
            if save or self._due(self.config.log_every):
                means = self.processes.means(sums.means())
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
                self.processes.hush()
                self.save(wait=stop or self.step == self.steps)
            self._show(log)
            if stop and self.step < self.steps:
                raise Interrupted(f"stopped at step {self.step} of {self.steps}; run the same command to go on")

    def _word(self, interrupt: InterruptGuard) -> Word:
        """What this process has to say to the others."""
        if not self._writer.poll():
            return Word.FAILED
        return Word.GO_ON if interrupt.caught is None else Word.STOP

    def _due(self, every: int) -> bool:
        return self.step == self.steps or (every > 0 and self.step % every == 0)

    def _train_step(self, micro_batches: list[Batch], sums: Means) -> None:
        config, accelerator, task = self.config, self.accelerator, self._trained
        # Of the step and the process alone: nothing of it need be kept to go on.
        torch.manual_seed(zlib.crc32(f"{config.seed} {self.step} {self.processes.rank}".encode()))
        micro_batches = [_to_device(batch, accelerator.device) for batch in micro_batches]
        for name, phase in self._phases.items():
            if not task.active(name, self.step):
                continue
            prefix = "" if name == next(iter(self._phases)) else f"{name}/"
            rate = self.plan.apply(phase.prepared, self._peak, self.step)
            for number, batch in enumerate(micro_batches, start=1):

                def loss(module: nn.Module, name: str = name, batch: Batch = batch) -> tuple[Tensor, Metrics]:
                    return task.loss(name, module, batch, self.step)

                value, metrics = phase.backward(accelerator, loss, batch, len(micro_batches), number)
                sums.add({f"{prefix}loss": value, **{f"{prefix}{k}": v for k, v in metrics.items()}})
            if config.grad_clip:
                sums.add({f"{prefix}grad_norm": phase.clip(accelerator, config.grad_clip)})
            phase.step()
            sums.add({f"{prefix}learning_rate": rate})
        sums.add(task.after_step(self.step))

    # --- showing -----------------------------------------------------------------------------------------

    def _show(self, log: RunLog) -> None:
        """Sample sheets and validation, on the averaged weights, by the main process; the others wait."""
        config = self.config
        due = self._due(config.sample_every), self._due(config.validate_every)
        if not any(due):
            return
        if self._sharded:
            self._gather()
        sample, validate = self.hooks.sample if due[0] else None, self.hooks.validate if due[1] else None
        if self.processes.main and (sample or validate):
            with self.averaged():
                if sample is not None:
                    sample(self.step)
                if validate is not None:
                    log.write(self.step, {f"validation/{k}": float(v) for k, v in validate(self.step).items()})
        self.processes.wait()

    def _gather(self) -> None:
        """Bring the averaged weights together in the task that hooks see."""
        gather(list(self._phases.values()), list(self.task.phases.values()), self.processes.main)
        self.task.load_state_dict(self._trained.state_dict())

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the modules hold their averaged weights, in evaluation form.

        Of a sharded model, those that were brought together last: before a hook, or at the end of the run.
        """
        if self._sharded:
            whole = list(self.task.phases.values())
            return whole_copies(list(self._phases.values()), whole, self.accelerator.device)
        return averages_in_place(list(self._phases.values()))


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
