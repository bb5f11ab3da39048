"""What procedural objects are and have, in words: captions, questions and answers to train describers on."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from .array_store import ArrayStore
from .conversations import with_article
from .errors import DatasetError
from .objects_procedural import CLASSES, MAKERS, VERSION
from .shapes import KIND

FEATURES: dict[str, dict[str, tuple[str, ...]]] = {
    "bed": {"pillows": ("one pillow", "two pillows"), "foot": ("a foot-board",)},
    "bottle": {"cap": ("a cap", "an open neck"), "label": ("a label",)},
    "chair": {
        "legs": ("four legs", "a column on five feet"),
        "back": ("a solid back", "a back of slats", "a back of bars"),
        "arms": ("arm-rests",),
    },
    "cup": {"saucer": ("a saucer",)},
    "hammer": {"back": ("a claw", "a wedge", "two faces")},
    "lamp": {"stem": ("an upright stem", "a bent arm")},
    "screwdriver": {"tip": ("a flat tip", "a pointed tip")},
    "spoon": {"handle": ("a long handle", "a short handle")},
    "table": {
        "top": ("a round top", "a rectangular top"),
        "legs": ("four legs", "a column", "two boards as legs", "crossed legs"),
    },
    "teapot": {"body": ("a tall body", "a round body", "a flat body")},
    "vase": {"side": ("ribs", "two handles", "a smooth side")},
    "wrench": {"end": ("a ring", "two jaws")},
}
"""What objects of a class may have; an object has one of the phrases of a feature, or none of a single one."""

WHAT = ("what is it?", "what is this object?", "name this object.", "what kind of object is this?")
IS_IT = ("is it {}?", "is this object {}?", "is this {}?")
HAS_IT = ("does it have {}?", "does the object have {}?", "has it {}?")
DESCRIBE = ("describe it.", "describe this object.", "what does it look like?")
"""Ways to ask; ``{}`` is a class or a part."""


def parts_of(seed: int, index: int, classes: Sequence[str] = CLASSES) -> tuple[str, dict[str, str]]:
    """Class and features of object number ``index`` of a seed; see :func:`.objects_procedural.make_object`."""
    name = classes[index % len(classes)]
    return name, MAKERS[name](np.random.default_rng([seed, index])).told


def caption(name: str, told: dict[str, str]) -> str:
    """A sentence: "a chair with four legs, a back of slats and arm-rests"."""
    parts = [told[feature] for feature in FEATURES[name] if told[feature]]
    if not parts:
        return with_article(name)
    return f"{with_article(name)} with {', '.join(parts[:-1])}{' and ' if len(parts) > 1 else ''}{parts[-1]}"


def questions(name: str, told: dict[str, str], draw: np.random.Generator) -> dict[str, tuple[str, str]]:
    """One question of every kind with its answer; half of the answers to questions of yes and no are yes."""

    def one(ways: Sequence[str]) -> str:
        return ways[int(draw.integers(len(ways)))]

    others = [each for each in CLASSES if each != name]
    asked = name if draw.random() < 0.5 else one(others)
    feature = one(list(FEATURES[name]))
    known = FEATURES[name][feature]
    had = told[feature]
    part = had if had and (draw.random() < 0.5 or len(known) == 1) else one([each for each in known if each != had])
    return {
        "describe": (one(DESCRIBE), caption(name, told)),
        "class": (one(WHAT), with_article(name)),
        "is-class": (one(IS_IT).format(with_article(asked)), "yes" if asked == name else "no"),
        "part": (one(HAS_IT).format(part), "yes" if part == had else "no"),
    }


def descriptions(folder: str | os.PathLike[str], seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Conversations about the procedural objects of a prepared folder, and their questions one by one.

    A conversation has a question of every kind, in random order, the first with the mark ``<shape>``; a question alone
    has shape, question, answer and group. What is said of an object depends on its name and the seed alone.

    Raises:
        DatasetError: the objects are no procedural ones, or of another version.
    """
    store = ArrayStore(folder, KIND)
    settings = store.settings
    if settings.get("source") != "procedural" or settings.get("version") != VERSION:
        raise DatasetError(f"{folder} holds no procedural objects, whose parts are known: write descriptions yourself")
    classes: list[str] = settings["classes"]
    talks, asked = [], []
    for record in store.records:
        index = int(record["name"].rsplit("-", 1)[1])
        name, told = parts_of(settings["seed"], index, classes)
        draw = np.random.default_rng([seed, settings["seed"], index])
        found = questions(name, told, draw)
        messages: list[dict[str, str]] = []
        for kind in (list(found)[i] for i in draw.permutation(len(found))):
            question, answer = found[kind]
            messages.append({"role": "user", "content": question if messages else f"<shape> {question}"})
            messages.append({"role": "assistant", "content": answer})
        talks.append({"messages": messages, "shape": record["name"]})
        for kind, (question, answer) in questions(name, told, draw).items():
            asked.append({"shape": record["name"], "question": question, "answer": answer, "group": kind})
    return talks, asked
