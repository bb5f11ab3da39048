"""Prepared shapes as G3PT's training reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextscale.datasets.shapes import Key, ShapeSet
from nextscale.tasks.shapes.g3pt import G3PT

ENCODED = 32
"""Shapes that are encoded at once."""


@dataclass(frozen=True)
class ShapeData:
    """A folder of prepared shapes (``nextscale prepare shapes``).

    Attributes:
        source: folder.
        validation: folder of held-out shapes.
        surface, uniform, near: points of a sample, drawn anew in every epoch; None: all there are.
        noise, stretch: see :class:`nextscale.datasets.shapes.ShapeSet`; of training samples alone.
    """

    source: str
    validation: str | None = None
    surface: int | None = None
    uniform: int | None = None
    near: int | None = None
    noise: float = 0.0
    stretch: float = 0.0

    def open_training(self, seed: int = 0, images: bool = False) -> ShapeSet:
        return ShapeSet(
            self.source,
            surface=self.surface,
            uniform=self.uniform,
            near=self.near,
            noise=self.noise,
            stretch=self.stretch,
            images=images,
            seed=seed,
        )

    def open_validation(self, images: bool = False, classes: Sequence[str] | None = None) -> ShapeSet | None:
        """Held-out shapes, all points in space, without noise."""
        if self.validation is None:
            return None
        return ShapeSet(self.validation, surface=self.surface, images=images, classes=classes)


class ConditionedShapes:
    """Shapes as latents, which are made once of their points, with what the model is told of each.

    A batch holds ``features``, ``label``, and, as the model is told by them, ``image`` or ``states``, and ``text``.

    Args:
        texts: pooled features of the prompt of every class.
    """

    def __init__(self, dataset: ShapeSet, model: G3PT, texts: Tensor | None = None) -> None:
        if model.config.prefix and not dataset.images:
            raise ValueError(
                "the model is told by pictures, and the prepared shapes hold none: prepare them with views"
            )
        self.dataset, self._model, self._texts = dataset, model, texts
        self._features: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, keys: Sequence[Key]) -> dict[str, Any]:
        batch = self.dataset.fetch(keys)
        labels: Tensor = batch["label"]
        found: dict[str, Any] = {"features": self._encoded(batch), "label": labels}
        if self._model.picture_encoder is not None:
            found["image"] = batch["image"]
        elif self._model.config.prefix:
            found["states"] = self._model.reader.states(list(batch["image"]), None, self._model.device)
        if self._texts is not None:
            found["text"] = self._texts[labels]
        return found

    @torch.no_grad()
    def _encoded(self, batch: Mapping[str, Any]) -> Tensor:
        numbers = batch["index"].tolist()
        missing = [place for place, number in enumerate(numbers) if number not in self._features]
        tokenizer = self._model.tokenizer
        for start in range(0, len(missing), ENCODED):
            places = missing[start : start + ENCODED]
            # In the tokenizer's own precision, in whatever precision the model is trained.
            with torch.autocast(tokenizer.device.type, enabled=False):
                latents = tokenizer.features(batch["surface"][places].to(tokenizer.device)).half().cpu()
            self._features.update({numbers[place]: row for place, row in zip(places, latents, strict=True)})
        return torch.stack([self._features[number] for number in numbers])


def prompt_of(name: str) -> str:
    """The text that stands for a class."""
    return f"a {name}"
