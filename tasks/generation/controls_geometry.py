"""Depth and surface normals as control pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

FARTHEST = 10.0
"""The farthest point is taken to be so many times as far as the nearest where a map tells only the order."""


def nearness(image: Float[Tensor, "3 height width"], model: Any) -> Float[Tensor, "height width"]:
    """How near each point is, on a scale of the model's own: larger is nearer.

    Args:
        image: in [0, 1].
        model: a function from (3, height, width) in [0, 1] to (height, width), larger is nearer; or a depth model of
            this library, whose ``predict`` gives distances; or the name or folder of a relative-depth model that
            transformers can load, such as Intel/dpt-hybrid-midas, the one CAR and ControlNet use.

    Raises:
        ValueError: no model is given, or its answer has another size.
        OSError: transformers does not find the model.
    """
    if model is None:
        raise ValueError(
            "depth and normals need a depth model: give depth, a function, a depth model of this library, or the name "
            "or folder of one that transformers can load, such as Intel/dpt-hybrid-midas"
        )
    if isinstance(model, str):
        model = transformers_depth(model)
    with torch.inference_mode():
        if hasattr(model, "predict"):
            predicted = model.predict(image)
            distance = torch.as_tensor(getattr(predicted, "depth", predicted)).float().squeeze()
            found = 1 / distance.clamp_min(distance[distance > 0].min() if bool((distance > 0).any()) else 1e-6)
        else:
            found = torch.as_tensor(model(image)).float().squeeze()
    if found.ndim != 2:
        raise ValueError(f"the depth model gave {tuple(found.shape)}, expected (height, width)")
    if found.shape != image.shape[-2:]:
        found = F.interpolate(found[None, None], size=image.shape[-2:], mode="bicubic")[0, 0]
    return found.cpu()


@lru_cache(maxsize=1)
def transformers_depth(name: str) -> Callable[[Tensor], Tensor]:
    """A relative-depth model of transformers as a function for :func:`nearness`."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    processor = AutoImageProcessor.from_pretrained(name)
    model = AutoModelForDepthEstimation.from_pretrained(name).eval()

    def look(image: Tensor) -> Tensor:
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        inputs = processor(images=pixels, return_tensors="pt")
        found: Tensor = model(**inputs).predicted_depth[0]
        return found

    return look


def depth_picture(near: Float[Tensor, "height width"]) -> Float[Tensor, "3 height width"]:
    """Nearness stretched to [0, 1], as grey; a map without any difference is black."""
    low, high = near.min(), near.max()
    return ((near - low) / (high - low).clamp_min(1e-12)).expand(3, -1, -1)


def normal_picture(image: Float[Tensor, "3 height width"], model: Any) -> Float[Tensor, "3 height width"]:
    """Surface normals of a depth map, in the colours of ScanNet's: red to the left, green up, blue to the viewer.

    A camera with a field of view of 53 degrees along the longer side is taken for granted; of a map that tells only
    the order, the farthest point is taken to be ten times as far as the nearest. Coarser than a detector of normals.
    """
    from kornia.geometry.depth import depth_to_normals

    near = depth_picture(nearness(image, model))[0]
    distance = 1 / (near * (1 - 1 / FARTHEST) + 1 / FARTHEST)
    height, width = distance.shape
    focal = float(max(height, width))
    camera = torch.tensor([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])
    normals = depth_to_normals(distance[None, None], camera[None], normalize_points=False)[0]
    # In the camera's frame (right, down, away); towards the viewer whatever the sign of the cross product.
    normals = normals * -torch.sign(normals[2:]).where(normals[2:] != 0, torch.ones(()))
    return (-normals + 1) / 2
