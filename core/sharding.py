"""How a module is spread over the processes of a run: one copy in each (DDP), or each a part (FSDP2)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from nextscale.core.transformer import Modulation, NextScaleTransformer


class Inside(nn.Module):
    """Runs a function of a module within its own forward pass.

    What wraps it sees every use of the module's parameters: methods beside ``forward``, parts called in any order,
    parts left out. A loss is such a function.
    """

    def __init__(self, module: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[Any], Any]) -> Any:
        return function(self.module)


def units(module: nn.Module) -> list[nn.Module]:
    """What is sharded each on its own: the blocks of transformers, the layers that a language model names."""
    found: list[nn.Module] = []
    for part in module.modules():
        if isinstance(part, NextScaleTransformer):
            found += cast("list[nn.Module]", list(part.blocks))
        elif names := getattr(part, "_no_split_modules", None):
            found += [layer for layer in part.modules() if type(layer).__name__ in names]
    trained = (unit for unit in found if any(p.requires_grad for p in unit.parameters()))
    return list(dict.fromkeys(trained))


def replicate(module: Callable[..., Any], device: torch.device) -> nn.Module:
    """A copy in every process, whose gradients are averaged (DistributedDataParallel); call it with a function."""
    devices = [device] if device.type == "cuda" else None
    wrapper: Any = nn.parallel.DistributedDataParallel
    # PyTorch 2.13 has renamed the option: buffers are not sent along with every batch.
    known = inspect.signature(wrapper).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    wrapped = wrapper(
        Inside(module),
        device_ids=devices,
        gradient_as_bucket_view=True,
        find_unused_parameters=True,  # what a batch leaves out differs between systems, scales and stages
        **{option: False},
    )
    return cast(nn.Module, wrapped)


def shard(module: nn.Module, device: torch.device, half: bool) -> nn.Module:
    """Every process holds a part of each weight, gradient and state (FSDP2); call it with a function.

    In place: the module's parameters become :class:`torch.distributed.tensor.DTensor`. A frozen parameter outside of
    the :func:`units` stays whole in every process.

    Args:
        half: units are gathered in bfloat16, which is what autocast computes with; gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for unit in units(module):
        for part in unit.modules():
            if isinstance(part, Modulation):  # computed for all blocks at once, before any of them
                fully_shard(part.linear, mesh=mesh, mp_policy=policy)
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        if unit._parameters and hasattr(unit, "modulate"):
            register_fsdp_forward_method(unit, "modulate")
    inside = {id(p) for unit in units(module) for p in unit.parameters()}
    whole = {p for p in module.parameters() if not p.requires_grad and id(p) not in inside}
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    return cast(nn.Module, fully_shard(Inside(module), mesh=mesh, ignored_params=whole))


def without_exchange(wrapped: nn.Module) -> AbstractContextManager[None]:
    """Gradients of a micro-batch that is not the last stay in the process, where each has a copy of the module."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return cast("AbstractContextManager[None]", wrapped.no_sync())
    return nullcontext()  # shards are summed at once: whole gradients would take the memory that sharding saves


# --- tensors of which each process holds a part -------------------------------------------------------


def is_sharded(value: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def whole(value: Tensor) -> Tensor:
    """The whole of a tensor; all processes call this, one tensor at a time."""
    return cast(Any, value).full_tensor() if is_sharded(value) else value


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one of which this process may hold a part; only that part is read."""
    if tuple(value.shape) != tuple(target.shape):
        raise ValueError(f"a tensor of shape {tuple(value.shape)} was given for one of {tuple(target.shape)}")
    if not is_sharded(target):
        target.copy_(value)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spread = cast(Any, target)
    shape, offset = compute_local_shape_and_global_offset(target.shape, spread.device_mesh, spread.placements)
    for dimension, (size, begin) in enumerate(zip(shape, offset, strict=True)):
        value = value.narrow(dimension, min(begin, value.shape[dimension]), size)
    spread.to_local().copy_(value)


def twin(task: Any, main: bool) -> Any:
    """A copy of a task to be sharded; the one given stays whole, for what the main process shows and keeps.

    Frozen parameters are shared. In the other processes the trained parameters of the given one are emptied.
    """
    parameters = [p for module in task.phases.values() for p in module.parameters()]
    frozen = {id(p): p for p in _parameters_of(task) if not p.requires_grad}
    made = copy.deepcopy(task, dict(frozen))
    if not main:
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.data = parameter.data.new_empty(0)
    return made


def _parameters_of(task: Any) -> Iterator[nn.Parameter]:
    for value in (*task.phases.values(), *vars(task).values()):
        if isinstance(value, nn.Module):
            yield from value.parameters()
