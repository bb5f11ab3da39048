"""Single pictures: from tensors in [0, 1] to bytes, and to PNG files."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from PIL import Image

from nextscale.pictures.files import first_free_number, write_file

if TYPE_CHECKING:
    from torch import Tensor

    Picture = Tensor | np.ndarray | Image.Image
else:
    Picture = Any

Quantise = Literal["round", "truncate"]

_SLACK = 1e-3
"""How far a value may lie outside [0, 1] (rounding in a decoder) and be clamped without complaint."""


def to_pil(picture: Picture, quantise: Quantise = "round") -> Image.Image:
    """A picture as a PIL image, RGB or grey.

    picture: floats (3, H, W), (1, H, W) or (H, W) in [0, 1], as a tensor or an array; bytes (uint8) of these
    shapes, taken as they are; or a PIL image. quantise: "round" takes x to floor(255 x + 1/2), the nearest
    byte, halves upwards; "truncate" to floor(255 x), as VAR's published demo does, which makes pictures half
    a level darker on average. Raises ValueError for another shape, and for values that are not finite or lie
    outside [0, 1] by more than 0.001.
    """
    if quantise not in get_args(Quantise):
        raise ValueError(f"quantise is {quantise!r}; expected 'round' or 'truncate'")
    if isinstance(picture, Image.Image):
        return picture if picture.mode in ("RGB", "L") else picture.convert("RGB")
    values = _to_array(picture)
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or values.shape[0] not in (1, 3) or 0 in values.shape:
        raise ValueError(
            f"picture has shape {values.shape}; expected (3, height, width), (1, height, width) or (height, width)"
        )
    if values.dtype != np.uint8:
        values = _to_bytes(values, quantise)
    return Image.fromarray(values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0)))


def _to_array(picture: Any) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        return picture
    import torch

    if not isinstance(picture, torch.Tensor):
        raise ValueError(f"picture is a {type(picture).__name__}; expected a tensor, an array or a PIL image")
    picture = picture.detach().cpu()
    # numpy knows no bfloat16.
    return (picture.float() if picture.is_floating_point() else picture).numpy()


def _to_bytes(values: np.ndarray, quantise: Quantise) -> np.ndarray:
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"picture holds {values.dtype}; expected floats in [0, 1], or uint8")
    low, high = float(values.min()), float(values.max())
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # Also true for NaN.
        raise ValueError(
            f"picture has values from {low:.3g} to {high:.3g}; expected [0, 1] (map [-1, 1] by (x + 1) / 2)"
        )
    scaled = values.astype(np.float32).clip(0, 1) * np.float32(255)
    return np.floor(scaled + np.float32(0.5) if quantise == "round" else scaled).astype(np.uint8)


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file's content."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=image.width * image.height < 1 << 20)
    return buffer.getvalue()


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    """Every pixel as a square of `scale` x `scale` pixels: tiny pictures can then be looked at unblurred."""
    if scale < 1:
        raise ValueError(f"scale is {scale}; expected a whole number from 1 on")
    if scale == 1:
        return image
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def save_png(
    picture: Picture, path: str | os.PathLike[str], *, quantise: Quantise = "round", overwrite: bool = False
) -> Path:
    """Write one picture (see `to_pil`) as PNG; returns the path, numbered if the name was taken (see
    `write_file`).
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG; name the file so")
    return write_file(path, png_bytes(to_pil(picture, quantise)), overwrite=overwrite)


def save_pngs(
    pictures: Iterable[Picture],
    folder: str | os.PathLike[str],
    *,
    stem: str = "image",
    quantise: Quantise = "round",
    overwrite: bool = False,
) -> list[Path]:
    """Write pictures, e.g. a batch (N, 3, H, W), as folder/stem-0000.png, stem-0001.png, ...; returns the
    paths.

    Without `overwrite` numbering goes on after the highest number there; with it, it starts at 0.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first = 0 if overwrite else first_free_number(folder, stem, ".png")
    return [
        save_png(picture, folder / f"{stem}-{number:04d}.png", quantise=quantise, overwrite=overwrite)
        for number, picture in enumerate(pictures, first)
    ]
