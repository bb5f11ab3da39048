"""What every depth model offers: a photo of any size and shape in, its depth at the photo's own size out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.checkpoint import read_folder, read_tensors
from nextscale.core.random import BatchDraws, Draws, ImageDraws, image_seeds

Unit = Literal["metre", "relative"]
"""Metres; or values that are right up to a factor (and perhaps an offset) of each photo's own. Both grow with the
distance along the camera's axis."""


@dataclass(frozen=True)
class DepthMap:
    """Attributes:

    depth: distance along the camera's axis, float32 on the CPU: ``(height, width)`` of one photo, ``(n, height,
        width)`` of several.
    unit: ``"metre"``; or ``"relative"``: in [0, 1], right up to a factor (and perhaps an offset) of each photo's own.
    """

    depth: Float[Tensor, "*photos height width"]
    unit: Unit

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"the unit of a depth map is {self.unit!r}; expected one of {', '.join(get_args(Unit))}")

    def __len__(self) -> int:
        """Photos, where there is an axis of them."""
        if self.depth.ndim == 2:
            raise TypeError("this is the depth map of one photo, which has no length")
        return len(self.depth)

    def __getitem__(self, index: int) -> DepthMap:
        """The map of one of several photos."""
        if self.depth.ndim == 2:
            raise TypeError("this is the depth map of one photo, which cannot be indexed: take its .depth")
        return replace(self, depth=self.depth[index])


