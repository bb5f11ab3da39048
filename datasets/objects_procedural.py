"""Furniture, vessels and tools of random proportions: watertight coloured objects in any number, from a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .objects_furniture import bed, chair, lamp, table
from .objects_solids import Assembly, Draw
from .objects_tools import hammer, screwdriver, spoon, wrench
from .objects_vessels import bottle, cup, teapot, vase
from .shapes_files import Mesh

MAKERS: dict[str, Callable[[Draw], Assembly]] = {
    "bed": bed,
    "bottle": bottle,
    "chair": chair,
    "cup": cup,
    "hammer": hammer,
    "lamp": lamp,
    "screwdriver": screwdriver,
    "spoon": spoon,
    "table": table,
    "teapot": teapot,
    "vase": vase,
    "wrench": wrench,
}
"""Classes: a generator of random numbers -> an object with z up."""
CLASSES = tuple(MAKERS)
VERSION = 1
"""Of what a seed draws; to be raised whenever objects change, so that no folder holds two kinds."""


def make_object(seed: int, index: int, classes: tuple[str, ...] = CLASSES) -> tuple[Mesh, str]:
    """Object number ``index`` of a seed, and its class: the classes take turns.

    Closed, without overlapping parts, its longest side 2, around the origin. The same on every machine with the same
    release of manifold3d.

    Raises:
        ValueError: there is no such class.
    """
    if unknown := [name for name in classes if name not in MAKERS]:
        raise ValueError(f"there is no class {', '.join(unknown)}; choose among {', '.join(CLASSES)}")
    name = classes[index % len(classes)]
    draw = np.random.default_rng([seed, index])
    return MAKERS[name](draw).mesh().normalised(1.0), name
