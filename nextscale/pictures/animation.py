"""Animations of how a picture forms, coarse to fine."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from nextscale.pictures.files import write_file
from nextscale.pictures.still import Picture, Quantise, enlarge, to_pil


def animate(
    frames: Iterable[Picture],
    path: str | os.PathLike[str],
    seconds_per_frame: float = 0.4,
    *,
    hold: float = 2.0,
    scale: int = 1,
    quantise: Quantise = "round",
    overwrite: bool = False,
) -> Path:
    """Write frames as an endless animation in the format of the path's suffix; returns the path (see
    `write_file`).

    frames: pictures of one size (see `to_pil`), e.g. what is decoded after each scale, or a contact sheet per
    scale. The last is shown for `hold` seconds. scale: as in `contact_sheet`. Formats: .gif (256 colours per
    frame), .webp (lossless), .png and .apng (lossless, and a still of the first frame where animation is not
    understood).
    """
    path = Path(path)
    pictures = [enlarge(to_pil(frame, quantise), scale).convert("RGB") for frame in frames]
    if not pictures:
        raise ValueError("no frames were given; an animation takes at least one")
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"frames have sizes {sorted(sizes)}; expected one size (decode every scale at full size)")
    if not (seconds_per_frame > 0 and hold > 0):
        raise ValueError(f"frames of {seconds_per_frame} s, the last of {hold} s; expected more than 0")
    options: dict[str, Any]
    match path.suffix.lower():
        case ".gif":
            # A palette per frame: coarse frames have few colours, and one palette for all would band the
            # last.
            pictures = [picture.quantize(256, Image.Quantize.MEDIANCUT) for picture in pictures]
            options = {"format": "GIF", "optimize": False, "disposal": 1}
        case ".webp":
            options = {"format": "WEBP", "lossless": True, "method": 4}
        case ".png" | ".apng":
            options = {"format": "PNG"}
        case suffix:
            raise ValueError(f"{path}: suffix {suffix!r} is no animation; expected .gif, .webp, .png or .apng")
    durations = [round(seconds_per_frame * 1000)] * (len(pictures) - 1) + [round(hold * 1000)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, save_all=True, append_images=pictures[1:], duration=durations, loop=0, **options)
    return write_file(path, buffer.getvalue(), overwrite=overwrite)
