"""Degraded images with their clean ones: found by a dataset's layout or in two folders, and checked before use."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from .decoding import decode, image_size
from .errors import DatasetError, ImageError, listed
from .paired_layouts import LAYOUTS, Split
from .sources import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from torch import Tensor


class PairError(DatasetError):
    """Files of a paired dataset are missing, damaged or do not belong together; the message lists all of them."""


@dataclass(frozen=True)
class Pair:
    """Attributes:

    name: path of the degraded image (of a clean one without such, its own) below the dataset, without suffix; unique.
    degraded: None where it is made of the clean one on the fly.
    clean: None where the truth is not known.
    """

    name: str
    degraded: Path | None
    clean: Path | None


@dataclass(frozen=True)
class Pairs:
    """Attributes:

    where: what a user named.
    fit: how clean images that are larger are made to fit; see :class:`nextscale.datasets.paired_layouts.Split`.
    notes: what is unusual without being wrong, such as fewer images than published.
    smaller: how many times fewer rows and columns degraded images have; None: as many.
    """

    where: str
    items: tuple[Pair, ...]
    fit: Literal["crop", "resize"] | None = None
    notes: tuple[str, ...] = ()
    smaller: int | None = None

    @property
    def clean_only(self) -> bool:
        return all(pair.degraded is None for pair in self.items)


def find_pairs(dataset: str) -> Pairs:
    """Find a dataset's images.

    Args:
        dataset: one of

            - ``NAME:FOLDER`` or ``NAME/SPLIT:FOLDER``: a published dataset of
              :data:`nextscale.datasets.paired_layouts.LAYOUTS`, unpacked in FOLDER;
            - ``DEGRADED,CLEAN``: two folders with the same tree of names, suffixes apart;
            - ``sorted:DEGRADED,CLEAN``: two folders paired by the order of their names;
            - a folder of clean images, or one such image, to be degraded on the fly.

    Raises:
        PairError: nothing is there, or images have no counterpart; all of them are listed.
        ValueError: the dataset or split is unknown.
    """
    name, colon, rest = dataset.partition(":")
    if colon and name == "sorted":
        return _two_folders(*_folders(rest), sort=True)
    if colon and name.partition("/")[0] in LAYOUTS:
        return _published(name, Path(rest).expanduser())
    if colon and not Path(dataset).exists():
        raise ValueError(
            f"{name!r} is no dataset with a layout known here; there are {', '.join(LAYOUTS)}. Other pairs are named "
            "as DEGRADED,CLEAN: two folders with the same file names"
        )
    if "," in dataset and not Path(dataset).exists():
        return _two_folders(*_folders(dataset), sort=False)
    path = Path(dataset).expanduser()
    if path.is_file():
        return Pairs(dataset, (Pair(path.stem, None, path),))
    files = _images(path)
    return Pairs(dataset, tuple(Pair(_stem(name), None, path / name) for name in files))


def _folders(text: str) -> tuple[Path, Path]:
    parts = [Path(part).expanduser() for part in text.split(",")]
    if len(parts) != 2 or not all(part.is_dir() for part in parts):
        missing = [str(part) for part in parts if not part.is_dir()]
        told = f"; no folder: {listed(missing)}" if missing else ""
        raise PairError(f"{text!r} does not name two folders, as DEGRADED,CLEAN{told}")
    return parts[0], parts[1]


def _images(root: Path) -> list[str]:
    """All image files below a folder, relative to it, sorted. Links are followed."""
    if not root.is_dir():
        raise PairError(f"{root}: no such folder")
    found = [
        os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    ]
    if not found:
        raise PairError(f"{root} holds no image ({', '.join(IMAGE_SUFFIXES)}), nor does any folder in it")
    return sorted(found)


def _stem(name: str) -> str:
    return name[: name.rindex(".")]


def _by_stem(root: Path, names: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    twice = []
    for name in names:
        if _stem(name) in found:
            twice.append(name)
        found[_stem(name)] = root / name
    if twice:
        raise PairError(f"{root}: several files differ only in their suffix: {listed(twice)}. Keep one of each.")
    return found


def _two_folders(degraded: Path, clean: Path, sort: bool) -> Pairs:
    first, second = _images(degraded), _images(clean)
    where = f"{degraded},{clean}"
    if sort:
        if len(first) != len(second):
            raise PairError(f"{degraded} holds {len(first)} images and {clean} {len(second)}; expected equally many")
        matched = zip(first, second, strict=True)
        return Pairs(where, tuple(Pair(_stem(a), degraded / a, clean / b) for a, b in matched))
    inputs, truths = _by_stem(degraded, first), _by_stem(clean, second)
    problems = [
        f"{len(names)} {what}: {listed(names)}"
        for what, names in (
            (f"without a clean image in {clean}", [name for name in inputs if name not in truths]),
            (f"without a degraded image in {degraded}", [name for name in truths if name not in inputs]),
        )
        if names
    ]
    if problems:
        raise PairError(
            f"{where}: {'; '.join(problems)}. Names have to be the same but for the suffix; folders that only agree "
            "in their order are named as sorted:DEGRADED,CLEAN"
        )
    return Pairs(where, tuple(Pair(name, path, truths[name]) for name, path in inputs.items()))


def _published(name: str, root: Path) -> Pairs:
    dataset, _, chosen = name.partition("/")
    layout = LAYOUTS[dataset]
    if not chosen:
        if "test" not in layout.splits and len(layout.splits) > 1:
            raise ValueError(f"{dataset} has several parts: name one, such as {dataset}/{next(iter(layout.splits))}")
        chosen = "test" if "test" in layout.splits else next(iter(layout.splits))
    if chosen not in layout.splits:
        raise ValueError(f"{dataset} has no part {chosen!r}; it has {', '.join(layout.splits)}")
    split = layout.splits[chosen]
    for below in split.below:
        base = root / below
        if base.is_dir() and (found := list(_matched(base, split))):
            return _paired(f"{name}:{root}", base, found, split)
    rules = " or ".join(rule.degraded for rule in split.rules)
    raise PairError(
        f"{root} does not look like {dataset} ({chosen}): no file in it, or in {listed([b for b in split.below if b])} "
        f"of it, matches {rules}"
    )


def _matched(base: Path, split: Split) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Degraded files and where their clean ones may be; by the first rule that matches any file."""
    names = _images(base)
    for rule in split.rules:
        found = [(name, match) for name in names if (match := re.fullmatch(rule.degraded, name))]
        if found:
            yield from ((name, tuple(match.expand(clean) for clean in rule.clean)) for name, match in found)
            return


