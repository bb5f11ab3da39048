"""What SAR3D is conditioned on: pictures through DINOv2, texts through CLIP, and nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nextscale.core.cross_attention import Packed
from nextscale.tasks.generation.text import TextEncoder, TextEncoderConfig, TextFeatures
from nextscale.tasks.shapes.pictures import ImageEncoder, ImageEncoderConfig, is_picture, pixels

NULL_FILES = {
    "image": ("empty_dino_embedding.npy", "empty_dino_pooler_output.npy"),
    "text": ("empty_text_embedding.npy", "empty_text_pooler_output.npy"),
}
"""In which the official repository holds the features of no condition; the class token of pictures is left out."""
_STATES, _POOLED = "null_states", "null_pooled"


class Conditions:
    """Encoders of one kind of condition, loaded when they are needed.

    Attributes:
        home: a folder in which encoders and the features of no condition may lie.
    """

    def __init__(self, kind: Literal["image", "text"], image: ImageEncoderConfig, text: TextEncoderConfig) -> None:
        self.kind, self.home = kind, None
        self._image_config, self._text_config = image, text
        self._encoder: TextEncoder | ImageEncoder | None = None
        self._null: TextFeatures | None = None

    home: Path | None

    @property
    def encoder(self) -> TextEncoder | ImageEncoder:
        """The encoder; set it to one with other options (device, a cache)."""
        if self._encoder is None:
            if self.kind == "text":
                self._encoder = TextEncoder(self._text_config, home=self.home)
            else:
                self._encoder = ImageEncoder(self._image_config, home=self.home)
        return self._encoder

    @encoder.setter
    def encoder(self, encoder: TextEncoder | ImageEncoder) -> None:
        self._encoder = encoder

    def encode(self, condition: Any, width: int) -> TextFeatures:
        """Features of one or several pictures or texts.

        Raises:
            ValueError: they are not of this kind, or the encoder's features are of another width.
        """
        encoder = self.encoder
        if isinstance(encoder, TextEncoder):
            found = encoder.encode([condition] if isinstance(condition, str) else list(condition))
        else:
            found = encoder.encode(self._several(condition))
        if found.pooled is None or found.states.values.shape[-1] != width:
            lacks = "" if found.pooled is not None else " and nothing pooled"
            raise ValueError(
                f"the encoder {encoder.source} gives {found.states.values.shape[-1]} channels{lacks}, the model reads "
                f"{width} and pooled ones: it was trained with another encoder"
            )
        return found

    def pictures(self, condition: Any, size: int) -> Float[Tensor, "n 3 size size"]:
        """Squares in [0, 1] of one or several pictures; squares of pixels are taken as they are."""
        if isinstance(condition, Tensor) and condition.ndim == 4:
            return condition
        return pixels(self._several(condition), size)

    def _several(self, condition: Any) -> Sequence[Any]:
        pictures = [condition] if is_picture(condition) else list(condition)
        known = (Image.Image, np.ndarray, Tensor, str, Path)
        if wrong := [picture for picture in pictures if not isinstance(picture, known)]:
            raise ValueError(f"a picture is {wrong[0]!r}; expected its path, a PIL image or pixels")
        return pictures

    # --- no condition ------------------------------------------------------------------------------------

    def null(self) -> TextFeatures:
        """The features of no condition: those the model was saved with, the official files' beside it, or else what the
        encoder makes of an empty text or of a white picture."""
        if self._null is None:
            self._null = self._read_null() or self._compute_null()
        return self._null

    def set_null(self, states: Float[Tensor, "length width"], pooled: Float[Tensor, " width"]) -> None:
        """Give the features of no condition."""
        self._null = TextFeatures(Packed(states, (len(states),)), pooled[None])

    def null_tensors(self) -> dict[str, Tensor]:
        """To be saved, where they are known."""
        if self._null is None or self._null.pooled is None:
            return {}
        return {_STATES: self._null.states.values, _POOLED: self._null.pooled[0]}

    def take_null(self, state: dict[str, Tensor]) -> None:
        """Take what :meth:`null_tensors` gave out of a state dict."""
        if _STATES in state:
            self.set_null(state.pop(_STATES), state.pop(_POOLED))

    def _read_null(self) -> TextFeatures | None:
        if self.home is None:
            return None
        places = [folder / name for name in NULL_FILES[self.kind] for folder in (self.home, self.home / "files")]
        found = [place for place in places if place.is_file()]
        if len(found) < 2:
            return None
        states, pooled = (torch.from_numpy(np.load(place, allow_pickle=False)).float() for place in found[:2])
        states = states[1:] if self.kind == "image" else states
        return TextFeatures(Packed(states, (len(states),)), pooled[None])

    def _compute_null(self) -> TextFeatures:
        encoder = self.encoder
        if isinstance(encoder, TextEncoder):
            return encoder.encode([""])
        return encoder.encode([Image.new("RGB", (256, 256), "white")])

    # --- files -------------------------------------------------------------------------------------------

    def save_encoder(self, folder: str | Path) -> TextEncoderConfig:
        """Copy a small text encoder into a folder; returns what names it from there."""
        encoder = self.encoder if self.kind == "text" else None
        return encoder.save(folder) if isinstance(encoder, TextEncoder) else self._text_config
