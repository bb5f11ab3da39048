"""DepthART's training target: metric depth brought to the range that an image tokenizer takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nextscale.datasets.depth_planar import fill_holes


@dataclass(frozen=True)
class DepthNormalizer:
    """alpha x + beta, where x is the depth of each image divided by a high quantile of its own.

    The defaults are DepthART's (its NormalizerUTSQuant): 0 m becomes -1, the quantile 1.

    Attributes:
        quantile: share of the pixels that lie below the depth which becomes x = 1, by linear interpolation.
        kind: ``"scale"``: x = d / q, right up to a factor; ``"range"``: x = (d - q0) / (q - q0), where q0 is the
            quantile ``1 - quantile``, right up to a factor and an offset (NormalizerUTSSQuant).
        affine: whether alpha and beta apply.
        eps: added to what is divided by, in metres.
    """

    quantile: float = 0.98
    kind: Literal["scale", "range"] = "scale"
    affine: bool = True
    alpha: float = 2.0
    beta: float = -1.0
    eps: float = 1e-7

    def __post_init__(self) -> None:
        if not 0.5 < self.quantile <= 1:
            raise ValueError(f"quantile is {self.quantile}; expected a share above 0.5 and up to 1")
        if self.kind not in ("scale", "range"):
            raise ValueError(f"kind is {self.kind!r}; expected scale or range")
        if self.alpha <= 0:
            raise ValueError(f"alpha is {self.alpha}; expected more than 0")

    def normalize(
        self,
        depth: Float[Tensor, "n 1 height width"],
        valid: Bool[Tensor, "n 1 height width"] | None = None,
        outside: Literal["scaled", "kept"] = "scaled",
    ) -> Float[Tensor, "n 1 height width"]:
        """Normalised depth, not clipped.

        Args:
            depth: in metres.
            valid: pixels that decide the quantile; all, unless given.
            outside: what becomes of the others: x without alpha and beta, as officially in training, or the depth as it
                was, as in evaluation.

        Raises:
            ValueError: an image has no valid pixel.
        """
        if valid is None:
            valid = torch.ones_like(depth, dtype=torch.bool)
        if not bool(valid.flatten(1).any(1).all()):
            raise ValueError("an image has no pixel of known depth, so nothing can be learnt from it: leave it out")
        found = [self._range(one[known]) for one, known in zip(depth, valid, strict=True)]
        low, span = (torch.stack(part).view(-1, 1, 1, 1) for part in zip(*found, strict=True))
        x = (depth - low) / (span + self.eps)
        inside = self.alpha * x + self.beta if self.affine else x
        return torch.where(valid, inside, x if outside == "scaled" else depth)

    def _range(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """What becomes 0, and how far above it 1 lies."""
        high = torch.quantile(values, self.quantile)
        if self.kind == "scale":
            return torch.zeros_like(high), high
        low = torch.quantile(values, 1 - self.quantile)
        return low, high - low

    def target(
        self, depth: Float[Tensor, "n 1 height width"], valid: Bool[Tensor, "n 1 height width"] | None = None
    ) -> Float[Tensor, "n 1 height width"]:
        """What a model is trained on: in [-1, 1], pixels of unknown depth filled from their nearest neighbours."""
        if valid is not None and not bool(valid.all()):
            depth = fill(depth, valid)
        return self.normalize(depth).clamp(-1, 1)


def fill(
    depth: Float[Tensor, "n 1 height width"], valid: Bool[Tensor, "n 1 height width"]
) -> Float[Tensor, "n 1 height width"]:
    """Depth in which unknown pixels have the value of the nearest known one.

    Raises:
        ValueError: an image has no known pixel.
    """
    filled = depth.detach().cpu().numpy().copy()
    for image, known in zip(filled[:, 0], valid[:, 0].cpu().numpy(), strict=True):
        if not known.any():
            raise ValueError("an image has no pixel of known depth, so nothing can be learnt from it: leave it out")
        if not known.all():
            image[...] = fill_holes(image, ~known)
    return torch.from_numpy(filled).to(depth)
