"""Crops for training restoration: pairs as published, or clean photographs that are degraded on the fly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .degradations import Downsample, Mixture, degrade, matlab_resize
from .draws import uniforms
from .images import CACHE_LIMIT, Key
from .pairs import Pair, PairError, Pairs, as_float, check_pairs, find_pairs, fitted, read_rgb

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class RestorationSource:
    """Attributes:

    dataset: as :func:`nextscale.datasets.pairs.find_pairs` takes it.
    degradation: of clean photographs; None: the dataset has degraded ones.
    weight: how often the source is drawn from, of the sum over all sources.
    scale: how many times larger clean images are than degraded ones, which are then enlarged by MATLAB's bicubic; None:
        as the dataset's layout says.
    """

    dataset: str
    degradation: Mixture | None = None
    weight: float = 1.0
    scale: int | None = None

    def __post_init__(self) -> None:
        if self.weight <= 0 or (self.scale is not None and self.scale < 1):
            raise ValueError(f"weight is {self.weight} and scale {self.scale}; expected more than 0, and 1 or more")


def open_restoration(
    sources: Sequence[RestorationSource],
    *,
    size: int = 256,
    flip: bool = False,
    rotate: bool = False,
    seed: int = 0,
    length: int | None = None,
    crop: bool = True,
    whole_check: bool = False,
    region: int | None = None,
    shrunk: float = 0.0,
) -> RestorationDataset:
    """Open the sources of a training run; every missing or damaged file of all of them is told before it starts.

    Args:
        size: side of the square crops in pixels; smaller images are continued by reflection.
        flip: mirror at random. rotate: by a random number of quarter turns. Both images alike.
        length: samples in an epoch; the images of all sources unless given.
        crop: at random; else the centre, for validation.
        whole_check: decode every file beforehand; else only headers and ends of files are looked at.
        region: clean photographs are degraded in squares whose sides are drawn between ``size`` and this, from which
            the crops are then cut, as tiles are from a photograph: haze does not clear within every crop, blocks of
            JPEG do not begin at its corner. None: ``size``.
        shrunk: share of samples of clean photographs that are not cut from a region but a largest one made small, as
            a photograph is when it is looked at as a whole.

    Raises:
        nextscale.datasets.pairs.PairError: lists what is wrong with the files.
        ValueError: a source is not known, or has neither degraded images nor a degradation, or both.
    """
    if not sources or size < 1 or (length is not None and length < 1):
        raise ValueError(f"{len(sources)} sources, crops of {size} and length {length}; expected at least 1 of each")
    if region is not None and region < size:
        raise ValueError(f"region is {region}; crops of {size} are cut from it, so expected at least {size}")
    found, problems = [], []
    for source in sources:
        try:
            pairs = find_pairs(source.dataset)
            if pairs.clean_only == (source.degradation is None):
                has = "no degraded images: give its degradation" if pairs.clean_only else "degraded images of its own"
                raise ValueError(f"{source.dataset} has {has}")
            check_pairs(pairs, whole=whole_check, scale=source.scale)
            found.append(pairs)
        except ValueError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise PairError("; ".join(str(problem) for problem in problems))
    return RestorationDataset(
        list(zip(sources, found, strict=True)),
        size=size,
        flip=flip,
        rotate=rotate,
        seed=seed,
        length=length or sum(len(pairs.items) for pairs in found),
        crop=crop,
        region=region or size,
        shrunk=shrunk,
    )


class RestorationDataset:
    """Map-style dataset of crops, made by :func:`open_restoration`.

    A key is a sample's number, or (epoch, number). Of one source, and without random crops of several, sample i is
    image i, unless another length was asked for; else the source is drawn by weight, then the image from it, as in
    VarFormer's training. All randomness comes from (seed, epoch, number): rank, worker and order do not matter.

    ``dataset[key]`` is a dict: ``degraded``, ``clean`` float32 (3, size, size) in [-1, 1]; ``name``; ``kind``, the
    pipeline that was drawn or the dataset's name; ``index``.
    """

    def __init__(
        self,
        parts: list[tuple[RestorationSource, Pairs]],
        *,
        size: int,
        flip: bool,
        rotate: bool,
        seed: int,
        length: int,
        crop: bool,
        region: int,
        shrunk: float,
    ) -> None:
        self.parts, self.size, self.flip, self.rotate, self.seed = parts, size, flip, rotate, seed
        self.length, self.crop, self.region, self.shrunk = length, crop, region, shrunk
        self._counts = np.array([len(pairs.items) for _, pairs in parts])
        weights = np.array([source.weight for source, _ in parts])
        self._shares = np.cumsum(weights / weights.sum())
        self._in_turn = length == self._counts.sum() and (len(parts) == 1 or not crop)
        self._kept: dict[Path, Tensor] = {}
        self._room = CACHE_LIMIT

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = map(int, key) if isinstance(key, tuple) else (0, int(key))
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        drawn = uniforms(self.seed, epoch, index, 10)
        which, image, across, down, mirrored, turns, larger, right, low, whole = drawn
        source, pairs, pair = self._chosen(index, which, image)
        clean, degraded = self._read(pair, source, pairs)
        mixture = source.degradation
        shrunk, side = whole < self.shrunk, self.size
        if mixture is not None:
            side = self.region if shrunk else side + int(larger * (self.region - side + 1))
        clean, degraded = (as_float(_square(x, side, (across, down) if self.crop else None)) for x in (clean, degraded))
        if self.flip and mirrored < 0.5:
            clean, degraded = clean.flip(-1), degraded.flip(-1)
        if self.rotate:
            clean, degraded = (x.rot90(int(4 * turns), (-2, -1)) for x in (clean, degraded))
        kind = source.dataset.partition(":")[0]
        if mixture is not None:
            kind = mixture.choose(self.seed, epoch, index)
            steps = mixture.pipelines[kind]
            steps = tuple(replace(step, enlarge=True) if isinstance(step, Downsample) else step for step in steps)
            degraded, clean = degrade(clean, steps, self.seed, epoch, index)
            if shrunk:
                clean, degraded = (squeezed(x, self.size) for x in (clean, degraded))
            # Steps may have cropped a few pixels away.
            place = (right, low) if self.crop and side > self.size else None
            clean, degraded = (_square(x, self.size, place) for x in (clean, degraded))
        return {
            "degraded": degraded.contiguous() * 2 - 1,
            "clean": clean.contiguous() * 2 - 1,
            "name": pair.name,
            "kind": kind,
            "index": index,
        }

    def _chosen(self, index: int, which: float, image: float) -> tuple[RestorationSource, Pairs, Pair]:
        if self._in_turn:
            part = int(np.searchsorted(np.cumsum(self._counts), index, side="right"))
            number = index - int(self._counts[:part].sum())
        else:
            part = min(int(np.searchsorted(self._shares, which, side="right")), len(self.parts) - 1)
            number = min(int(image * self._counts[part]), int(self._counts[part]) - 1)
        source, pairs = self.parts[part]
        return source, pairs, pairs.items[number]

    def _read(self, pair: Pair, source: RestorationSource, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The clean and the degraded image, of one size; of clean photographs twice the same."""
        assert pair.clean is not None
        clean = self._pixels(pair.clean)
        if pair.degraded is None:
            return clean, clean
        degraded = self._pixels(pair.degraded)
        if (scale := source.scale or pairs.smaller or 1) > 1:
            height, width = (side * scale for side in degraded.shape[-2:])
            degraded = matlab_resize(as_float(degraded), (height, width)).clamp(0, 1)
        size = (degraded.shape[-2], degraded.shape[-1])
        return (clean if clean.shape[-2:] == size else fitted(as_float(clean), size, pairs.fit)), degraded

    def _pixels(self, path: Path) -> Tensor:
        """A file's pixels, kept in memory while there is room: a crop costs far less than decoding."""
        if path in self._kept:
            return self._kept[path]
        pixels = read_rgb(path)
        if pixels.nbytes <= self._room:
            self._kept[path] = pixels
            self._room -= pixels.nbytes
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_room": CACHE_LIMIT}


def squeezed(image: Float[Tensor, "channels height width"], side: int) -> Float[Tensor, "channels side side"]:
    """A photograph as a whole, made a small square: bilinear, anti-aliased."""
    from torch.nn.functional import interpolate

    return interpolate(image[None], (side, side), mode="bilinear", align_corners=False, antialias=True)[0]


def _square(image: Tensor, size: int, place: tuple[float, float] | None) -> Tensor:
    """A crop of an image, continued by reflection where it is smaller; None: the centre."""
    import torch

    for dim, share in ((-2, place and place[1]), (-1, place and place[0])):
        length = image.shape[dim]
        room = length - size
        if room >= 0:
            image = image.narrow(dim, room // 2 if share is None else int(share * (room + 1)), size)
        else:
            index = torch.arange(size) % max(2 * length - 2, 1)
            image = image.index_select(dim, torch.where(index < length, index, 2 * length - 2 - index))
    return image
