"""Segmentation masks as control pictures, coloured by where they lie.

ControlVAR's rendering (arXiv 2406.09750, section 4.1): every mask takes a colour by the place of its centre on a grid
of 11 x 11, later masks are painted over earlier ones, and small ones are left out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SMALLEST = 5000
"""Pixels below which a mask is left out, of a picture of 512 x 512."""

GRID = 11


class AnnotationError(ValueError):
    """Annotations of masks that cannot be read."""


def palette() -> np.ndarray:
    """uint8 (124, 3): all colours of the levels 0, 64, 128, 192 and 255 but black; red changes slowest."""
    levels = (0, 64, 128, 192, 255)
    return np.array(list(itertools.product(levels, repeat=3))[1:], np.uint8)


def color_masks(
    masks: Iterable[np.ndarray], areas: Sequence[int] | None = None, smallest: int = SMALLEST
) -> np.ndarray:
    """Masks as one picture on black.

    Args:
        masks: (height, width) each, nonzero inside, all of one size; in the order they are painted.
        areas: pixels of each; None: counted.
        smallest: masks with fewer pixels are left out, as are empty ones.

    Returns:
        uint8 (height, width, 3).

    Raises:
        ValueError: there is no mask, they differ in size, or there is not one area for each.
    """
    drawn = [np.asarray(mask) != 0 for mask in masks]
    if not drawn or any(mask.ndim != 2 or mask.shape != drawn[0].shape for mask in drawn):
        raise ValueError(
            f"masks of one size were expected, (height, width) each; got {sorted({m.shape for m in drawn})}"
        )
    counted = [int(mask.sum()) for mask in drawn] if areas is None else list(areas)
    if len(counted) != len(drawn):
        raise ValueError(f"{len(counted)} areas were given for {len(drawn)} masks: give one for each")
    height, width = drawn[0].shape
    colors = palette()
    picture = np.zeros((height, width, 3), np.uint8)
    for mask, area in zip(drawn, counted, strict=True):
        if area < smallest or not mask.any():
            continue
        rows, columns = np.nonzero(mask)
        x, y = int(columns.mean() / (width / GRID)), int(rows.mean() / (height / GRID))
        picture[mask] = colors[(x * y) % len(colors)]
    return picture


def color_labels(labels: np.ndarray, smallest: int | None = None, background: int = 0) -> np.ndarray:
    """A label map as such a picture, its labels in rising order.

    Args:
        labels: whole numbers (height, width), one per region.
        smallest: as in :func:`color_masks`; None: the same share of the picture as there.
        background: the label that stays black.

    Raises:
        ValueError: the map has another form or nothing but background.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.dtype.kind not in "iub":
        raise ValueError(f"a label map is whole numbers (height, width), got {labels.dtype} {labels.shape}")
    values = [value for value in np.unique(labels) if value != background]
    if not values:
        raise ValueError(f"the label map holds nothing but background ({background})")
    return color_masks([labels == value for value in values], smallest=_share(labels.shape, smallest))


def read_masks(path: str | Path, smallest: int | None = None) -> np.ndarray:
    """Annotations of one picture as such a picture: Segment Anything's JSON, with masks in COCO's run lengths.

    Args:
        path: a JSON file: a list of annotations, or an object with the entry ``annotations``. Each has
            ``segmentation`` (``size``: height and width; ``counts``: a list or a text) and may have ``area``.
        smallest: as in :func:`color_masks`; None: the same share of the picture as there.

    Returns:
        uint8 (height, width, 3).

    Raises:
        AnnotationError: the file is no such JSON.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path} is no JSON ({error})") from None
    found = content.get("annotations") if isinstance(content, Mapping) else content
    if not isinstance(found, list) or not found:
        raise AnnotationError(f"{path} holds no list of annotations")
    try:
        masks = [decode_runs(annotation["segmentation"]) for annotation in found]
        areas = [int(a.get("area", mask.sum())) for a, mask in zip(found, masks, strict=True)]
        return color_masks(masks, areas, _share(masks[0].shape, smallest))
    except (KeyError, TypeError, ValueError) as error:
        raise AnnotationError(f"{path}: an annotation cannot be read ({error})") from None


def _share(shape: tuple[int, ...], smallest: int | None) -> int:
    return -(-SMALLEST * shape[0] * shape[1] // 512**2) if smallest is None else smallest


def decode_runs(encoded: Mapping[str, Any]) -> np.ndarray:
    """A mask from COCO's run lengths: column by column, runs of 0 and 1 in turn, the first of 0.

    Args:
        encoded: ``size`` (height, width) and ``counts``: a list of lengths, or their compressed text.

    Returns:
        bool (height, width).

    Raises:
        ValueError: the runs do not fill the size.
    """
    height, width = (int(side) for side in encoded["size"])
    counts = encoded["counts"]
    runs = _decompress(counts) if isinstance(counts, str) else [int(count) for count in counts]
    if min(runs, default=-1) < 0 or sum(runs) != height * width or height * width < 1:
        raise ValueError(f"runs of {sum(runs)} pixels do not fill a mask of {height} x {width}")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def _decompress(text: str) -> list[int]:
    """Lengths from a text: 5 bits a character, the lowest first, and a bit that says whether more follow; from the
    fourth on, each is the difference to the one two before."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} belongs to no compressed runs")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the compressed runs end in the middle of a number")
    return runs
