"""Optimiser groups and schedules: the recipe of VAR's trainer (reference values in its ``train.py``)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NO_DECAY = ("embedding_position", "position_embedding", "start_position", "level_embedding", "log_scale",
            "modulation_offset", "bias", "gamma", "beta")  # fmt: skip
"""Parts of names whose parameters take no weight decay, beside all one-dimensional parameters."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in groups, with and without weight decay, and by factors of the learning rate.

    One-dimensional parameters, biases, positions, level embeddings and scales do not decay; class and word
    embeddings and all linear weights do. A model's attribute ``no_decay`` adds parts of names that do not; its
    attribute ``rates`` gives factors of the learning rate, by parts of names of which the first that fits counts.
    """
    exempt = (*NO_DECAY, *getattr(model, "no_decay", ()))
    rates: dict[str, float] = dict(getattr(model, "rates", {}))
    found: dict[tuple[float, bool], list[Tensor]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim == 1 or any(part in name for part in exempt)
            rate = next((factor for part, factor in rates.items() if part in name), 1.0)
            found.setdefault((rate, not plain), []).append(parameter)
    return [
        {"params": group, "weight_decay": weight_decay if decays else 0.0, "decays": decays, "rate": rate}
        for (rate, decays), group in found.items()
        if group
    ]


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay over a run.

    Attributes:
        kind: after a linear warm-up, ``lin0`` / ``lin`` stay at the peak for 5 / 15 % of the rest and fall
            linearly to ``end``; ``lin00`` falls at once; ``cos`` follows a half cosine; ``exp`` decays
            exponentially after 15 %; ``constant`` stays; ``lin0.3`` (any share T) falls in two slopes that
            meet at T, for progressive training.
        warmup: steps, rounded.
        total: steps of the whole run.
        start, end: shares of the peak rate where the warm-up starts and where the run ends.
        decay, decay_end: weight decay, a half cosine from one to the other.
    """

    kind: str = "lin0"
    warmup: float = 0
    total: int = 1
    start: float = 0.005
    end: float = 0.1
    decay: float = 0.05
    decay_end: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in ("lin0", "lin", "lin00", "cos", "exp", "constant"):
            try:
                share = float(self.kind.removeprefix("lin"))
            except ValueError:
                share = -1.0
            if not self.kind.startswith("lin") or not 0 < share < 1:
                raise ValueError(
                    f"schedule {self.kind!r} is unknown; there are lin0, lin, lin00, cos, exp, constant and "
                    "linT with a share T between 0 and 1, such as lin0.3"
                )

    def rate(self, step: int) -> float:
        """Learning rate at a step, as a share of the peak."""
        warmup = round(self.warmup)
        if step < warmup:
            return self.start + (1 - self.start) * step / warmup
        passed = min((step - warmup) / max(self.total - 1 - warmup, 1), 1.0)
        rest = 1 - passed
        match self.kind:
            case "constant":
                return 1.0
            case "cos":
                return self.end + (1 - self.end) * (0.5 + 0.5 * math.cos(math.pi * passed))
            case "exp":
                return 1.0 if passed < 0.15 else math.exp((passed - 0.15) / 0.85 * math.log(self.end))
            case "lin" | "lin0" | "lin00":
                flat = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0}[self.kind]
                return 1.0 if passed < flat else self.end + (1 - self.end) * rest / (1 - flat)
        turn = float(self.kind.removeprefix("lin"))
        middle = (1 + self.end + (1 - self.end) * (1 - turn)) / 2
        if passed < turn:
            return 1 + (middle - 1) * passed / turn
        return self.end + (middle - self.end) * rest / (1 - turn)

    def weight_decay(self, step: int) -> float:
        passed = step / max(self.total - 1, 1)
        return self.decay_end + (self.decay - self.decay_end) * (0.5 + 0.5 * math.cos(math.pi * passed))

    def apply(self, optimizer: torch.optim.Optimizer, peak: float, step: int) -> float:
        """Set the optimiser's rates and weight decay for a step; returns the rate whose factor is 1."""
        rate, decay = peak * self.rate(step), self.weight_decay(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)  # checkpoints of earlier versions have none
            if group["decays"]:
                group["weight_decay"] = decay
        return rate


class ExponentialAverage:
    """Exponential moving average of a module's trainable parameters.

    The decay warms up as min(decay, (1 + n) / (10 + n)), so that early averages are not the initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = dict(module.named_parameters())
        # Of a sharded tensor each process averages its own part.
        shadow, now = [_local(value) for value in self.shadow.values()], [_local(current[n]) for n in self.shadow]
        torch._foreach_lerp_(shadow, now, 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        """Write the averages into a module's parameters."""
        own = dict(module.named_parameters())
        with torch.no_grad():
            for name, value in self.shadow.items():
                own[name].copy_(value)

    def state_dict(self) -> dict:
        return {"decay": self.decay, "updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, value in self.shadow.items():
            value.copy_(state["shadow"][name])


def _local(value: Tensor) -> Tensor:
    part: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return part.detach()
