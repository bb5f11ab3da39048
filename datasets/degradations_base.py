"""What every degradation is: a frozen description that, with random numbers of one sample, damages one image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Range = float | tuple[float, float]
"""A fixed value, or (lowest, highest): drawn uniformly for every sample."""
Whole = int | tuple[int, int]
"""The same of whole numbers, both ends included."""


def sample_generator(seed: int, *key: int | str) -> np.random.Generator:
    """Random numbers of one sample: they depend on the seed and its key, such as (epoch, number) or a file's name."""
    words = [seed, len(key)]  # the length, as zeros at the end would not count
    for part in key:
        digest = hashlib.blake2b(part.encode(), digest_size=8).digest() if isinstance(part, str) else None
        words.append(int(part) if digest is None else int.from_bytes(digest))
    return np.random.default_rng(words)


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """A step of a pipeline.

    Attributes:
        kind: the step's name in YAML and on the command line.
        multiple: the clean image's sides are cropped to a multiple of this first.
    """

    kind: str

    @property
    def multiple(self) -> int:
        return 1

    def apply(self, image: Tensor, draws: np.random.Generator, depth: Tensor | None = None) -> Tensor:
        """Damage one image.

        Args:
            image: (3, height, width), float32 in [0, 1].
            draws: this step's random numbers for this sample.
            depth: (height, width), distance from the camera in any unit; only haze uses it.

        Returns:
            Float32 in [0, 1], of the same size unless the step's purpose is another.
        """
        raise NotImplementedError

    def psf(self) -> np.ndarray | None:
        """The blur's kernel where it is the same for every sample; else None."""
        return None


def check_range(owner: object, name: str, low: float, high: float = float("inf")) -> None:
    """Raises:

    ValueError: the attribute is not (within) low to high, or runs backwards.
    """
    value = getattr(owner, name)
    first, last = value if isinstance(value, tuple) else (value, value)
    if not low <= first <= last <= high:
        limits = f"{low:g} to {high:g}" if high < float("inf") else f"{low:g} or more"
        raise ValueError(
            f"{name} of {type(owner).__name__} is {value}; expected {limits}, or a lowest and a highest value"
        )


def draw(value: Range, draws: np.random.Generator) -> float:
    """A number is drawn whether or not the value is fixed, so that the steps after it do not depend on that."""
    share = draws.random()
    first, last = value if isinstance(value, tuple) else (value, value)
    return float(first + share * (last - first))


def draw_whole(value: Whole, draws: np.random.Generator) -> int:
    share = draws.random()
    first, last = value if isinstance(value, tuple) else (value, value)
    return first + min(int(share * (last - first + 1)), last - first)


def normal(draws: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32."""
    import torch

    return torch.from_numpy(draws.standard_normal(shape, dtype=np.float32))


def convolved(image: Tensor, kernel: np.ndarray) -> Tensor:
    """(channels, height, width) with a kernel (odd, odd), reflected at the borders where the image is large enough."""
    import torch
    from kornia.filters import filter2d

    fits = all(side > size // 2 for side, size in zip(image.shape[-2:], kernel.shape, strict=True))
    weights = torch.from_numpy(np.ascontiguousarray(kernel[::-1, ::-1], dtype=np.float32))
    return filter2d(image[None], weights[None], border_type="reflect" if fits else "replicate")[0]
