"""The modules that a run trains, ready to step: their optimiser, their averaged weights, their place on the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from nextscale.core.muon import Muon, muon_groups
from nextscale.core.optim import ExponentialAverage, parameter_groups
from nextscale.core.random import sample_draws
from nextscale.core.runlog import Metrics
from nextscale.core.sharding import replicate, shard, units, whole, without_exchange
from nextscale.core.transformer import NextScaleTransformer, StochasticDepth, draw_paths

if TYPE_CHECKING:
    from accelerate import Accelerator

    from nextscale.core.training import Batch, TrainingConfig

Loss = Callable[[Any], tuple[Tensor, Metrics]]
"""Of a phase's module, as it must be called."""


@dataclass
class Phase:
    """Attributes:

    module: what is trained; sharded in place where it is.
    optimizer: its own; ``prepared``, the same with the scaling that half precision needs.
    average: of the weights, or None.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    prepared: Any
    average: ExponentialAverage | None
    _call: Any
    _wrapped: nn.Module | None
    _blocks: list[StochasticDepth]

    def backward(
        self, accelerator: Accelerator, loss: Loss, batch: Batch, parts: int, number: int
    ) -> tuple[Tensor, Metrics]:
        """Add a micro-batch's gradients; returns its loss and what is logged.

        Args:
            parts: micro-batches of the step; ``number``, which of them this is. Copies of a module exchange their
                gradients at the last.
        """
        draws = sample_draws(batch, "paths") if "seeds" in batch else None
        alone = nullcontext() if number == parts or self._wrapped is None else without_exchange(self._wrapped)
        with alone, accelerator.autocast(), draw_paths(self._blocks, draws, len(batch.get("seeds", ()))):
            value, metrics = loss(self._call) if self._wrapped is None else self._wrapped(loss)
            accelerator.backward(value / parts)
        return value.detach(), metrics

    def clip(self, accelerator: Accelerator, norm: float) -> Tensor:
        """Scale gradients down to a largest global norm; returns what it was."""
        return whole(accelerator.clip_grad_norm_(self.module.parameters(), norm).detach())

    def step(self) -> None:
        """Update the weights, and their average."""
        self.prepared.step()
        self.prepared.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.module)

    def shown(self) -> dict[str, Tensor]:
        """The averaged weights, the plain ones where none are averaged, and buffers: by name, maybe sharded."""
        return {**trained_state(self.module), **(self.average.shadow if self.average else {})}


def leave_out(module: nn.Module) -> None:
    """Keep methods that modules name as ``uncompiled`` out of compiled graphs."""
    # Not with a decorator where they are defined: it imports the compiler, which takes seconds, for everyone.
    for part in module.modules():
        for name in cast("Sequence[str]", getattr(part, "uncompiled", ())):
            setattr(part, name, torch.compiler.disable(getattr(part, name)))


def prepare(module: nn.Module, config: TrainingConfig, accelerator: Accelerator, peak: float) -> Phase:
    """A module ready for training: on its device, in its processes.

    Args:
        peak: largest learning rate.
    """
    for part in module.modules():
        if config.gradient_checkpointing and isinstance(part, NextScaleTransformer):
            part.gradient_checkpointing = True
    module.train()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    sharded = distributed and config.sharding == "full" and bool(units(module))
    call: Any = module
    if config.compile:
        leave_out(module)
    if config.compile and not sharded:
        call = torch.compile(module)
    call = accelerator.prepare_model(call, device_placement=not sharded, evaluation_mode=True)
    wrapped = None
    if sharded:
        if config.compile:  # each block by itself: what gathers its weights stays outside of the graph
            blocks = units(module)
            limits: Any = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, 4 * len(blocks))  # they share their code
            for unit in blocks:
                cast(Any, unit).forward = torch.compile(unit.forward)
        wrapped = shard(module, accelerator.device, half=config.precision == "bf16")
    elif distributed:
        wrapped = replicate(call, accelerator.device)
    fused = accelerator.device.type == "cuda"
    groups = parameter_groups(module, config.weight_decay)
    optimizer: torch.optim.AdamW
    if config.optimizer == "muon":
        optimizer = Muon(muon_groups(module, groups), lr=peak, betas=config.betas)
    else:
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=config.betas, fused=fused or None)
    average = ExponentialAverage(module, config.average) if config.average else None
    dropping = [part for part in module.modules() if isinstance(part, StochasticDepth)]
    return Phase(module, optimizer, accelerator.prepare_optimizer(optimizer), average, call, wrapped, dropping)


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Buffers, and the parameters that take gradients: frozen parts come from their own files."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


@torch.no_grad()
def gather(phases: Sequence[Phase], targets: Sequence[nn.Module], main: bool) -> None:
    """Write the weights to be shown into modules that are whole, on the main process; all processes call this."""
    for phase, target in zip(phases, targets, strict=True):
        own = target.state_dict() if main else {}
        for name, value in phase.shown().items():
            value = whole(value)
            if main:
                own[name].copy_(value)


@contextmanager
def averages_in_place(phases: Sequence[Phase]) -> Iterator[None]:
    """Inside, modules of which this process has a copy hold their averaged weights, in evaluation form."""
    random = torch.get_rng_state()
    # By parameter and not by name: adapters may be folded into the weights meanwhile.
    kept: list[tuple[nn.Parameter, Tensor]] = []
    for phase in phases:
        names = phase.average.shadow if phase.average else {}
        kept += [(p, p.detach().clone()) for n, p in phase.module.named_parameters() if n in names]
        if phase.average:
            phase.average.copy_to(phase.module)
        phase.module.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
        for phase in phases:
            phase.module.train()
        torch.set_rng_state(random)


@contextmanager
def whole_copies(phases: Sequence[Phase], modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the modules that :func:`gather` filled are on the device, in evaluation form; else on the CPU."""
    random = torch.get_rng_state()
    for module in modules:
        module.eval().to(device)
    try:
        yield
    finally:
        in_use = {id(parameter) for phase in phases for parameter in phase.module.parameters()}  # frozen, shared ones
        for module in modules:
            for parameter in module.parameters():
                if id(parameter) not in in_use:
                    parameter.data = parameter.data.cpu()
        torch.set_rng_state(random)
