"""From what a user gives, a class, a picture, a text, to what G3PT's network reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nextscale.datasets.imagenet import find_class
from nextscale.tasks.generation.text import TextEncoder, TextEncoderConfig
from nextscale.tasks.shapes.g3pt_conditions import ShapeConditions
from nextscale.tasks.shapes.pictures import ImageEncoder, PictureNetwork, is_picture, pixels

if TYPE_CHECKING:
    from nextscale.tasks.shapes.g3pt import G3PTConfig


class ConditionReader:
    """Encoders of pictures and texts, loaded when they are needed.

    Attributes:
        home: a folder in which encoders may lie.
    """

    home: Path | None = None

    def __init__(self, config: G3PTConfig) -> None:
        self.config = config
        self._text: TextEncoder | None = None
        self._image: ImageEncoder | None = None

    @property
    def text_encoder(self) -> TextEncoder:
        """The encoder of texts; set it to one with other options (device, a cache).

        Raises:
            ValueError: the model reads no texts.
        """
        if self._text is None:
            if self.config.text is None:
                raise ValueError("this model reads no texts; it is told by " + self._told_by())
            self._text = TextEncoder(self.config.text, home=self.home)
        return self._text

    @text_encoder.setter
    def text_encoder(self, encoder: TextEncoder) -> None:
        self._text = encoder

    @property
    def image_encoder(self) -> ImageEncoder:
        """The encoder of pictures, where it is not part of the model; set it to one with other options."""
        if self._image is None:
            if self.config.image is None:
                raise ValueError("this model sees no pictures; it is told by " + self._told_by())
            self._image = ImageEncoder(self.config.image, home=self.home)
        return self._image

    @image_encoder.setter
    def image_encoder(self, encoder: ImageEncoder) -> None:
        self._image = encoder

    def _told_by(self) -> str:
        config = self.config
        names = {"classes": config.classes, "pictures": config.prefix, "texts": config.text}
        return ", ".join(name for name, known in names.items() if known) or "nothing"

    # --- reading -----------------------------------------------------------------------------------------

    def read(self, condition: Any, learned: PictureNetwork | None, device: torch.device) -> ShapeConditions:
        """The conditions of one or several shapes.

        Args:
            learned: the model's own encoder of pictures.

        Raises:
            ValueError: a condition is of a kind that the model is not told by, or unknown.
            OSError: a picture cannot be read.
        """
        one = not isinstance(condition, Iterable) or isinstance(condition, str) or is_picture(condition)
        given = [condition] if one else list(condition)
        if not given:
            raise ValueError("the list of conditions is empty; give at least one")
        kinds = [self._kind(item) for item in given]
        none, rows = self.config.classes, range(len(given))
        labels = torch.tensor([kinds[row][1] if kinds[row][0] == "class" else none for row in rows])
        parts: dict[str, Any] = {}
        if pictured := [row for row in rows if kinds[row][0] == "picture"]:
            states = self.states([given[row] for row in pictured], learned, device)
            parts["states"] = states.new_zeros(len(given), *states.shape[1:])
            parts["states"][pictured] = states
            parts["shown"] = torch.tensor([kind == "picture" for kind, _ in kinds])
        if told := [row for row in rows if kinds[row][0] == "text"]:
            vectors = self.vectors([str(given[row]) for row in told])
            parts["text"] = vectors.new_zeros(len(given), vectors.shape[1])
            parts["text"][told] = vectors
            parts["said"] = torch.tensor([kind == "text" for kind, _ in kinds])
        return ShapeConditions(labels, **parts)

    def _kind(self, item: Any) -> tuple[str, int]:
        """What a condition is, and a class's number."""
        config = self.config
        if item is None:
            return "class", config.classes
        if isinstance(item, int):
            if not 0 <= item <= config.classes:
                raise ValueError(f"class {item} does not exist: there are {config.classes}, counted from 0")
            return "class", item
        if isinstance(item, str):
            try:
                return "class", find_class(item, config.class_names)
            except ValueError:
                if config.text is not None:
                    return "text", 0
                if not config.prefix or (config.class_names and not Path(item).suffix):
                    raise
                return "picture", 0
        if isinstance(item, Image.Image | np.ndarray | Tensor | Path):
            if not config.prefix:
                raise ValueError("this model sees no pictures; it is told by " + self._told_by())
            return "picture", 0
        raise ValueError(f"a condition is {item!r}; expected a class, a picture (path, PIL image, pixels) or a text")

    def states(
        self, pictures: Sequence[Any], learned: PictureNetwork | None, device: torch.device
    ) -> Float[Tensor, "n cells channels"]:
        """Features of pictures.

        Raises:
            ValueError: the encoder's features are not of the number and width that the model reads.
        """
        config = self.config
        if learned is not None:
            found = learned(pixels(pictures, learned.config.size).to(device)).states
        else:
            found = self.image_encoder.encode(pictures).states
        states = found.values.unflatten(0, (len(pictures), -1))
        if states.shape[1:] != (config.prefix, config.picture_width):
            raise ValueError(
                f"the encoder gives {states.shape[1]} features of {states.shape[2]} channels, the model reads "
                f"{config.prefix} of {config.picture_width}: it was trained with another encoder"
            )
        return states

    def vectors(self, texts: Sequence[str]) -> Float[Tensor, "n channels"]:
        """Pooled features of texts.

        Raises:
            ValueError: they are not of the width that the model reads.
        """
        found = self.text_encoder.encode(list(texts)).vectors()
        if found.shape[1] != self.config.text_width:
            raise ValueError(
                f"the text encoder {self.text_encoder.source} gives {found.shape[1]} channels, the model reads "
                f"{self.config.text_width}: it was trained with another encoder"
            )
        return found

    def save_encoder(self, folder: str | Path) -> TextEncoderConfig | None:
        """Copy a small text encoder into a folder; returns what names it from there."""
        return None if self.config.text is None else self.text_encoder.save(folder)
