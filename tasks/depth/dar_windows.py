"""Wide images in two windows, as DAR sees KITTI's."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def cut_windows(
    images: Float[Tensor, "batch channels height width"], window: int | None
) -> Float[Tensor, "views channels height columns"]:
    """The left windows of all images, then the right ones; the images themselves where they are no wider."""
    if window is None or images.shape[-1] <= window:
        return images
    return torch.cat((images[..., :window], images[..., -window:]))


def join_windows(maps: Float[Tensor, "views 1 height columns"], width: int) -> Float[Tensor, "batch 1 height width"]:
    """Maps of :func:`cut_windows`' views as maps of the images: where both windows see, one fades into the other.

    Raises:
        ValueError: the windows leave a gap between them.
    """
    window = maps.shape[-1]
    if window == width:
        return maps
    shared = 2 * window - width
    if shared < 0:
        raise ValueError(f"two windows of {window} columns leave {-shared} of {width} columns unseen")
    left, right = maps.chunk(2)
    fade = torch.linspace(1, 0, shared, device=maps.device, dtype=maps.dtype)
    middle = left[..., window - shared :] * fade + right[..., :shared] * fade.flip(0)
    return torch.cat((left[..., : window - shared], middle, right[..., shared:]), dim=-1)
