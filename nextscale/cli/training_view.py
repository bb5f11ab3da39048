"""What a training run shows along the way: a progress bar or lines, and sample sheets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHEET_CELL = 128
"""Small pictures are enlarged to about so many pixels on a sheet."""

Report = Callable[[int, int, dict[str, float]], None]


@contextmanager
def progress_of(config: Any, enabled: bool = True) -> Iterator[Report | None]:
    """A progress hook: a bar on a terminal, else one line per log interval on standard output.

    Args:
        config: the run's :class:`nextscale.core.training.TrainingConfig`.
    """
    if not enabled:
        yield None
    elif sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _lines(config)


@contextmanager
def _bar() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=120) as bar:
        task = bar.add_task("starting", total=None)

        def report(step: int, steps: int, metrics: dict[str, float]) -> None:
            bar.update(task, completed=step, total=steps, description=describe(metrics) or "training")

        yield report


def _lines(config: Any) -> Report:
    def report(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step % config.log_every and step != steps:
            return
        rate = metrics.get("samples_per_second", 0)
        left = f"  {duration((steps - step) * config.batch_size / rate)} left" if rate else ""
        print(f"{time.strftime('%H:%M:%S')}  step {step} of {steps}  {describe(metrics)}{left}", flush=True)

    return report


def describe(metrics: dict[str, float]) -> str:
    """The figures worth a glance."""
    wanted = ("loss", "psnr", "accuracy", "accuracy_last", "usage/all", "grad_norm")
    parts = [f"{name.replace('_', ' ')} {metrics[name]:.4g}" for name in wanted if name in metrics]
    if "samples_per_second" in metrics:
        parts.append(f"{metrics['samples_per_second']:.4g} samples/s")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """2:03:04, or 3:04 where it is less than an hour."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def sampler(recipe: Any, runner: Any) -> Callable[[int], None]:
    """A hook that writes OUTPUT/samples/step-N.png: the same images or seeds each time."""
    folder = Path(recipe.training.output) / "samples"

    def sample(step: int) -> None:
        from nextscale.pictures import comparison_sheet, save_png

        examples = recipe.examples(runner)
        if not examples.rows:
            return  # nothing of this run can be seen
        width = max(picture.shape[-1] for _, pictures in examples.rows for picture in pictures)
        sheet = comparison_sheet(examples.rows, examples.headings, scale=max(1, SHEET_CELL // width))
        # A run that is taken up again draws the sheets after its last checkpoint once more.
        save_png(sheet, folder / f"step-{step:08d}.png", overwrite=True)

    return sample