def _paired(where: str, base: Path, found: Sequence[tuple[str, tuple[str, ...]]], split: Split) -> Pairs:
    degraded, items, missing = {name for name, _ in found}, [], []
    clean = {_stem(name): base / name for name in _images(base) if name not in degraded}
    for name, places in found:
        if not places:
            items.append(Pair(_stem(name), None, base / name))
        elif truth := next((clean[place] for place in places if place in clean), None):
            items.append(Pair(_stem(name), base / name, truth))
        else:
            missing.append(f"{name} (expected {places[0]}.*)")
    if missing:
        raise PairError(f"{where}: {len(missing)} of {len(found)} images have no clean image: {listed(missing)}")
    notes = []
    if split.count is not None and split.count != len(items):
        notes.append(f"{where} holds {len(items):,} images; {split.count:,} were published")
    return Pairs(where, tuple(items), split.fit, tuple(notes), split.smaller)


def check_pairs(
    pairs: Pairs, *, whole: bool = True, scale: int | None = None, progress: Callable[[int, int], None] | None = None
) -> None:
    """See that every file can be read and that pairs are of matching size, before any work is done.

    Args:
        whole: decode every file; else read headers and look at the files' ends, which finds what was cut short.
        scale: how many times larger clean images are, where the dataset does not say so itself; those that it says how
            to fit may be larger anyhow.
        progress: called with (pairs checked, pairs in all).

    Raises:
        PairError: lists all files that are missing, damaged or of another size.
    """
    scale, damaged, sizes = scale or pairs.smaller or 1, [], []
    for number, pair in enumerate(pairs.items):
        found = []
        for path in (pair.degraded, pair.clean):
            if path is None:
                continue
            try:
                found.append(_checked(path, whole))
            except (ImageError, OSError) as error:
                damaged.append(f"{path} ({getattr(error, 'strerror', None) or error})")
        if len(found) == 2:
            (width, height), (wide, tall) = found
            fits = (wide, tall) == (width * scale, height * scale)
            if not fits and not (pairs.fit and wide >= width and tall >= height):
                sizes.append(f"{pair.name} ({width} x {height}, clean {wide} x {tall})")
        if progress is not None:
            progress(number + 1, len(pairs.items))
    problems = [f"{len(damaged)} files cannot be read: {listed(damaged)}"] if damaged else []
    if sizes:
        problems.append(f"{len(sizes)} pairs are not of the sizes expected: {listed(sizes)}")
    if problems:
        raise PairError(f"{pairs.where}: {'; '.join(problems)}")


def _checked(path: Path, whole: bool) -> tuple[int, int]:
    data = path.read_bytes()
    if whole:
        size: tuple[int, int] = decode(data)[0].size
        return size
    ends = {b"\x89PNG": b"IEND", b"\xff\xd8\xff": b"\xff\xd9"}
    end = next((end for start, end in ends.items() if data.startswith(start)), b"")
    if end not in data[-64:]:
        raise ImageError("was cut short")
    return image_size(data)


def read_rgb(path: Path) -> Tensor:
    """(3, height, width): uint8, or float32 in [0, 1] of files with more than 8 bits a channel.

    Raises:
        PairError: it is damaged.
        OSError: it cannot be read.
    """
    import torch

    try:
        planes = decode(path.read_bytes())
    except ImageError as error:
        raise PairError(f"{path} {error}") from None
    if planes[0].mode == "RGB":
        return torch.from_numpy(np.array(planes[0]).transpose(2, 0, 1).copy())
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]).clip(0, 1)).expand(3, -1, -1).contiguous()


def as_float(pixels: Tensor) -> Tensor:
    """Float32 in [0, 1] of what :func:`read_rgb` gives."""
    return pixels if pixels.is_floating_point() else pixels.float() / 255


def fitted(clean: Tensor, size: tuple[int, int], fit: Literal["crop", "resize"] | None) -> Tensor:
    """A clean image (3, height, width) at the degraded one's (height, width), as its dataset's evaluation does it.

    Raises:
        ValueError: the sizes differ and the dataset does not say what to do.
    """
    height, width = clean.shape[-2:]
    if (height, width) == size:
        return clean
    if fit == "crop":
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        return clean[:, top : top + size[0], left : left + size[1]]
    if fit == "resize":
        from .degradations_resize import matlab_resize

        return matlab_resize(clean, size).clamp(0, 1)
    raise ValueError(f"the clean image is {width} x {height} pixels, the degraded one {size[1]} x {size[0]}")
