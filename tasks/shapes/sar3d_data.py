"""Objects as SAR3D's training reads them: tokens and a condition each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale.core.cross_attention import Packed
from nextscale.datasets.gbuffers import GBuffers, Key, find_objects, held_out
from nextscale.tasks.generation.text import TextFeatures
from nextscale.tasks.shapes.sar3d import SAR3D
from nextscale.tasks.shapes.sar3d_tokenizer_training import views_of


@dataclass(frozen=True)
class ObjectData:
    """A set of objects in the G-buffer layout (:mod:`nextscale.datasets.gbuffers`).

    Attributes:
        source: folder.
        validation: folder of held-out objects.
        held_out: where there is no such folder, so many objects of each category are held out, the last.
        size: side in pixels that pictures are resized to; None: their own.
        normals: read them.
    """

    source: str
    validation: str | None = None
    held_out: int = 0
    size: int | None = None
    normals: bool = False

    def open_training(self) -> GBuffers:
        objects = find_objects(self.source)
        if self.validation is None and self.held_out:
            objects = held_out(objects, self.held_out)[0]
        if not objects:
            raise ValueError(f"all objects of {self.source} are held out: lower held_out from {self.held_out}")
        return GBuffers(objects, self.size, normals=self.normals)

    def open_validation(self) -> GBuffers | None:
        if self.validation is not None:
            return GBuffers(find_objects(self.validation), self.size)
        kept = held_out(find_objects(self.source), self.held_out)[1] if self.held_out else []
        return GBuffers(kept, self.size) if kept else None


class ConditionedObjects:
    """Objects with tokens, made once of their pictures, and with one picture (another at every epoch) or their text.

    A batch holds ``tokens`` (batch, length), and ``condition`` (pictures (batch, 3, size, size) in [0, 1] or texts) or
    ``features`` where they are prepared.
    """

    def __init__(self, dataset: GBuffers, model: SAR3D, seed: int) -> None:
        self.dataset, self._model, self._seed = dataset, model, seed
        self._tokens: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, keys: Sequence[Key]) -> dict[str, Any]:
        batch = self.dataset.fetch(keys)
        if "tokens" in batch:
            states = batch["states"]
            packed = Packed(states.flatten(0, 1), (states.shape[1],) * len(states))
            return {"tokens": batch["tokens"], "features": TextFeatures(packed, batch["pooled"])}
        numbers = [key if isinstance(key, int) else key[1] for key in keys]
        epochs = [0 if isinstance(key, int) else key[0] for key in keys]
        found = {"tokens": self._encoded(numbers, batch)}
        if "caption" in batch:
            return {**found, "condition": batch["caption"]}
        count = batch["colours"].shape[1]
        rows = zip(epochs, numbers, strict=True)
        chosen = [int(np.random.default_rng((self._seed, *row)).integers(count)) for row in rows]
        return {**found, "condition": batch["colours"][torch.arange(len(chosen)), torch.tensor(chosen)]}

    @torch.no_grad()
    def _encoded(self, numbers: Sequence[int], batch: dict[str, Any]) -> Tensor:
        missing = [place for place, number in enumerate(numbers) if number not in self._tokens]
        if missing:
            tokenizer = self._model.tokenizer
            rows = {name: batch[name][missing].to(tokenizer.device) for name in ("colours", "depth", "cameras")}
            # In the tokenizer's own precision, in whatever precision the model is trained.
            with torch.autocast(tokenizer.device.type, enabled=False):
                tokens = tokenizer.encode(views_of(rows, tokenizer).flatten(0, 1)).cpu()
            self._tokens.update({numbers[place]: row for place, row in zip(missing, tokens, strict=True)})
        return torch.stack([self._tokens[number] for number in numbers])
