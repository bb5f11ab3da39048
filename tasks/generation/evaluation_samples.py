"""Drawing tens of thousands of images to be measured: in parts, by any number of processes, resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.checkpoint import write_atomically, write_json
from nextscale.evaluation.npz_images import NpzImages, write_images

SETTINGS = "settings.json"
PART = 250
"""Images of one file, which one process draws: what is lost at most where a run is stopped."""


@dataclass(frozen=True)
class SampleRun:
    """What is drawn: image n shows class (or prompt) n modulo their number, from seed + n, whoever draws it.

    Attributes:
        model: its name, and what else tells it apart: images of another are not mixed in.
        conditions: classes, or prompts; None: of a model without classes.
        options: what the model's ``generate`` is told.
    """

    model: str
    num: int
    conditions: Sequence[int] | Sequence[str]
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    part: int = PART

    def __post_init__(self) -> None:
        if self.num < 1 or self.part < 1 or not self.conditions:
            raise ValueError(
                f"{self.num} images of {len(self.conditions)} classes or prompts; expected 1 or more of each"
            )

    @property
    def parts(self) -> int:
        """Files that the images come in."""
        return -(-self.num // self.part)

    def numbers(self, part: int) -> range:
        """The images of a file."""
        return range(part * self.part, min((part + 1) * self.part, self.num))

    def condition(self, number: int) -> Any:
        """What image ``number`` shows."""
        return self.conditions[number % len(self.conditions)]


def part_file(folder: Path, part: int) -> Path:
    """Where a part lies."""
    return folder / f"part-{part:05d}.npz"


def draw_samples(
    generate: Callable[[list[Any], list[int]], Tensor],
    run: SampleRun,
    folder: str | Path,
    *,
    rank: int = 0,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw this process's share of the parts that are not there yet.

    Args:
        generate: (classes or prompts, a seed each) -> images (B, 3, H, W) in [0, 1].
        progress: called with (parts done, parts of this process).

    Raises:
        ValueError: the folder holds images drawn with other settings.
    """
    folder = Path(folder)
    settings = json.loads(json.dumps(asdict(run)))
    place = folder / SETTINGS
    if place.is_file():
        if json.loads(place.read_text(encoding="utf-8")) != settings:
            raise ValueError(f"{folder} holds images drawn with other settings ({place}): give another --out")
    elif rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(place, settings)
    # By number, not by what is missing: another process may have written a part between its look and ours.
    missing = [part for part in range(rank, run.parts, processes) if not part_file(folder, part).is_file()]
    for done, part in enumerate(missing):
        numbers = run.numbers(part)
        images = generate([run.condition(n) for n in numbers], [run.seed + n for n in numbers])
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

        def write(path: Path, pixels: np.ndarray = pixels) -> None:
            write_images(path, [pixels], len(pixels))

        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(part_file(folder, part), write)
        if progress is not None:
            progress(done + 1, len(missing))


def drawn_batches(run: SampleRun, folder: str | Path, size: int) -> Iterator[Tensor]:
    """All images in their order, (B, 3, H, W) in [0, 1], read part by part.

    Raises:
        ValueError: parts are missing.
    """
    folder = Path(folder)
    if absent := [part for part in range(run.parts) if not part_file(folder, part).is_file()]:
        raise ValueError(
            f"{folder} lacks {len(absent)} of {run.parts} parts, such as {part_file(folder, absent[0]).name}: a "
            "process was stopped; give the same command again"
        )
    for part in range(run.parts):
        images = NpzImages(part_file(folder, part))
        if len(images) != len(run.numbers(part)):
            raise ValueError(f"{images.path} holds {len(images)} images, expected {len(run.numbers(part))}: remove it")
        yield from images.batches(size)


def merge(run: SampleRun, folder: str | Path, path: str | Path) -> Path:
    """All images as one .npz in the field's form (``arr_0``, uint8), which other evaluators read."""

    def write(temporary: Path) -> None:
        batches = (
            (images * 255).round().byte().permute(0, 2, 3, 1).numpy() for images in drawn_batches(run, folder, 64)
        )
        write_images(temporary, batches, run.num)

    return write_atomically(Path(path), write)
