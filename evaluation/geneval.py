"""GenEval: whether the objects that a prompt names are in an image, as many, coloured and placed as it says.

Ghosh et al. 2023 (arXiv 2310.11513), by the rules of the official ``evaluate_images.py`` (github djghosh13/geneval).
What finds objects and names colours is given by the caller; the published figures are of Mask2Former (Swin-S, COCO) and
CLIP ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Confidence above which an object counts; the second where objects are counted."""
MAX_OBJECTS = 16
"""Of a class in an image, the most confident ones."""
POSITION_MARGIN = 0.1
"""Share of both objects' sizes by which they must lie apart to lie beside each other."""
BACKGROUND = "#999"
"""What surrounds an object whose colour is asked."""


@dataclass(frozen=True)
class Detection:
    """An object in an image.

    Attributes:
        box: left, top, right, bottom, in pixels.
        mask: bool (height, width) of the whole image; None: none is known.
    """

    name: str
    confidence: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether an image is as its prompt says, and why not."""

    correct: bool
    reasons: tuple[str, ...] = ()


Detect = Callable[[Image.Image], Sequence[Detection]]
NameColours = Callable[[Sequence[Image.Image], str], Sequence[str]]
"""Pictures of objects of a class, and the class -> the colour of each, of :data:`COLOURS`."""


def kept(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections that count, by class, the most confident first."""
    limit = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for each in sorted(detections, key=lambda each: -each.confidence):
        if each.confidence > limit and len(found.setdefault(each.name, [])) < MAX_OBJECTS:
            found[each.name].append(each)
    return {name: objects for name, objects in found.items() if objects}


def judge(
    image: Image.Image, details: Mapping[str, Any], detections: Sequence[Detection], name_colours: NameColours
) -> Verdict:
    """Whether an image is as a prompt's metadata says.

    Args:
        details: ``tag``; ``include``, of which all must hold: ``class``, ``count``, and where asked ``color`` and
            ``position`` (a relation and the number of the entry before it that it relates to); ``exclude``, of which
            none may: ``class`` and ``count``.
    """
    objects = kept(detections, details["tag"])
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for wanted in details.get("include", []):
        found, wrong = objects.get(wanted["class"], [])[: wanted["count"]], ""
        if len(found) < wanted["count"]:
            wrong = f"expected {wanted['class']} >= {wanted['count']}, found {len(found)}"
        elif "color" in wanted:
            colours = list(name_colours([cut_out(image, each) for each in found], wanted["class"]))
            if colours.count(wanted["color"]) < wanted["count"]:
                wrong = f"expected {wanted['color']} {wanted['class']} >= {wanted['count']}, found {', '.join(colours)}"
        if not wrong and "position" in wanted:
            wrong = _misplaced(wanted, found, matched)
        if wrong:
            reasons.append(wrong)
        matched.append(None if wrong else found)
    for unwanted in details.get("exclude", []):
        if (count := len(objects.get(unwanted["class"], []))) >= unwanted["count"]:
            reasons.append(f"expected {unwanted['class']} < {unwanted['count']}, found {count}")
    return Verdict(not reasons, tuple(reasons))


def _misplaced(wanted: Mapping[str, Any], found: list[Detection], matched: list[list[Detection] | None]) -> str:
    relation, number = wanted["position"]
    targets = matched[number]
    if targets is None:
        return f"no target for {wanted['class']} to be {relation}"
    for each in found:
        for target in targets:
            relations = relations_of(each.box, target.box)
            if relation not in relations:
                said = " and ".join(sorted(relations)) or "neither beside nor above or below"
                return f"expected {wanted['class']} {relation} target, found {said}"
    return ""


def relations_of(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box lies from another: of "left of", "right of", "above" and "below" those that hold."""
    boxes = np.array([box, other], float).reshape(2, 2, 2)
    centres, sizes = boxes.mean(1), np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    apart = np.maximum(np.abs(offset) - POSITION_MARGIN * sizes.sum(0), 0) * np.sign(offset)
    if (np.abs(apart) < 1e-3).all():
        return set()
    across, down = apart / np.linalg.norm(offset)
    holds = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, true in holds.items() if true}


def cut_out(image: Image.Image, found: Detection) -> Image.Image:
    """An object's box, grey where the object is not."""
    image = image.convert("RGB")
    if found.mask is not None:
        grey = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, grey, Image.fromarray(np.asarray(found.mask, bool)))
    left, top, right, bottom = (round(edge) for edge in found.box)
    return image.crop((left, top, right, bottom))


def colour_prompts(name: str) -> list[list[str]]:
    """What each colour of :data:`COLOURS` is described by, for a class."""
    return [[f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}", f"a photo of a {c} object"]
            for c in COLOURS]  # fmt: skip


def summary(verdicts: Sequence[tuple[str, int, Verdict]]) -> dict[str, Any]:
    """The benchmark's figures, shares of 1.

    Args:
        verdicts: of every image, with its prompt's tag and number.

    Returns:
        ``overall``, the mean of ``tags``; ``tags``; ``images``, the share of right ones, and ``prompts``, of those of
        which one image is right.
    """
    tags: dict[str, list[bool]] = {}
    prompts: dict[int, bool] = {}
    for tag, number, verdict in verdicts:
        tags.setdefault(tag, []).append(verdict.correct)
        prompts[number] = prompts.get(number, False) or verdict.correct
    shares = {tag: float(np.mean(found)) for tag, found in tags.items()}
    return {
        "overall": float(np.mean(list(shares.values()))),
        "tags": shares,
        "images": float(np.mean([verdict.correct for _, _, verdict in verdicts])),
        "prompts": float(np.mean(list(prompts.values()))),
    }
