"""How many points of a grid are evaluated to mesh a shape, against all of them, and how many are on the wrong side.

python benchmarks/shape_grid.py                                 # exact fields of simple shapes
python benchmarks/shape_grid.py --model runs/g3pt-small         # shapes that a G3PT draws, with times
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from nextscale.tasks.shapes.surfaces import grid_values, marching_cubes

HALF = 1.05
Field = Callable[[Tensor], Tensor]


def ball(points: Tensor) -> Tensor:
    return 0.9 - points.norm(dim=1)


def ring(points: Tensor) -> Tensor:
    return 0.25 - torch.stack((points[:, :2].norm(dim=1) - 0.65, points[:, 2]), dim=1).norm(dim=1)


def table(points: Tensor) -> Tensor:
    """A thin top on four thin legs."""

    def box(middle: tuple[float, float, float], half: tuple[float, float, float]) -> Tensor:
        away = (points - points.new_tensor(middle)).abs() - points.new_tensor(half)
        return -away.amax(1)

    legs = [box((x, y, -0.25), (0.05, 0.05, 0.45)) for x in (-0.8, 0.8) for y in (-0.5, 0.5)]
    return torch.stack([box((0, 0, 0.2), (0.9, 0.6, 0.05)), *legs]).amax(0)


SIMPLE: dict[str, Field] = {"ball": ball, "ring": ring, "table": table}


def drawn(source: str, count: int) -> dict[str, Field]:
    """Fields of shapes that a model draws, of its classes in turn."""
    import nextscale
    from nextscale.core.random import ImageDraws

    model = nextscale.load(source)
    classes = max(model.config.classes, 1)
    conditions = model.prepare(
        [number % classes for number in range(count)] if model.config.classes else [None] * count
    )
    with torch.inference_mode():
        total = list(model.steps(conditions, draws=ImageDraws(range(count)), top_p=0.9))[-1].total
        hidden = model.tokenizer.decode_features(total)
    names = model.config.class_names or [f"shape {number}" for number in range(classes)]
    return {f"{names[n % classes]} {n}": model.tokenizer.field(hidden[n : n + 1]) for n in range(count)}


@torch.inference_mode()
def measure(field: Field, resolution: int, stride: int) -> tuple[float, float, int]:
    """Share of points evaluated, share of the time with marching cubes, and points that lie on the other side."""
    seconds, counts, inside = [], [], []
    for each in (1, stride):
        start = time.perf_counter()
        values, count = grid_values(field, resolution + 1, HALF, 0.0, stride=each)
        marching_cubes(values, HALF, 0.0)
        seconds.append(time.perf_counter() - start)
        counts.append(count)
        inside.append(values > 0)
    return counts[1] / counts[0], seconds[1] / seconds[0], int((inside[0] != inside[1]).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a G3PT, instead of simple shapes")
    parser.add_argument("--number", type=int, default=4, help="shapes that it draws")
    parser.add_argument("--resolution", type=int, nargs="+", default=[32, 64, 128, 256], help="cells a side")
    parser.add_argument("--stride", type=int, default=4, help="of the grid that is evaluated first")
    options = parser.parse_args()
    fields = SIMPLE if options.model is None else drawn(options.model, options.number)
    print("shape             cells   points   growth     time   other side")
    for name, field in fields.items():
        before: tuple[int, float] | None = None
        for resolution in options.resolution:
            share, seconds, other = measure(field, resolution, options.stride)
            # Points grow with this power of the resolution: 3 with the volume, 2 with the surface.
            power = math.nan
            if before is not None:
                ratio = share * (resolution + 1) ** 3 / (before[1] * (before[0] + 1) ** 3)
                power = math.log(ratio) / math.log(resolution / before[0])
            print(
                f"{name:<16} {resolution:>6} {share:>8.1%} {'' if math.isnan(power) else f'^{power:.2f}':>8} "
                f"{seconds:>8.1%} {other:>12}"
            )
            before = (resolution, share)


if __name__ == "__main__":
    main()
