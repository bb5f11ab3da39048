"""Scaling laws: a ladder of models that differ in size alone, and how their test loss falls.

Tian et al. 2024 (arXiv 2404.02905), section 4: L = (beta x)^alpha of the loss and of the token error, against the size
of the transformer and against the compute that training took.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nextscale.core.transformer import NextScaleTransformer
from nextscale.evaluation.power_law import PowerLaw, fit_power_law, frontier
from nextscale.planning import step_operations

HEAD_SIZE = 64
"""Of VAR's family: width 64 d and d heads at depth d."""

FIGURES = {
    "test loss": "cross_entropy",
    "test loss, last scale": "cross_entropy_last",
    "token error": "accuracy",
    "token error, last scale": "accuracy_last",
}
"""What is fitted, and which of a run's validation figures it is of; an error is 1 minus the accuracy."""

UNITS = {"parameters": 1e9, "compute": 1e15}
"""The coefficients are per billion parameters and per PFLOP, as the paper's."""


# --- the ladder ---------------------------------------------------------------------------------------


def rung(recipe: Any, depth: int, output: str | Path, width: int | None = None) -> Any:
    """The recipe of one size.

    Width and heads grow with depth as in the recipe: by VAR's rule where it names no width, else in the proportion of
    its own width to its own depth, in whole heads of its own size.

    Args:
        width: in place of that rule; heads keep their size.

    Raises:
        ValueError: the recipe has no depth or starts from a trained model, or no whole number of heads gives the width.
    """
    names = {field.name for field in fields(recipe)}
    if not {"depth", "width", "heads"} <= names:
        raise ValueError(f"a {type(recipe).__name__} has no depth, width and heads to grow")
    if getattr(recipe, "init", None) is not None:
        raise ValueError("a ladder is of models made anew: leave init out")
    if depth < 1:
        raise ValueError(f"depth {depth} is no depth; expected 1 or more")
    size = recipe.width // (recipe.heads or max(recipe.width // HEAD_SIZE, 1)) if recipe.width else HEAD_SIZE
    if width is not None:
        heads = width // size
    elif recipe.width is None:
        heads = depth
    else:
        heads = max(round(recipe.width // size * depth / recipe.depth), 1)
    if width not in (None, heads * size) or heads < 1:
        raise ValueError(f"width {width} is no multiple of the heads' size, {size}")
    training = replace(recipe.training, output=str(output))
    return replace(recipe, depth=depth, width=heads * size, heads=heads, training=training)


@dataclass(frozen=True)
class Cost:
    """What a size amounts to.

    Attributes:
        parameters: of the transformer's blocks, without embeddings and head, as the paper counts them.
        flops: of one optimiser step, as ``nextscale plan`` counts them.
    """

    depth: int
    width: int
    heads: int
    parameters: int
    flops: int
    steps: int


def cost_of(recipe: Any, runner: Any) -> Cost:
    """Count what a run of the recipe takes, of one sample of its data.

    Args:
        runner: the recipe's :class:`nextscale.core.training.Trainer`.

    Raises:
        ValueError: the task trains several networks in turn, or none with a next-scale transformer.
    """
    task = runner.task
    if len(task.phases) != 1:
        raise ValueError(f"a {task.name} trains {', '.join(task.phases)} in turn; a ladder is of one network")
    ((name, module),) = task.phases.items()
    parameters = sum(p.numel() for block in _blocks(module) for p in block.parameters())
    if not parameters:
        raise ValueError(f"a {type(module).__name__} has no next-scale transformer to count")
    device = next(module.parameters()).device
    batch = next(runner.batches(0, 1))
    batch.pop("skipped", None)
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    with torch.random.fork_rng():
        # At the last step, where a run that begins with fewer scales has all of them.
        _, flops = step_operations(task, name, module, batch, recipe.training.precision, runner.steps - 1)
    sizes = {field: getattr(recipe, field) for field in ("depth", "width", "heads")}
    return Cost(**sizes, parameters=parameters, flops=flops * recipe.training.batch_size, steps=runner.steps)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.modules():
        if isinstance(part, NextScaleTransformer):
            yield from part.blocks


# --- what came of it ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """One trained size.

    Attributes:
        curve: (compute so far in FLOPs, figure by name) at every validation, the last one at the end of the run.
        seconds: of training.
    """

    cost: Cost
    curve: tuple[tuple[int, dict[str, float]], ...]
    seconds: float

    @property
    def final(self) -> dict[str, float]:
        return self.curve[-1][1]


def read_rung(folder: Path, cost: Cost) -> Rung:
    """The figures in a run's log.

    Raises:
        ValueError: the log has none of them.
    """
    curve, seconds = [], 0.0
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seconds = row.get("seconds", seconds)
        found = {name: row[f"validation/{key}"] for name, key in FIGURES.items() if f"validation/{key}" in row}
        if found:
            errors = {name: 1 - value / 100 for name, value in found.items() if "error" in name}
            curve.append((int(row["step"]) * cost.flops, found | errors))
    if not curve:
        raise ValueError(f"{folder / 'log.jsonl'} has no figures of held-out data such as validation/cross_entropy")
    return Rung(cost, tuple(curve), seconds)


@dataclass(frozen=True)
class Law:
    """A power law of one figure.

    Attributes:
        against: ``"parameters"``, at the end of the runs, or ``"compute"``, along the frontier of their curves.
        points: (parameters or FLOPs, figure) that it was fitted to.
        law: in units of :data:`UNITS`; None where the points have none, as of one size or a figure that is 0.
    """

    figure: str
    against: str
    points: tuple[tuple[float, float], ...]
    law: PowerLaw | None


def fit_laws(rungs: Sequence[Rung]) -> list[Law]:
    """Every figure that all rungs have, against parameters and against compute."""
    laws = []
    for figure in FIGURES:
        if not all(figure in each for rung in rungs for _, each in rung.curve):
            continue
        sized = [(float(rung.cost.parameters), rung.final[figure]) for rung in rungs]
        spent = frontier([(float(flops), each[figure]) for rung in rungs for flops, each in rung.curve])
        laws += [_law(figure, "parameters", sized), _law(figure, "compute", spent)]
    return laws


def _law(figure: str, against: str, points: Sequence[tuple[float, float]]) -> Law:
    places, values = zip(*points, strict=True)
    fits = len(set(places)) > 1 and min(values) > 0
    law = fit_power_law([place / UNITS[against] for place in places], values) if fits else None
    return Law(figure, against, tuple(points), law)


def to_json(rungs: Sequence[Rung], laws: Sequence[Law]) -> dict[str, Any]:
    """All figures, for a file."""
    return {
        "units": UNITS,
        "runs": [
            {
                **asdict(rung.cost),
                "seconds": rung.seconds,
                "curve": [{"compute": flops, **figures} for flops, figures in rung.curve],
            }
            for rung in rungs
        ],
        "laws": [{**asdict(each), "coefficient": None if each.law is None else each.law.coefficient} for each in laws],
    }
