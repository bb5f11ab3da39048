"""Weights that are a function of their own names.

A golden case does not store its weights: every one is drawn from a generator that is seeded by the weight's
name, so names and shapes are enough to rebuild a whole model, anywhere.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np


def seeded_weight(name: str, shape: Sequence[int]) -> np.ndarray:
    """The float32 weight of this name and shape.

    A standard normal z drawn by NumPy's default generator, seeded by the CRC-32 of the name, becomes

    * 1 + abs(z) / 10 where the name ends in ``running_var`` (a variance is positive);
    * 1 + z / 10 for a vector whose name ends in ``weight`` (the scale of a norm);
    * z / 10 for any other vector or scalar (a bias);
    * z / sqrt(fan in) for the rest, the fan in being the product of all axes but the first.
    """
    sizes = tuple(int(size) for size in shape)
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    z = np.asarray(generator.standard_normal(sizes, dtype=np.float32))
    weight: np.ndarray
    if name.endswith("running_var"):
        weight = 1 + np.abs(z) / 10
    elif len(sizes) > 1:
        weight = z / math.sqrt(math.prod(sizes[1:]))
    elif len(sizes) == 1 and name.endswith("weight"):
        weight = 1 + z / 10
    else:
        weight = z / 10
    return np.asarray(weight, np.float32)
