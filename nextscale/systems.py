"""The systems this library knows, and how each is recognised. A later system adds one entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from nextscale.models import MODELS


@dataclass(frozen=True)
class System:
    """Attributes:

    module: has ``is_official(content)`` and the class; imported when it is needed.
    class_name: of the class with ``from_official`` and ``from_saved``.
    tokenizer: name of the model to take the tokenizer from where a file does not hold it; None: it needs none.
    tokenizer_entry: where the system's training files keep their tokenizer.
    overrides: what an official file cannot tell, beside the tokenizer.
    """

    name: str
    module: str
    class_name: str
    tokenizer: str | None = None
    tokenizer_entry: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    def recognises(self, content: Mapping[str, Any]) -> bool:
        """Whether a file's content is of this system, in its official layout."""
        return bool(import_module(self.module).is_official(content))

    @property
    def model_class(self) -> Any:
        return getattr(import_module(self.module), self.class_name)

    @property
    def terms(self) -> str:
        """Under which terms the published weights of this system are given."""
        return next(model.terms for model in MODELS.values() if model.system == self.name and model.repository)


_SYSTEMS = (
    System(
        name="var",
        module="nextscale.tasks.generation.var",
        class_name="VAR",
        tokenizer="var-tokenizer",
        tokenizer_entry=("trainer", "vae_local"),
        overrides=("schedule", "heads"),
    ),
    System(
        name="residual-vq",
        module="nextscale.tasks.tokenizers.residual_vq",
        class_name="ResidualVQ",
        overrides=("schedule", "unit_norm", "smoothing", "beta", "norm_groups"),
    ),
)

SYSTEMS: dict[str, System] = {system.name: system for system in _SYSTEMS}
"""By the name that saved folders carry. Files are tried in this order."""


def find_system(name: str) -> System:
    """Raises:

    ValueError: no system is called so.
    """
    if name not in SYSTEMS:
        raise ValueError(f"unknown system {name!r}; known are {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


@dataclass(frozen=True)
class Recipe:
    """Something that can be trained.

    Attributes:
        place: ``module:class`` of the recipe, a dataclass of options with ``trainer``, ``examples`` and ``finish``.
    """

    place: str
    summary: str

    @property
    def recipe_class(self) -> Any:
        module, name = self.place.split(":")
        return getattr(import_module(module), name)


RECIPES: dict[str, Recipe] = {
    "tokenizer": Recipe(
        "nextscale.tasks.tokenizers.recipe:TokenizerRecipe", "images <-> residual token pyramids; first of the two"
    ),
    "var": Recipe("nextscale.tasks.generation.var_recipe:VARRecipe", "class-conditional transformer over tokens"),
}
"""What ``nextscale train`` trains, by name."""
