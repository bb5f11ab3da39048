"""Questions about images, requests to draw, and answers, made of classes and colours: data for small models.

The colour of an image is the one of :data:`.captions.COLOURS` that most of its pixels are nearest to. It is asked for
only where it is clear: where it leads the second one by `LEAD` of all pixels.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .captions import COLOURS, colour_shares
from .errors import DatasetError
from .files import replace_file, temporary
from .images import ImageDataset

LEAD = 0.15
"""Share of the pixels by which the first colour leads where it is asked for."""
GENERIC = 0.1
"""Share of the requests that say nothing of what is to be drawn."""
CLASS_FIRST = 0.7
"""How often the class is asked for before a question that gives it away."""

CLASS = ("what is it?", "what is this?", "what is in the picture?", "what does the picture show?", "what do you see?")
COLOUR = ("what colour is most of it?", "what colour is most of the picture?", "which colour is there most of?")
IS_CLASS = ("is it {}?", "is this {}?", "is there {} in the picture?", "does the picture show {}?")
IS_COLOUR = ("is most of it {}?", "is the picture mostly {}?")
DESCRIBE = ("describe it.", "describe the picture.", "what is it, and what colour?")
DRAW = ("draw {}.", "please draw {}.", "draw me {}.", "i would like a picture of {}.", "make a picture of {}.")
ANYTHING = ("draw something.", "draw a picture.", "please draw anything you like.")
HERE = ("", "here it is ")
"""Ways to ask; ``{}`` is a class or a colour."""


def with_article(name: str) -> str:
    """A name as it stands in a sentence: "a cat", "an airplane"."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


@dataclass(frozen=True)
class Facts:
    """What is known of an image.

    Attributes:
        colour: None where none leads clearly.
    """

    name: str
    colour: str | None


def colour_of(shares: np.ndarray) -> str | None:
    """The colour of an image whose pixels are of the colours in these shares; None where none is clear."""
    second, first = np.argsort(shares)[-2:]
    return list(COLOURS)[first] if shares[first] - shares[second] >= LEAD else None


def questions(facts: Facts, classes: Sequence[str], draw: np.random.Generator) -> dict[str, tuple[str, str]]:
    """One question of every kind with its answer; of colours only where there is one. Half of the answers to questions
    of yes and no are yes."""

    def one(ways: Sequence[str]) -> str:
        return ways[int(draw.integers(len(ways)))]

    def other(name: str, names: Sequence[str]) -> tuple[str, str]:
        rest = [each for each in names if each != name]
        right = not rest or draw.random() < 0.5
        return (name, "yes") if right else (rest[int(draw.integers(len(rest)))], "no")

    asked, answer = other(facts.name, classes)
    found = {
        "class": (one(CLASS), with_article(facts.name)),
        "is-class": (one(IS_CLASS).format(with_article(asked)), answer),
    }
    if facts.colour is not None:
        asked, answer = other(facts.colour, list(COLOURS))
        found["colour"] = (one(COLOUR), facts.colour)
        found["is-colour"] = (one(IS_COLOUR).format(asked), answer)
        found["describe"] = (one(DESCRIBE), with_article(f"{facts.colour} {facts.name}"))
    return found


def reading(facts: Facts, classes: Sequence[str], image: str, draw: np.random.Generator) -> dict[str, Any]:
    """A conversation about an image, with one question of every kind, in random order."""
    found = questions(facts, classes, draw)
    order = [list(found)[i] for i in draw.permutation(len(found))]
    if draw.random() < CLASS_FIRST:
        order.sort(key=lambda kind: kind in ("is-class", "describe"))
    messages: list[dict[str, str]] = []
    for kind in order:
        question, answer = found[kind]
        text = question if messages else f"<image> {question}"
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [image]}


def drawing(facts: Facts, image: str, draw: np.random.Generator) -> dict[str, Any]:
    """A request for an image, by its class, by class and colour, or by nothing."""
    kind = draw.random()
    if kind < GENERIC:
        text = ANYTHING[int(draw.integers(len(ANYTHING)))]
    else:
        coloured = facts.colour is not None and kind > (1 + GENERIC) / 2
        thing = f"{facts.colour} {facts.name}" if coloured else facts.name
        text = DRAW[int(draw.integers(len(DRAW)))].format(with_article(thing))
    answer = f"{HERE[int(draw.integers(len(HERE)))]}<image_gen>"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [image]}


def write_conversations(
    out: str | os.PathLike[str],
    images: ImageDataset,
    classes: Sequence[str] | None = None,
    *,
    seed: int = 0,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write images, conversations about them, requests to draw them, and questions to measure by.

    ``images/`` has a PNG of every image; ``reading.json`` and ``drawing.json`` a conversation each about every image,
    in the form that :func:`nextscale.tasks.generation.vargpt_data.read_conversations` takes, ``conversations.json``
    both; ``questions.jsonl`` every question alone, as :func:`.questions.read_questions` reads the form "answers". What
    is said of an image depends on its number and the seed alone.

    Args:
        classes: names in the order of the labels; None: the data's own.
        limit: only the first so many images.

    Returns:
        How many of each were written.

    Raises:
        DatasetError: the images have no classes, or these no names.
    """
    names = tuple(classes or images.classes or ())
    if images.labels is None or len(names) < images.num_classes:
        raise DatasetError(
            f"questions name classes, and the data has {images.num_classes} classes with {len(names)} names: give "
            "class names, one for each"
        )
    out, total = Path(out), min(limit or len(images), len(images))
    reads: list[dict[str, Any]] = []
    draws: list[dict[str, Any]] = []
    asked: list[dict[str, str]] = []
    (out / "images").mkdir(parents=True, exist_ok=True)
    for number, facts, pixels in _facts(images, names, total):
        place = f"images/{number:06d}.png"
        _write_png(out / place, pixels)
        draw = np.random.default_rng([seed, number])
        reads.append(reading(facts, names, place, draw))
        draws.append(drawing(facts, place, draw))
        for kind, (question, answer) in questions(facts, names, draw).items():
            asked.append({"image": place, "question": question, "answer": answer, "group": kind})
        if progress is not None:
            progress(number + 1, total)
    for name, rows in (("reading", reads), ("drawing", draws), ("conversations", [*reads, *draws])):
        replace_file(out / f"{name}.json", json.dumps(rows, indent=1).encode())
    replace_file(out / "questions.jsonl", "".join(f"{json.dumps(row)}\n" for row in asked).encode())
    return {"images": total, "conversations": 2 * total, "questions": len(asked)}


def _facts(images: ImageDataset, names: Sequence[str], total: int) -> Iterator[tuple[int, Facts, np.ndarray]]:
    """Number, facts and pixels (height, width, 3) of every image."""
    for start in range(0, total, 256):
        batch = images.fetch(range(start, min(start + 256, total)))
        shares = colour_shares(batch["image"])
        pixels = ((batch["image"] + 1) * 127.5).round().byte().movedim(1, -1).numpy()
        for place, label in enumerate(batch["label"].tolist()):
            yield start + place, Facts(names[label], colour_of(shares[place])), pixels[place]


def _write_png(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    # There whole or not at all; that it is on the disk matters only once the files that name it are.
    unfinished = temporary(path)
    try:
        Image.fromarray(pixels).save(unfinished, "png")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
