"""Shapes with conversations about them, as a describer is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nextscale.core.training import Batch
from nextscale.datasets.gbuffers import CAMERAS, CAPTION, GBuffers, find_objects
from nextscale.datasets.shapes import Key, ShapeSet, is_prepared
from nextscale.tasks.shapes.describing import Describer
from nextscale.tasks.shapes.describing_text import SHAPE, QuestionError, Talk
from nextscale.tasks.shapes.g3pt_tokenizer import PointTokenizer
from nextscale.tasks.shapes.sar3d_tokenizer_training import views_of

IGNORED = -100
"""Label of a token that the loss does not count."""
ENCODED = 32
"""Shapes that are encoded at once."""


class Shapes(Protocol):
    """Shapes by name, as a tokenizer reads them."""

    @property
    def names(self) -> Sequence[str]: ...
    def read(self, places: Sequence[tuple[int, int]]) -> Tensor:
        """Of shapes, each by an epoch and its number, what the tokenizer's ``encode`` takes."""
        ...

    def captions(self) -> Sequence[str]:
        """What the data says of each itself; empty where it says nothing."""
        ...


class PointShapes:
    """A folder that ``nextscale prepare shapes`` wrote, as points with normals."""

    def __init__(self, folder: str | Path, points: int | None = None, noise: float = 0.0, seed: int = 0) -> None:
        self._data = ShapeSet(folder, surface=points, uniform=0, near=0, noise=noise, images=False, seed=seed)
        self.names: Sequence[str] = self._data.names

    def read(self, places: Sequence[tuple[int, int]]) -> Tensor:
        surface: Tensor = self._data.fetch(list(places))["surface"]
        return surface

    def captions(self) -> Sequence[str]:
        names = [name.replace("_", " ").replace("-", " ") for name in self._data.classes]
        return [f"a {names[label]}" if label >= 0 else "" for label in self._data.labels.tolist()]


class ViewShapes:
    """A folder of views in SAR3D's layout (``nextscale prepare gbuffers``), as a tokenizer of planes reads them."""

    def __init__(self, folder: str | Path, tokenizer: object) -> None:
        objects = find_objects(folder)
        self._data, self._tokenizer = GBuffers(objects), tokenizer
        self.names: Sequence[str] = [path.relative_to(folder).as_posix() for path, _ in objects]

    def read(self, places: Sequence[tuple[int, int]]) -> Tensor:
        return views_of(self._data.fetch([number for _, number in places]), self._tokenizer)  # type: ignore[arg-type]

    def captions(self) -> Sequence[str]:
        there = [(path / CAPTION).is_file() for path, _ in self._data.objects]
        return self._data.texts() if all(there) else [""] * len(there)


def open_shapes(
    folder: str | Path, model: Describer, points: int | None = None, noise: float = 0.0, seed: int = 0
) -> Shapes:
    """The shapes of a folder, as a model's tokenizer reads them.

    Raises:
        QuestionError: the folder is of another kind.
    """
    folder = Path(folder).expanduser()
    if isinstance(model.tokenizer, PointTokenizer):
        if not is_prepared(folder):
            raise QuestionError(
                f"{folder} holds no prepared shapes, which a tokenizer of points reads: nextscale prepare shapes"
            )
        return PointShapes(folder, points, noise, seed)
    if is_prepared(folder) or not any(folder.rglob(CAMERAS)):
        raise QuestionError(f"{folder} holds no views, which a tokenizer of planes reads: nextscale prepare gbuffers")
    return ViewShapes(folder, model.tokenizer)


def own_talks(shapes: Shapes, question: str) -> list[Talk]:
    """A conversation about every shape that its data says something of: that, asked for by a question.

    Raises:
        QuestionError: nothing is said of any.
    """
    found = [
        (name, [{"role": "user", "content": f"{SHAPE} {question}"}, {"role": "assistant", "content": text}])
        for name, text in zip(shapes.names, shapes.captions(), strict=True)
        if text
    ]
    if not found:
        raise QuestionError("the shapes have no captions and no classes: give conversations about them")
    return found


class DescriptionSet:
    """Map-style dataset of conversations about prepared shapes; a batch is what :class:`DescriberTraining` takes.

    Shapes are encoded once, unless fresh points are asked for.

    Args:
        talks: name of a shape, and messages, of :func:`nextscale.tasks.shapes.describing_text.read_talks`.
        shapes: where they are.
        fresh: draw other points, and encode again, in every epoch.

    Raises:
        QuestionError: a conversation is about a shape that is not there, or is too long.
    """

    def __init__(
        self,
        talks: Sequence[Talk],
        shapes: Shapes,
        model: Describer,
        *,
        fresh: bool = False,
    ) -> None:
        numbers = {name: number for number, name in enumerate(shapes.names)}
        if missing := [name for name, _ in talks if name not in numbers]:
            raise QuestionError(
                f"{len(missing)} of {len(talks)} conversations are about shapes that are not there, such as "
                f"{missing[0]}"
            )
        self.shapes, self.model, self.fresh = shapes, model, fresh
        self._talks = [(numbers[name], messages) for name, messages in talks]
        self._rows = [self._spell(number, messages) for number, (_, messages) in enumerate(self._talks)]
        self._tokens: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._talks)

    def _spell(self, sample: int, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Tokens and labels of a conversation, those of answers."""
        ids, labels, before = list[int](), list[int](), ""
        for end, message in enumerate(messages, 1):
            answer = message["role"] == "assistant"
            asked = [(messages[: end - 1], True)] if answer and end > 1 else []
            for part, answering in [*asked, (messages[:end], False)]:
                text = self.model.render(part, answering)
                if not text.startswith(before):
                    raise QuestionError("the chat template does not write conversations from beginning to end")
                row = self.model.spell(text[len(before) :], first=not before)
                ids, before = ids + row, text
                labels += row if answer and not answering else [IGNORED] * len(row)
        if len(ids) > self.model.config.length:
            raise QuestionError(
                f"sample {sample} has {len(ids):,} tokens; the model reads {self.model.config.length:,} at most"
            )
        return ids, labels

    def fetch(self, keys: Sequence[Key]) -> Batch:
        """A batch of samples, each a number or (epoch, number)."""
        pairs = [(0, key) if isinstance(key, int) else (int(key[0]), int(key[1])) for key in keys]
        rows = [self._rows[number] for _, number in pairs]
        ids, mask = self.model.pad([row for row, _ in rows], left=False)
        labels = torch.full_like(ids, IGNORED)
        for place, (_, row) in enumerate(rows):
            labels[place, : len(row)] = torch.tensor(row)
        return {"ids": ids, "mask": mask, "labels": labels, "tokens": self._encoded(pairs)}

    @torch.no_grad()
    def _encoded(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Tokens of the samples' shapes."""
        wanted = [(epoch if self.fresh else 0, self._talks[number][0]) for epoch, number in pairs]
        missing = sorted({place for place in wanted if place[1] not in self._tokens or self.fresh})
        found = dict[tuple[int, int], Tensor]()
        for start in range(0, len(missing), ENCODED):
            part = missing[start : start + ENCODED]
            given = self.shapes.read(part)
            # In the tokenizer's own precision, in whatever precision the rest is trained.
            with torch.autocast(self.model.device.type, enabled=False):
                tokens = self.model.encode(given).cpu()
            found.update(zip(part, tokens, strict=True))
        if not self.fresh:
            self._tokens.update({number: tokens for (_, number), tokens in found.items()})
            return torch.stack([self._tokens[number] for _, number in wanted])
        return torch.stack([found[place] for place in wanted])
