"""Muon: steps of momentum made orthogonal for weight matrices, AdamW for everything else.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", with the step sizes of Liu et al. 2025
(arXiv 2502.16982, section 2.2), by which both kinds of parameters share a learning rate and a weight decay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nextscale.core.sharding import is_sharded, whole

MOMENTUM = 0.95
STEP = 0.2
"""Root mean square of an update at a rate of 1, as AdamW's is found to be."""

SMALLEST = 8
"""Sides of a matrix at least: of fewer rows there is little to make orthogonal."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ENDS = ("head", "conv_out", "embedding")
"""Parts of names of layers that read codes or make outputs: AdamW's, as the authors advise."""


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the weights of linear and convolutional layers inside a model."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and not any(part in name for part in ENDS):
            weight = module.weight
            if min(len(weight), weight.numel() // max(len(weight), 1)) >= SMALLEST:
                found.add(f"{name}.weight" if name else "weight")
    return found


def muon_groups(model: nn.Module, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of a model's parameters, each split into matrices inside the model and the rest."""
    matrices = hidden_matrices(model)
    inside = {id(parameter) for name, parameter in model.named_parameters() if name in matrices}
    split = [
        {**group, "params": [p for p in group["params"] if (id(p) in inside) == kind], "matrices": kind}
        for group in groups
        for kind in (True, False)
    ]
    return [group for group in split if group["params"]]


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups of parameters whose ``matrices`` is true.

    A convolution's weight counts as a matrix of its outputs by all else.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        with torch.no_grad():
            for group in groups:
                if group["matrices"]:
                    self._turn(group)
        return loss

    def _turn(self, group: dict[str, Any]) -> None:
        directions: defaultdict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            direction = whole(parameter.grad.lerp(state["momentum"], MOMENTUM)).flatten(1)
            directions[tuple(direction.shape)].append((parameter, direction))
        for shape, pairs in directions.items():
            # Those of one shape together: there are many, and most are small.
            updates = orthogonalized(torch.stack([direction for _, direction in pairs]))
            for (parameter, _), update in zip(pairs, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                change = update.to(parameter.dtype).reshape(parameter.shape)
                parameter.add_(_alike(change, parameter), alpha=-group["lr"] * STEP * max(shape) ** 0.5)


def _alike(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as the parameter is held: sharded where that is."""
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded = cast(Any, parameter)
    return cast(Tensor, distribute_tensor(value, sharded.device_mesh, sharded.placements))


def orthogonalized(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Matrices whose singular values become about 1, by Newton's and Schulz's iteration in bfloat16.

    Args:
        matrices: (count, rows, columns).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
