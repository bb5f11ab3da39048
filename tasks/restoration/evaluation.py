"""Measuring restoration image by image: resumable, of any model, function or folder of restored images."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nextscale.core.checkpoint import write_json
from nextscale.core.interrupt import Interrupted, InterruptGuard
from nextscale.datasets.degradations import degrade, parse_steps
from nextscale.datasets.paired_layouts import LAYOUTS
from nextscale.datasets.pairs import Pair, PairError, Pairs, as_float, check_pairs, find_pairs, fitted, listed, read_rgb
from nextscale.evaluation.lpips import LPIPS
from nextscale.evaluation.restoration import Channel, Figures, find_protocol, mean_figures, measure

Restore = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Setting:
    """What is measured and how.

    Attributes:
        dataset: as :func:`nextscale.datasets.pairs.find_pairs` takes it.
        degradation: of clean images, as :func:`nextscale.datasets.degradations.parse_steps` reads it; None: the
            dataset has degraded ones.
        seed: of the degradation; an image's random numbers also depend on its name, not on its neighbours.
        multiple: clean images are cropped, in the centre, to sides of a multiple of this before they are degraded.
        squash: degraded and clean images are both resized to a square of this side, as VarFormer's own evaluation
            does; 0: not.
        protocol, channel, crop: see :func:`nextscale.evaluation.restoration.measure`.
        limit: only so many images, the first by name; None: all.
    """

    dataset: str
    degradation: str | None = None
    seed: int = 0
    multiple: int = 1
    squash: int = 0
    protocol: str = "basicsr"
    channel: Channel = "rgb"
    crop: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        find_protocol(self.protocol)
        if self.multiple < 1 or self.squash < 0 or self.crop < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(
                f"multiple is {self.multiple}, squash {self.squash}, crop {self.crop}, limit {self.limit}; expected "
                "1 or more, 0 or more, 0 or more, 1 or more"
            )

    @property
    def task(self) -> str | None:
        """What is restored, of a published dataset with degraded images."""
        layout = LAYOUTS.get(self.dataset.partition(":")[0].partition("/")[0])
        return None if layout is None or self.degradation is not None else layout.task


@dataclass(frozen=True)
class Example:
    """One image to be restored; :meth:`load` reads it, and degrades it where that is asked for."""

    pair: Pair
    pairs: Pairs
    setting: Setting

    def load(self) -> tuple[Tensor, Tensor]:
        """The degraded and the clean image, (3, height, width) in [0, 1]."""
        assert self.pair.clean is not None
        clean = as_float(read_rgb(self.pair.clean))
        if self.setting.degradation is not None:
            steps = parse_steps(self.setting.degradation)
            name = self.pair.name.rpartition("/")[2]
            degraded, clean = degrade(clean, steps, self.setting.seed, name, multiple=self.setting.multiple)
        else:
            assert self.pair.degraded is not None
            degraded = as_float(read_rgb(self.pair.degraded))
            if not self.pairs.smaller:
                clean = fitted(clean, (degraded.shape[-2], degraded.shape[-1]), self.pairs.fit)
        if self.setting.squash:
            size = (self.setting.squash, self.setting.squash)
            degraded, clean = (F.interpolate(x[None], size, mode="bilinear")[0] for x in (degraded, clean))
        return degraded, clean


def open_examples(setting: Setting, progress: Progress | None = None) -> tuple[Pairs, list[Example]]:
    """The images of a setting, all files checked.

    Raises:
        nextscale.datasets.pairs.PairError: lists what is missing, damaged or of the wrong size.
        ValueError: clean images without a degradation, or degraded ones with one.
    """
    pairs = find_pairs(setting.dataset)
    if pairs.clean_only and setting.degradation is None:
        raise ValueError(f"{setting.dataset} holds clean images only: say with a degradation how they are degraded")
    if not pairs.clean_only and setting.degradation is not None:
        raise ValueError(f"{setting.dataset} has degraded images of its own: leave the degradation out")
    if setting.degradation is not None:
        parse_steps(setting.degradation)
    chosen = pairs.items[: setting.limit]
    check_pairs(replace(pairs, items=chosen), progress=progress)
    return pairs, [Example(pair, pairs, setting) for pair in chosen]


@dataclass(frozen=True)
class Predictions:
    """Restored images in a folder, from wherever they come, by the names of the images they were made of.

    A prediction has the degraded image's path below the dataset, or, where that is enough, its file name; any suffix.
    """

    folder: Path
    files: dict[str, Path]

    @classmethod
    def of(cls, folder: str | Path, examples: list[Example]) -> Predictions:
        """Raises:

        nextscale.datasets.pairs.PairError: lists the images that have no prediction, and damaged ones.
        """
        found = find_pairs(str(folder))
        named = {pair.name: pair.clean for pair in found.items}
        short = [example.pair.name.rpartition("/")[2] for example in examples]
        files: dict[str, Path] = {}
        for example, base in zip(examples, short, strict=True):
            path = named.get(example.pair.name) or (named.get(base) if short.count(base) == 1 else None)
            if path is not None:
                files[example.pair.name] = path
        if missing := [example.pair.name for example in examples if example.pair.name not in files]:
            raise PairError(f"{folder} lacks {len(missing)} of {len(examples)} restored images: {listed(missing)}")
        used = set(files.values())
        check_pairs(Pairs(str(folder), tuple(pair for pair in found.items if pair.clean in used)))
        return cls(Path(folder), files)

    def read(self, name: str) -> Tensor:
        return as_float(read_rgb(self.files[name]))


@dataclass(frozen=True)
class Result:
    """Attributes:

    seconds: that restoring took; None of a folder of restored images.
    images: (degraded, restored, clean), (3, height, width) in [0, 1]; None where the figures were there already.
    """

    name: str
    width: int
    height: int
    input: Figures
    output: Figures
    seconds: float | None
    images: tuple[Tensor, Tensor, Tensor] | None = None

    def to_json(self) -> dict[str, Any]:
        """A figure that is infinite, as the image equals the truth, is null."""
        sides = {side: _plain(getattr(self, side)) for side in ("input", "output")}
        return {"name": self.name, "width": self.width, "height": self.height, "seconds": self.seconds, **sides}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        def figures(side: str) -> Figures:
            psnr = data[side]["psnr"]
            return Figures(**{**data[side], "psnr": math.inf if psnr is None else psnr})

        place = (data["name"], data["width"], data["height"])
        return cls(*place, figures("input"), figures("output"), data["seconds"])


def _plain(figures: Figures) -> dict[str, float | None]:
    return {name: None if value is None or math.isinf(value) else value for name, value in asdict(figures).items()}


def evaluate(
    restore: Restore | Predictions,
    examples: list[Example],
    out: str | Path,
    owner: str,
    *,
    lpips: LPIPS | None = None,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """Measure image by image; every figure is written at once to ``out/images/NAME.json``, and taken from there again.

    Args:
        restore: from (3, height, width) in [0, 1] to the same; or restored images.
        owner: tells the model and its options, as text; figures of another one are not taken.

    Raises:
        ValueError: ``out`` holds figures of another model or setting, or an image cannot be measured.
        nextscale.core.interrupt.Interrupted: stopped from outside; what was measured is kept.
    """
    if not examples:
        return
    out = Path(out)
    run = {"model": owner, "lpips": lpips is not None, **asdict(examples[0].setting)}
    _claim(out / "run.json", run)
    with InterruptGuard() as guard:
        for number, example in enumerate(examples):
            try:
                result = _one(restore, example, out / "images" / f"{example.pair.name}.json", lpips)
            except ValueError as error:
                raise type(error)(f"{example.pair.name}: {error}") from None
            if progress is not None:
                progress(number + 1, len(examples))
            yield result
            if guard.caught is not None and number + 1 < len(examples):
                raise Interrupted(f"stopped after {number + 1} of {len(examples)} images; the same command goes on")


def _claim(path: Path, run: dict[str, Any]) -> None:
    if not path.exists():
        write_json(path, run)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is damaged; remove {path.parent} or name another folder") from None
    # A limit only says how many images are looked at.
    other = [key for key in run if key != "limit" and before.get(key) != run[key]]
    if other:
        told = ", ".join(f"{key} {before.get(key)!r} there, {run[key]!r} now" for key in other)
        raise ValueError(f"{path.parent} holds figures of other settings ({told}); name another folder")


def _one(restore: Restore | Predictions, example: Example, path: Path, lpips: LPIPS | None) -> Result:
    setting, stamp = example.setting, _stamp(restore, example)
    if path.is_file():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.pop("files") == stamp:
                return Result.from_json(kept)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            pass  # damaged: measured again
    degraded, clean = example.load()
    start, seconds = time.perf_counter(), None
    if isinstance(restore, Predictions):
        restored = restore.read(example.pair.name)
    else:
        restored = restore(degraded).detach().cpu().float()
        seconds = time.perf_counter() - start
    options: dict[str, Any] = {"channel": setting.channel, "crop": setting.crop, "lpips": lpips}
    output = measure(restored, clean, setting.protocol, **options)
    # Smaller images that a model enlarges cannot be compared themselves: bicubic is.
    plain = degraded if degraded.shape == clean.shape else _enlarged(degraded, clean)
    given = measure(plain, clean, setting.protocol, **options)
    height, width = clean.shape[-2:]
    result = Result(example.pair.name, width, height, given, output, seconds, (plain, restored, clean))
    write_json(path, {**result.to_json(), "files": stamp})
    return result


def _enlarged(image: Tensor, clean: Tensor) -> Tensor:
    from nextscale.datasets.degradations import matlab_resize

    return matlab_resize(image, (clean.shape[-2], clean.shape[-1])).clamp(0, 1)


def _stamp(restore: Restore | Predictions, example: Example) -> str:
    """Tells whether the files a figure was measured on have changed since."""
    paths = [example.pair.degraded, example.pair.clean]
    if isinstance(restore, Predictions):
        paths.append(restore.files[example.pair.name])
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path is not None]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def summary(results: list[Result]) -> dict[str, Any]:
    """Means over images of the figures of the input and the output, and seconds per megapixel."""
    timed = [result for result in results if result.seconds is not None]
    megapixels = sum(result.width * result.height for result in timed) / 1e6
    return {
        "images": len(results),
        "input": mean_figures([asdict(result.input) for result in results]),
        "output": mean_figures([asdict(result.output) for result in results]),
        "equal_to_truth": sum(math.isinf(result.output.psnr) for result in results),
        "seconds_per_megapixel": sum(result.seconds or 0 for result in timed) / megapixels if timed else None,
    }