class DepthModel(nn.Module, ABC):
    """A model that predicts depth.

    A system defines :meth:`infer`, which sees photos at the network's size, and where its authors resize otherwise
    :meth:`network_size`, :meth:`enter` and :meth:`leave`. Its constructor sets ``config`` and ``tokenizer``.

    Attributes:
        unit: of what it predicts.
        options: names of what :meth:`infer` takes beside, and :meth:`predict` hands on.
    """

    system: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    unit: Unit

    config: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that floating-point inputs meet."""
        return next(self.parameters()).dtype

    @property
    def published_samples(self) -> int:
        """How many samples its authors average."""
        return 1

    # --- prediction --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(
        self,
        image: Float[Tensor, "*photos 3 height width"],
        n: int | None = None,
        seed: int | Sequence[int] = 0,
        *,
        flip: bool = False,
        batch_size: int = 1,
        official_draws: bool = False,
        progress: Callable[[int, int], None] | None = None,
        **given: Any,
    ) -> DepthMap:
        """Depth of a photo, or of several of one size, at the photos' own size.

        Args:
            image: (3, height, width) or (photos, 3, height, width) in [0, 1]; any size and shape.
            n: samples to average, as the system does it; None: as many as its authors. Models that draw nothing
                refuse more than 1.
            seed: photo i is drawn from ``seed + i``, so it comes out the same alone and in any batch; or one seed
                per photo.
            flip: average with the mirrored prediction of the mirrored photo (drawn from the same seeds).
            batch_size: photos computed at once; only memory and speed depend on it, without ``official_draws``.
            official_draws: consume one generator per batch in the official code's order, seeded with the batch's
                first seed.
            progress: called with (steps done, steps in all).
            given: the system's own :attr:`options`.

        Raises:
            ValueError: the image has another shape or range, a number is out of range, or an option is none of these.
        """
        if unknown := [name for name in given if name not in self.options]:
            known = f"it takes {', '.join(self.options)}" if self.options else "it takes none beside"
            raise ValueError(f"{type(self).__name__} takes no option {', '.join(unknown)}; {known}")
        photos = self._photos(image)
        samples = self.published_samples if n is None else n
        if samples < 1 or batch_size < 1:
            raise ValueError(f"n is {samples} and batch_size {batch_size}; both must be 1 or more")
        seeds = image_seeds(seed, len(photos))
        views = (False, True) if flip else (False,)
        report = _Progress(progress, -(-len(photos) // batch_size) * len(views))
        parts = []
        for start in range(0, len(photos), batch_size):
            batch, own = photos[start : start + batch_size], seeds[start : start + batch_size]
            depth = torch.stack(
                [self._view(batch, mirrored, samples, own, official_draws, report, given) for mirrored in views]
            ).mean(0)
            parts.append(self.leave(depth, (photos.shape[-2], photos.shape[-1])).float().cpu())
        depth = torch.cat(parts)
        return DepthMap(depth[:, 0] if image.ndim == 4 else depth[0, 0], self.unit)

    def _view(
        self,
        photos: Tensor,
        mirrored: bool,
        samples: int,
        seeds: Sequence[int],
        official: bool,
        report: _Progress,
        given: Mapping[str, Any],
    ) -> Tensor:
        """Depth at the network's size, seen directly or in a mirror."""
        images = self.enter(photos.to(self.device))
        depth = self.infer(
            images.flip(-1) if mirrored else images, samples, self.draws(seeds, official), report, **given
        )
        report.next_pass()
        return depth.flip(-1) if mirrored else depth

    def _photos(self, image: Tensor) -> Float[Tensor, "photos 3 height width"]:
        if image.ndim not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape:
            raise ValueError(
                f"the image has shape {tuple(image.shape)}; expected (3, height, width) or (photos, 3, height, width)"
            )
        if not image.is_floating_point():
            raise ValueError(f"the image is {image.dtype}; expected floats in [0, 1]: divide 8-bit values by 255")
        low, high = image.aminmax()
        if not (low >= 0 and high <= 1):  # NaN too
            raise ValueError(f"the image goes from {low:g} to {high:g}; expected values in [0, 1]")
        return image if image.ndim == 4 else image[None]

    def draws(self, seeds: Sequence[int], official: bool = False) -> Draws:
        """Randomness for a batch: a generator per photo, or one on the model's device in the official order."""
        if official:
            return BatchDraws(torch.Generator(self.device).manual_seed(seeds[0]))
        return ImageDraws(seeds)

    # --- what a system says ------------------------------------------------------------------------------

    @abstractmethod
    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in which the network sees a photo of this size."""

    def enter(self, photos: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 3 tall wide"]:
        """Photos at the network's size: bicubic, antialiased, without regard to their shape."""
        size = self.network_size(photos.shape[-2], photos.shape[-1])
        return resize(photos, size).clamp(0, 1)

    def leave(self, depth: Float[Tensor, "n 1 tall wide"], size: tuple[int, int]) -> Float[Tensor, "n 1 height width"]:
        """Depth at the photos' size: bilinear between the corners."""
        return F.interpolate(depth.float(), size=size, mode="bilinear", align_corners=True)

    @abstractmethod
    def infer(
        self,
        images: Float[Tensor, "n 3 tall wide"],
        samples: int,
        draws: Draws,
        report: Callable[[int, int], None],
    ) -> Float[Tensor, "n 1 tall wide"]:
        """Depth at the network's size.

        Args:
            images: in [0, 1], at :meth:`network_size`, on the model's device.
            samples: how many to average.
            draws: the photos' randomness.
            report: to be called with (steps done, steps in all).
        """

    @abstractmethod
    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        """The training loss of a batch, and what to log.

        Args:
            batch: ``image`` (n, 3, height, width) in [-1, 1], ``depth`` (n, 1, height, width) in metres, ``valid``
                bool of the same shape: where the depth is known.
        """

    # --- files -------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """The models a file may hold, by what they are; each has ``config``, ``official_name``, ``to_official``."""

    @property
    @abstractmethod
    def official_name(self) -> str:
        """The file name that the official repository gives such a model."""

    @abstractmethod
    def to_official(self) -> dict[str, Tensor]:
        """The official state dict."""

    @abstractmethod
    def save(self, folder: str | Path) -> Path:
        """Write ``model.safetensors`` and ``config.json``; :meth:`load` reads them back."""

    @classmethod
    @abstractmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """From the content of a folder written by :meth:`save`."""

    @classmethod
    @abstractmethod
    def from_official(cls, content: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from an official file's content; sizes are read from its keys and shapes."""

    @classmethod
    def load(cls, source: str | Path, **overrides: Any) -> Self:
        """From a folder written by :meth:`save`, or from an official file.

        Args:
            overrides: as for :meth:`from_official`; for official files only.
        """
        if not Path(source).is_dir():
            return cls.from_official(read_tensors(source), **overrides)
        return cls.from_saved(*read_folder(source))


def resize(images: Float[Tensor, "n 3 height width"], size: tuple[int, int]) -> Float[Tensor, "n 3 tall wide"]:
    """Bicubic, antialiased where it makes smaller, as Pillow's; images of the size already are returned as they are."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)


class _Progress:
    """Several passes of one network, told as one."""

    def __init__(self, report: Callable[[int, int], None] | None, passes: int) -> None:
        self._report, self._passes, self._finished = report, passes, 0

    def __call__(self, done: int, total: int) -> None:
        if self._report is not None:
            self._report(self._finished * total + done, self._passes * total)

    def next_pass(self) -> None:
        self._finished += 1
