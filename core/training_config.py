"""How to train: the options of every run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextscale.core.optim import Schedule


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The defaults are VAR's recipe.

    Attributes:
        output: folder for checkpoints, logs and sample sheets.
        epochs: length of the run, in passes over the data.
        batch_size: samples per optimiser step, over all processes and accumulated micro-batches.
        accumulation: micro-batches per optimiser step.
        optimizer: ``adamw``, or ``muon`` for the matrices inside the model (:mod:`nextscale.core.muon`).
        learning_rate: peak rate per 256 samples: the rate used is this times batch_size / 256.
        schedule, start_rate, end_rate: see :class:`nextscale.core.optim.Schedule`.
        warmup_epochs: None: one fiftieth of the run.
        weight_decay_end: None: as ``weight_decay``.
        grad_clip: largest global gradient norm; 0 turns clipping off.
        average: decay of an exponential moving average of the weights, which is what is kept at the end; 0: none.
        precision: arithmetic of the blocks; weights stay float32.
        sharding: how several processes share a model: ``none``: each has a copy (DDP); ``full``: each has a part of
            the weights, gradients and states of models with transformer blocks (FSDP2), others are copied. One process
            alone has all either way.
        log_every, save_every, sample_every, validate_every: in steps; 0: only at the end.
        keep: checkpoints to keep, the newest.
    """

    output: str = "runs/training"
    epochs: float = 200.0
    batch_size: int = 768
    accumulation: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
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
    sharding: Literal["none", "full"] = "none"
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
