"""Class names: ImageNet-1k's, and finding a class by its name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources

IMAGENET: tuple[str, ...] = tuple(
    resources.files("nextscale.datasets").joinpath("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
)
"""The 1,000 classes of ILSVRC 2012 in the order of their WordNet numbers, synonyms separated by commas."""

LISTED = 40
"""As many classes as this are all named where one is not known."""


def find_class(name: str, names: Sequence[str] | None) -> int:
    """Number of the class called ``name``, by any of its synonyms, whatever the case.

    Where no class is called so, a name that contains the word is taken if it is the only one.

    Raises:
        ValueError: the model has no class names, or the name is unknown or ambiguous.
    """
    if not names:
        raise ValueError(f"this model knows its classes by number only, not by a name such as {name!r}")
    wanted = _plain(name)
    synonyms = [[_plain(part) for part in entry.split(",")] for entry in names]
    exact = [number for number, entry in enumerate(synonyms) if wanted in entry]
    if len(exact) == 1:
        return exact[0]
    partial = exact or [n for n, entry in enumerate(synonyms) if any(wanted in part.split() for part in entry)]
    if len(partial) == 1:
        return partial[0]
    if partial:
        listed = "; ".join(f"{number}: {names[number]}" for number in partial[:8])
        more = f" and {len(partial) - 8} more" if len(partial) > 8 else ""
        raise ValueError(f"class {name!r} could be any of {listed}{more}; give the number")
    # A dict keeps the order and names a synonym that two classes share only once.
    known = list(dict.fromkeys(part for entry in synonyms for part in entry))
    near = difflib.get_close_matches(wanted, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    if not near and len(names) <= LISTED:
        hint = f"; there are {', '.join(names)}"
    raise ValueError(f"no class is called {name!r}{hint}")


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
