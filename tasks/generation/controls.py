"""Control pictures from photographs: canny, soft edges, sketches, depth and surface normals.

What CAR's and ControlVAR's adapters follow. Canny is drawn as officially, pixel for pixel. The other kinds come from
learned detectors officially; here a detector is given by the caller (any function, one of this library's depth models,
or a depth model of transformers), and for soft edges and sketches there is one without weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nextscale.tasks.generation.controls_canny import canny
from nextscale.tasks.generation.controls_edges import gradient_edges, sketch
from nextscale.tasks.generation.controls_geometry import depth_picture, nearness, normal_picture
from nextscale.tasks.generation.controls_resize import resize_for_detector, squash

Kind = Literal["canny", "hed", "depth", "normal", "sketch"]
KINDS: tuple[str, ...] = get_args(Kind)

Detector = Callable[[Tensor], Tensor]
"""(3, height, width) in [0, 1] -> soft edges (height, width) in [0, 1], or normals (3, height, width) in [-1, 1]."""


@dataclass(frozen=True)
class Extraction:
    """How a control picture is made; the defaults are the official ones.

    Attributes:
        kind: canny, hed (soft edges), depth (inverse, near is bright), normal, or sketch.
        low, high: canny's thresholds.
        resolution: short side at which a detector looks; None: the official 384 for depth and 512 for the others.
        nms_threshold, nms_sigma: thinning of a sketch's soft edges, in levels of 255 and pixels.
        sketch_sigma, sketch_threshold: of the strokes drawn from the thin lines.
    """

    kind: Kind = "canny"
    low: int = 100
    high: int = 200
    resolution: int | None = None
    nms_threshold: int = 127
    nms_sigma: float = 3.0
    sketch_sigma: float = 3.0
    sketch_threshold: int = 4

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"there is no control {self.kind!r}; known are {', '.join(KINDS)}")
        if self.resolution is not None and self.resolution < 64:
            raise ValueError(f"resolution is {self.resolution}; a detector needs at least 64 pixels")


def extract(
    image: Float[Tensor, "3 height width"],
    kind: str | Extraction = "canny",
    *,
    size: tuple[int, int] | None = None,
    detector: Detector | None = None,
    depth: Any = None,
) -> Float[Tensor, "3 height width"]:
    """A control picture in [0, 1].

    Args:
        image: a photograph in [0, 1]; it is rounded to 8 bits.
        kind: a name from :data:`KINDS`, or how in detail.
        size: (height, width) the photograph is squashed to first, by Pillow's bicubic filter: officially the model's
            image size; None: as it is.
        detector: of soft edges (hed, sketch; None: the gradient's size, which needs no weights) or of normals.
        depth: for depth and normal: see :func:`nextscale.tasks.generation.controls_geometry.nearness`.

    Raises:
        ValueError: the image has another shape, the kind is unknown, or it needs a model that is not given.
    """
    how = kind if isinstance(kind, Extraction) else Extraction(kind)  # type: ignore[arg-type]
    pixels = to_pixels(image)
    if size is not None and size != pixels.shape[:2]:
        pixels = squash(pixels, size)
    if how.kind == "canny":
        return _lines(canny(pixels, how.low, how.high))
    looks = resize_for_detector(pixels, how.resolution or (384 if how.kind == "depth" else 512))
    seen = torch.from_numpy(looks).permute(2, 0, 1).float() / 255
    if how.kind == "depth":
        picture = depth_picture(nearness(seen, depth))
    elif how.kind == "normal":
        picture = (detector(seen) + 1) / 2 if detector is not None else normal_picture(seen, depth)
    else:
        soft = ((detector or gradient_edges)(seen).clamp(0, 1) * 255).byte().cpu().numpy()
        if how.kind == "sketch":
            soft = 255 * sketch(soft, how.nms_threshold, how.nms_sigma, how.sketch_sigma, how.sketch_threshold).astype(
                np.uint8
            )
        picture = torch.from_numpy(soft).float()[None].expand(3, -1, -1) / 255
    # Officially cut to whole levels; the small number keeps those that are whole already.
    picture = (picture.cpu().float().clamp(0, 1) * 255 + 1e-3).floor() / 255
    return F.interpolate(picture[None], size=pixels.shape[:2], mode="bilinear")[0]


def extract_batch(
    images: Float[Tensor, "batch 3 height width"], how: Extraction, **models: Any
) -> Float[Tensor, "batch 3 height width"]:
    """The same of many photographs of one size; canny edges of all at once.

    Args:
        models: ``detector`` and ``depth``, as for :func:`extract`.
    """
    if how.kind == "canny":
        pixels = _rounded(images).permute(0, 2, 3, 1).cpu().numpy()
        edges = torch.from_numpy(canny(pixels, how.low, how.high))
        return edges[:, None].float().expand(-1, 3, -1, -1).contiguous()
    return torch.stack([extract(image, how, **models) for image in images])


def edges_of(image: Float[Tensor, "3 height width"], low: int = 100, high: int = 200) -> np.ndarray:
    """Canny edges of a picture in [0, 1] as truth values (height, width), to compare."""
    return canny(to_pixels(image), low, high)


def to_pixels(image: Float[Tensor, "3 height width"]) -> np.ndarray:
    """uint8 (height, width, 3) of a picture in [0, 1].

    Raises:
        ValueError: it has another shape.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"the image is {tuple(image.shape)}, expected (3, height, width) in [0, 1]")
    return np.ascontiguousarray(_rounded(image).permute(1, 2, 0).cpu().numpy())


def _rounded(images: Tensor) -> Tensor:
    return (images.float() * 255).round().clamp(0, 255).byte()


def _lines(edges: np.ndarray) -> Tensor:
    return torch.from_numpy(edges).float().expand(3, -1, -1).contiguous()
