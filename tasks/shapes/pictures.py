"""What generators of shapes read of pictures: features of DINOv2 through transformers, or of a small network."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from nextscale.core.cross_attention import Packed
from nextscale.tasks.generation.text import TextFeatures, quiet

Picture = Image.Image | np.ndarray | Tensor | str | Path
"""A picture, its path, or its pixels: (height, width, 3) bytes or (3, height, width) in [0, 1]."""

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def is_picture(value: Any) -> bool:
    """Whether a value is one picture rather than several; of texts, paths only."""
    return isinstance(value, Image.Image | Path | str) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 3)


def open_picture(picture: Picture) -> Image.Image:
    """As red, green and blue, on white where it is transparent.

    Raises:
        ValueError: it is no picture.
        OSError: its file cannot be read.
    """
    if isinstance(picture, str | Path):
        try:
            with Image.open(picture) as opened:
                opened.load()
                picture = opened.copy()
        except (SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{picture} cannot be read as a picture: {error}") from error
    if isinstance(picture, Tensor):
        pixels = picture.detach().float().clamp(0, 1).cpu().movedim(0, -1).numpy()
        picture = Image.fromarray(np.round(pixels * 255).astype(np.uint8).squeeze())
    elif isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        own = picture.convert("RGBA")
        picture = Image.new("RGBA", own.size, "white")
        picture.alpha_composite(own)
    return picture.convert("RGB")


def squared(picture: Image.Image) -> Image.Image:
    """In the middle of a white square."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def pixels(pictures: Sequence[Picture], size: int, crop: int | None = None) -> Float[Tensor, "n 3 side side"]:
    """Squares in [0, 1].

    Args:
        size: side that they are resized to, bicubically.
        crop: side of the middle part that is kept; None: all.
    """
    rows = []
    for picture in pictures:
        square = squared(open_picture(picture)).resize((size, size), Image.Resampling.BICUBIC)
        if crop is not None:
            edge = (size - crop) // 2
            square = square.crop((edge, edge, edge + crop, edge + crop))
        rows.append(torch.from_numpy(np.array(square)).movedim(-1, 0).float() / 255)
    return torch.stack(rows)


# --- DINOv2 -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Attributes:

    name: a folder that transformers can read, or a name on the Hugging Face hub.
    resize, crop: sides in pixels that a square picture is resized to and of the middle part that is looked at.
    """

    name: str = "facebook/dinov2-large"
    resize: int = 256
    crop: int = 224


class ImageEncoder:
    """A vision transformer that is loaded when the first picture asks for it, and can be let go.

    Args:
        home: a folder in which the encoder may lie, under its name or the last part of it.
    """

    def __init__(
        self, config: ImageEncoderConfig, *, home: Path | None = None, device: str | torch.device | None = None
    ) -> None:
        beside = [] if home is None else [home / config.name, home / Path(config.name).name]
        self.source = next((str(place) for place in beside if place.is_dir()), config.name)
        self.config = config
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model: Any = None

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture], batch_size: int = 8) -> TextFeatures:
        """Features of every patch (the class token left out), and pooled ones; float32, on the CPU.

        Raises:
            ValueError: there is no picture, or one cannot be read.
            FileNotFoundError: the encoder is not here and cannot be fetched.
        """
        if not pictures:
            raise ValueError("there is no picture to encode; give at least one")
        model, parts = self._open(), []
        for start in range(0, len(pictures), batch_size):
            batch = pixels(pictures[start : start + batch_size], self.config.resize, self.config.crop)
            mean, deviation = (batch.new_tensor(part)[:, None, None] for part in (MEAN, DEVIATION))
            output = model(pixel_values=((batch - mean) / deviation).to(self.device))
            states = output.last_hidden_state[:, 1:].float().cpu()
            packed = Packed(states.flatten(0, 1), (states.shape[1],) * len(states))
            parts.append(TextFeatures(packed, output.pooler_output.float().cpu()))
        return TextFeatures.join(parts)

    def release(self) -> None:
        """Let the encoder go, so that its memory is free; it is loaded again when it is needed."""
        self._model = None
        gc.collect()

    def _open(self) -> Any:
        if self._model is None:
            from transformers import AutoModel

            try:
                with quiet():
                    self._model = AutoModel.from_pretrained(self.source).eval().to(self.device).requires_grad_(False)
            except OSError as error:
                raise FileNotFoundError(
                    f"the image encoder {self.source!r} cannot be opened: it is no folder with a model that "
                    "transformers reads, or it is not on this machine and the hub cannot be reached. Run `hf download "
                    f"{self.source}` where there is a network, or give a folder as image encoder"
                ) from error
        return self._model


# --- one that is trained along ------------------------------------------------------------------------


@dataclass(frozen=True)
class LearnedEncoderConfig:
    """Attributes:

    size: side of the pictures it reads, in pixels.
    channels: of the first level; each of the next has twice as many.
    levels: each halves the side; the cells of the last are the features.
    """

    size: int = 64
    channels: int = 32
    levels: int = 3

    @property
    def cells(self) -> int:
        """Features of one picture."""
        return (self.size >> self.levels) ** 2


class PictureNetwork(nn.Module):
    """A small convolutional network from pictures to features, trained along with what reads them."""

    def __init__(self, config: LearnedEncoderConfig, width: int) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = 3
        for level in range(config.levels):
            after = config.channels << level
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, width, 1))
        self.position = nn.Parameter(torch.randn(config.cells, width) * 0.02)

    def forward(self, pictures: Float[Tensor, "n 3 size size"]) -> TextFeatures:
        """Features of squares in [0, 1]; of another size, they are resized."""
        size = (self.config.size, self.config.size)
        if pictures.shape[-2:] != size:
            pictures = F.interpolate(pictures, size=size, mode="bilinear", antialias=True)
        states = self.layers(pictures.to(self.position.dtype) * 2 - 1).flatten(2).mT + self.position
        packed = Packed(states.flatten(0, 1), (states.shape[1],) * len(states))
        return TextFeatures(packed, states.mean(1))


class LearnedEncoder(PictureNetwork):
    """The same with what stands for no picture."""

    def __init__(self, config: LearnedEncoderConfig, width: int) -> None:
        super().__init__(config, width)
        self.null_states = nn.Parameter(torch.randn(config.cells, width) * 0.02)
        self.null_pooled = nn.Parameter(torch.randn(width) * 0.02)

    def null(self) -> TextFeatures:
        """What stands for no picture."""
        return TextFeatures(Packed(self.null_states, (len(self.null_states),)), self.null_pooled[None])
