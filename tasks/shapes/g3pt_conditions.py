"""What G3PT is conditioned on: a class, the features of a picture, of a text; each may be missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ShapeConditions:
    """One condition of each of n shapes.

    Attributes:
        labels: class numbers; the number of classes stands for none.
        states: features of pictures, of models that see; shown: where there is a picture.
        text: pooled features of texts, of models that read; said: where there is a text.
    """

    labels: Int[Tensor, " n"]
    states: Float[Tensor, "n cells channels"] | None = None
    shown: Bool[Tensor, " n"] | None = None
    text: Float[Tensor, "n channels"] | None = None
    said: Bool[Tensor, " n"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Sequence[int]) -> ShapeConditions:
        """The conditions with these numbers, in this order."""
        chosen = list(rows)
        parts = (self.labels, self.states, self.shown, self.text, self.said)
        return ShapeConditions(*(None if part is None else part[chosen] for part in parts))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> ShapeConditions:
        parts = (self.labels, self.states, self.shown, self.text, self.said)
        return ShapeConditions(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]

    def with_none(self, none: int) -> ShapeConditions:
        """These, and behind them one that is none: no class, no picture, no text."""

        def longer(part: Tensor | None, value: float) -> Tensor | None:
            return None if part is None else torch.cat((part, torch.full_like(part[:1], value)))

        labels = torch.cat((self.labels, self.labels.new_full((1,), none)))
        return ShapeConditions(
            labels, longer(self.states, 0), longer(self.shown, False), longer(self.text, 0), longer(self.said, False)
        )

    def dropped(self, uniform: Float[Tensor, " n"], share: float, none: int) -> ShapeConditions:
        """What training shows of each shape: nothing where a number in [0, 1) is below ``share``; else one of the
        conditions there are, each as often."""
        kinds = [name for name, there in self._there(none).items() if bool(there.any())]
        if not kinds:
            return self
        chosen = ((uniform - share) / (1 - share) * len(kinds)).floor().clamp(max=len(kinds) - 1)
        keep = {name: chosen == number for number, name in enumerate(kinds)}
        nothing = torch.zeros_like(uniform, dtype=torch.bool)
        return ShapeConditions(
            torch.where(keep.get("class", nothing), self.labels, none),
            self.states,
            None if self.shown is None else self.shown & keep.get("picture", nothing),
            self.text,
            None if self.said is None else self.said & keep.get("text", nothing),
        )

    def _there(self, none: int) -> dict[str, Tensor]:
        found = {"class": self.labels != none}
        if self.shown is not None:
            found["picture"] = self.shown
        if self.said is not None:
            found["text"] = self.said
        return found
