"""Random draws while sampling and training, reproducible from seeds.

By default every image has a generator of its own, so that it gets the same draws alone and in any batch,
on any device, in any process. The official codes share one generator over a batch; :class:`BatchDraws` keeps their
order.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Draws(Protocol):
    """Source of randomness for one call of a sampler."""

    def categorical(self, probabilities: Float[Tensor, "batch tokens choices"]) -> Int[Tensor, "batch tokens"]:
        """One draw per row."""
        ...

    def several(
        self, probabilities: Float[Tensor, "batch tokens choices"], samples: int
    ) -> Int[Tensor, "batch tokens samples"]:
        """Independent draws per row, with replacement."""
        ...

    def bits(self, ones: Float[Tensor, "batch draws"]) -> Bool[Tensor, "batch draws"]:
        """True with the probabilities ``ones``."""
        ...

    def exponential(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Exponential(1) variates; the first axis is the batch."""
        ...

    def normal(self, shape: Sequence[int], device: torch.device, spare: int = 0) -> Tensor:
        """Standard normal variates; the first axis is the batch.

        Args:
            spare: rows that the official order draws behind these, for branches that need none here.
        """
        ...

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Uniform variates in [0, 1); the first axis is the batch."""
        ...

    def integers(self, high: int, count: int) -> Int[Tensor, " count"]:
        """One integer in [0, high) for each of ``count`` images."""
        ...


class ImageDraws:
    """One generator per image, on the CPU, whatever the device of the model."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def categorical(self, probabilities: Tensor) -> Tensor:
        return self.several(probabilities, 1)[..., 0]

    def several(self, probabilities: Tensor, samples: int) -> Tensor:
        rows = [torch.rand(probabilities.shape[1], samples, generator=generator) for generator in self._generators]
        uniform = torch.stack(rows).to(probabilities.device)
        cumulative = probabilities.cumsum(-1)
        total = cumulative[..., -1:]
        # Strictly below the total, so that the search always ends at a choice of positive probability.
        threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cumulative, threshold, right=True)

    def bits(self, ones: Tensor) -> Tensor:
        rows = [torch.rand(ones.shape[1], generator=generator) for generator in self._generators]
        return torch.stack(rows).to(ones.device) < ones

    def exponential(self, shape: Sequence[int], device: torch.device) -> Tensor:
        rows = [torch.empty(tuple(shape[1:])).exponential_(generator=g) for g in self._generators]
        return torch.stack(rows).to(device)

    def normal(self, shape: Sequence[int], device: torch.device, spare: int = 0) -> Tensor:
        return torch.stack([torch.randn(tuple(shape[1:]), generator=g) for g in self._generators]).to(device)

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return torch.stack([torch.rand(tuple(shape[1:]), generator=g) for g in self._generators]).to(device)

    def integers(self, high: int, count: int) -> Tensor:
        return torch.cat([torch.randint(high, (1,), generator=g) for g in self._generators[:count]])


class BatchDraws:
    """One generator for the whole batch, consumed in the official codes' order."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator

    def categorical(self, probabilities: Tensor) -> Tensor:
        return self.several(probabilities, 1)[..., 0]

    def several(self, probabilities: Tensor, samples: int) -> Tensor:
        flat = probabilities.flatten(0, 1)
        drawn = torch.multinomial(flat, samples, replacement=True, generator=self._generator)
        return drawn.view(*probabilities.shape[:2], samples)

    def bits(self, ones: Tensor) -> Tensor:
        return self.categorical(torch.stack((1 - ones, ones), dim=-1)).bool()

    def exponential(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return torch.empty(tuple(shape), device=device).exponential_(generator=self._generator)

    def normal(self, shape: Sequence[int], device: torch.device, spare: int = 0) -> Tensor:
        rows = (shape[0] + spare, *shape[1:])
        return torch.randn(rows, generator=self._generator, device=device)[: shape[0]]

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        return torch.rand(tuple(shape), device=device, generator=self._generator)

    def integers(self, high: int, count: int) -> Tensor:
        device = self._generator.device if self._generator is not None else "cpu"
        uniform = torch.full((1, high), 1 / high, device=device)
        return torch.multinomial(uniform, count, replacement=True, generator=self._generator)[0]


def sample_draws(batch: Mapping[str, Any], purpose: str) -> Draws:
    """What is drawn for a batch in training, from the ``seeds`` of its samples: alike in any batch and process.

    Args:
        batch: where it has no ``seeds``, the global generator draws, which each process seeds for itself.
        purpose: draws of one sample for different purposes are independent.
    """
    if "seeds" not in batch:
        return BatchDraws(None)
    salt = zlib.crc32(purpose.encode())
    return ImageDraws([seed ^ (salt << 21) for seed in batch["seeds"]])


def step_draws(step: int, purpose: str) -> torch.Generator:
    """A generator for what all samples of a step share: alike in all processes."""
    return torch.Generator().manual_seed(zlib.crc32(f"{purpose} {step}".encode()))


def image_seeds(seed: int | Sequence[int], n: int) -> list[int]:
    """One seed per image: ``seed``, ``seed + 1``, …, or those given.

    Raises:
        ValueError: there are not ``n`` of them, or ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"{n} images were asked for, expected at least 1")
    seeds = [seed + i for i in range(n)] if isinstance(seed, int) else list(seed)
    if len(seeds) != n:
        raise ValueError(f"{len(seeds)} seeds were given for {n} images")
    return seeds
