"""What a training run takes, on paper: a step is led through its operations on tensors that have shapes but no values.

Parameters, floating-point operations and bytes are therefore those of the code that trains, not of formulas beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import _lru_cache_wrapper
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nextscale.core import attention, fused
from nextscale.core.accounting import Alive, FusedAttention, nbytes
from nextscale.core.training import TrainingConfig, TrainingTask
from nextscale.core.transformer import NextScaleTransformer


@dataclass(frozen=True)
class Gpu:
    """bytes of memory, and peak operations per second in bfloat16 (dense) and float32, of the maker's data sheet."""

    name: str
    memory: float
    bf16: float
    fp32: float


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 141e9, 989e12, 67e12),
        Gpu("h100", 80e9, 989e12, 67e12),
        Gpu("a100", 80e9, 312e12, 19.5e12),
        Gpu("a100-40gb", 40e9, 312e12, 19.5e12),
        Gpu("l40s", 48e9, 362e12, 91.6e12),
        Gpu("rtx4090", 24e9, 165e12, 82.6e12),
    )
}


@dataclass(frozen=True)
class Subject:
    """What is planned: a task on weights without values, and how it is trained.

    batch: makes a micro-batch of so many samples. tokens: of one sample. samples: of an epoch. stored: bytes that
    ``nextscale tokenize`` keeps of a sample, None where this system trains on images only.
    """

    task: TrainingTask
    training: TrainingConfig
    batch: Callable[[int], dict[str, Any]]
    tokens: int
    samples: int
    stored: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. activations: what a step holds at its peak beside weights, gradients and states."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    buckets: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.buckets + self.activations


@dataclass(frozen=True)
class Plan:
    """parameters: trained. frozen: of the tokenizer. forward, flops: operations of one optimiser step over all ranks,
    of the forward passes and of all. steps: of the run.
    """

    parameters: int
    frozen: int
    forward: int
    flops: int
    memory: Memory
    micro_batch: int
    steps: int
    tokens_per_step: int

    def seconds(self, gpu: Gpu, gpus: int, precision: str, utilisation: float) -> float:
        """Of one step, at that share of the GPUs' peak."""
        peak = gpu.fp32 if precision == "no" else gpu.bf16
        return self.flops / (peak * gpus * utilisation)


@contextmanager
def valueless() -> Iterator[None]:
    """Tensors made inside have shapes, types and a device, and neither memory nor values."""
    _forget_tables()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _undrawn():
            yield
    finally:
        _forget_tables()


@contextmanager
def _undrawn() -> Iterator[None]:
    """Truncated normal distributions look at the values they draw; without values there is nothing to look at."""
    drawn = nn.init.trunc_normal_
    nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor
    try:
        yield
    finally:
        nn.init.trunc_normal_ = drawn


def _forget_tables() -> None:
    """Empty the library's caches: a table made without values must not serve a computation with them."""
    modules = [module for name, module in sys.modules.items() if name.startswith("nextscale.") and module is not None]
    for value in {id(value): value for module in modules for value in vars(module).values()}.values():
        if isinstance(value, _lru_cache_wrapper):
            value.cache_clear()


def plan(subject: Subject, gpus: int = 1, sharded: bool = False) -> Plan:
    """Lead one micro-batch through loss and backward. To be called inside :func:`valueless`, where the task was built.

    Args:
        sharded: weights, gradients and states are divided over the GPUs (FSDP), instead of copied (DDP).

    Raises:
        ValueError: the batch does not divide over the GPUs, or the task has several phases.
    """
    config, task = subject.training, subject.task
    per_step = gpus * config.accumulation
    if config.batch_size % per_step:
        raise ValueError(
            f"batch_size {config.batch_size} does not divide over {gpus} GPUs x {config.accumulation} accumulated "
            "micro-batches"
        )
    if len(task.phases) != 1:
        raise ValueError(f"a {task.name} trains {', '.join(task.phases)} in turn; only one network can be planned")
    (name, module), micro = next(iter(task.phases.items())), config.batch_size // per_step
    for part in module.modules():
        if config.gradient_checkpointing and isinstance(part, NextScaleTransformer):
            part.gradient_checkpointing = True
    module.train()
    forward, total, peak = _step(task, name, module, subject.batch(micro), config.precision)
    trained = [p for p in module.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    fixed = nbytes(module) - gradients
    ranks = gpus if sharded else 1
    largest = max((nbytes(block) for block in _blocks(module)), default=0)
    memory = Memory(
        # Sharded, a rank holds its part, and whole only the block at work and the one fetched ahead.
        weights=fixed + gradients // ranks + (2 * largest if sharded and gpus > 1 else 0),
        gradients=gradients // ranks,
        optimizer=2 * gradients // ranks,
        average=gradients // ranks if config.average else 0,
        buckets=gradients if gpus > 1 and not sharded else 0,
        activations=peak - gradients,
    )
    return Plan(
        parameters=sum(p.numel() for p in trained),
        frozen=sum(p.numel() for p in module.parameters() if not p.requires_grad),
        forward=forward * per_step,
        flops=total * per_step,
        memory=memory,
        micro_batch=micro,
        steps=config.plan(subject.samples / config.batch_size).total,
        tokens_per_step=config.batch_size * subject.tokens,
    )


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [b for part in module.modules() if isinstance(part, NextScaleTransformer) for b in part.blocks]


def _step(
    task: TrainingTask, name: str, module: nn.Module, batch: dict[str, Any], precision: str
) -> tuple[int, int, int]:
    """Operations of the forward pass and of all, and the most bytes alive beside the weights, gradients included."""
    # One after the other: the counter of operations itself keeps tensors.
    forward, total = step_operations(task, name, module, batch, precision)
    with _as_on_a_gpu(), Alive() as alive, FusedAttention():
        _lead(task, name, module, batch, precision)
    return forward, total, alive.peak


def step_operations(
    task: TrainingTask, name: str, module: nn.Module, batch: dict[str, Any], precision: str, step: int = 0
) -> tuple[int, int]:
    """Operations of a step's forward pass and of all, with values or without; the values themselves come to nothing.

    Args:
        name: of the task's phase, with its ``module``.
        step: which, where a task does not do the same at all of them.
    """
    forward = 0
    with _as_on_a_gpu(), FlopCounterMode(display=False) as counter, FusedAttention() as kernel:

        def note() -> None:
            nonlocal forward
            forward = int(counter.get_total_flops()) + kernel.operations

        _lead(task, name, module, batch, precision, step, note)
    return forward, int(counter.get_total_flops()) + kernel.operations


def _lead(
    task: TrainingTask,
    name: str,
    module: nn.Module,
    batch: dict[str, Any],
    precision: str,
    step: int = 0,
    after_forward: Callable[[], None] = lambda: None,
) -> None:
    """A step's forward and backward pass."""
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    device = next(module.parameters()).device.type
    with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        loss, _ = task.loss(name, module, batch, step)
    after_forward()
    loss.backward()
    for parameter in module.parameters():
        parameter.grad = None


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Without what only CPUs do: dense attention for short sequences, and oneDNN's layers, which no counter knows; and
    with PyTorch's own attention, which is counted."""
    kept = attention.DENSE_LENGTH, attention.KERNELS, fused._onednn_computes
    own = {name: kernel for name, kernel in attention.KERNELS.items() if name == "sdpa"}
    attention.DENSE_LENGTH, attention.KERNELS, fused._onednn_computes = 0, own, lambda *_: False
    try:
        yield
    finally:
        attention.DENSE_LENGTH, attention.KERNELS, fused._onednn_computes = kept
