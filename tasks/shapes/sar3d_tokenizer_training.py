"""Training SAR3D's tokenizer on views: what rays see must be what other cameras saw.

Chen et al. 2024 (arXiv 2411.16856, section 3.2); official code cyw-3d/SAR3D, ``nsr/train_nv_util.py`` and
``nsr/losses/builder.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Batch, Metrics, TrainingTask
from nextscale.tasks.shapes.sar3d_planes import PLANES
from nextscale.tasks.shapes.sar3d_rendering import Noise, camera_rays, pluecker
from nextscale.tasks.shapes.sar3d_tokenizer import TriplaneVQ
from nextscale.tasks.shapes.sar3d_views import encoder_input
from nextscale.tasks.tokenizers.discriminator import PatchDiscriminator
from nextscale.tasks.tokenizers.training import ReconstructionLossConfig, perceptual_loss


class CodeUsage:
    """Which codes of each scale are in use: smoothed counts, as the official tokenizer keeps them.

    The smoothing begins with plain counts and changes with a counter that advances with every scale, not with every
    step, so that the second scale of the first step is already mixed with zeros.

    Attributes:
        hits: (scales, vocabulary).
    """

    def __init__(self, schedule: ScaleSchedule, vocabulary: int) -> None:
        self.hits, self.counter = torch.zeros(len(schedule), vocabulary), 0
        self._schedule, self._objects = schedule, 0

    @torch.no_grad()
    def record(self, tokens: Sequence[Tensor]) -> None:
        """Count the tokens of each scale, over all processes."""
        self._objects = len(tokens[0])
        for scale, found in enumerate(tokens):
            counts = torch.bincount(found.flatten(), minlength=self.hits.shape[1]).float()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            kept = 0.0 if self.counter == 0 else 0.9 if self.counter < 100 else 0.99
            self.hits[scale] = self.hits[scale] * kept + counts.cpu() * (1 - kept)
            self.counter += 1

    def shares(self) -> list[float]:
        """Percent of codes used more than a hundredth as often as all were used alike, of each scale."""
        cells = [self._objects * PLANES * scale.height * scale.width for scale in self._schedule.scales]
        margins = [count / self.hits.shape[1] * 0.01 for count in cells]
        rows = zip(self.hits, margins, strict=True)
        return [float((row > margin).float().mean() * 100) for row, margin in rows]

    def state_dict(self) -> dict[str, Any]:
        return {"hits": self.hits, "counter": self.counter}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.hits, self.counter = state["hits"].clone(), int(state["counter"])


@dataclass(frozen=True)
class TriplaneLossConfig:
    """Weights of the terms; the defaults are the official script's.

    Attributes:
        colour: of mean |x - y|, pictures in [-1, 1].
        perceptual: LPIPS where ``lpips_weights`` and ``vgg_weights`` name files, else the stated substitute of
            :func:`nextscale.tasks.tokenizers.training.structural_loss`; on the middle of the patch, a pixel less on
            every side; from step ``perceptual_start`` on.
        depth: of the depth, whatever its scale and shift; nothing where it is above ``depth_limit``.
        mask: of mean |alpha - sum of weights|.
        quantizer: of the codebook and commitment terms.
        adversarial: of the hinge term of a patch discriminator for the tokenizer, in units of the discriminator's own
            weight, which is the same number; 0: no discriminator.
        pictures: of each object that are looked at in a step, drawn anew; None: all.
        patch: side in pixels of the window that is rendered of each picture.
        foreground: share of windows that touch the object.
    """

    colour: float = 1.0
    perceptual: float = 0.8
    perceptual_start: int = 100
    vgg_weights: str | None = None
    lpips_weights: str | None = None
    depth: float = 0.5
    depth_limit: float = 0.2
    mask: float = 1.0
    quantizer: float = 1.0
    adversarial: float = 0.025
    adversarial_start: int = 0
    discriminator_channels: int = 64
    discriminator_levels: int = 3
    pictures: int | None = None
    patch: int = 130
    foreground: float = 0.875


def aligned_depth_loss(
    prediction: Float[Tensor, "n height width"],
    target: Float[Tensor, "n height width"],
    mask: Bool[Tensor, "n height width"],
    gradients: float = 0.5,
    levels: int = 4,
) -> Float[Tensor, ""]:
    """Squared error after the scale and shift of each picture that fit best, plus that of gradients at several sizes.

    Ranftl et al. 2022 (MiDaS, arXiv 1907.01341, equations 4 and 11), over the pixels in ``mask``.
    """
    weight = mask.to(prediction.dtype)
    sums = [(weight * part).sum((1, 2)) for part in (prediction.square(), prediction, torch.ones_like(prediction))]
    targets = [(weight * part).sum((1, 2)) for part in (prediction * target, target)]
    determinant = sums[0] * sums[2] - sums[1].square()
    solved = determinant.abs() > 1e-12
    safe = torch.where(solved, determinant, 1.0)
    scale = torch.where(solved, (sums[2] * targets[0] - sums[1] * targets[1]) / safe, 0.0)
    shift = torch.where(solved, (sums[0] * targets[1] - sums[1] * targets[0]) / safe, 0.0)
    error = (scale[:, None, None] * prediction + shift[:, None, None] - target) * weight
    loss = error.square().sum() / (2 * weight.sum()).clamp_min(1)
    for level in range(levels):
        step = 2**level
        part, seen = error[:, ::step, ::step], weight[:, ::step, ::step]
        across = part.diff(dim=2).abs() * seen[:, :, 1:] * seen[:, :, :-1]
        down = part.diff(dim=1).abs() * seen[:, 1:] * seen[:, :-1]
        loss = loss + gradients * (across.sum() + down.sum()) / seen.sum().clamp_min(1)
    return loss


def views_of(batch: Batch, tokenizer: TriplaneVQ) -> Float[Tensor, "objects views 10 height width"]:
    """What the encoder reads of a batch: ``views``, or made of the first pictures of every object."""
    if "views" in batch:
        given: Tensor = batch["views"]
        return given
    count, size = tokenizer.config.views.count, tokenizer.image_size[0]
    if batch["colours"].shape[1] < count:
        raise ValueError(f"an object has {batch['colours'].shape[1]} pictures, the tokenizer reads {count}")
    colours, depth, cameras = (batch[name][:, :count].flatten(0, 1) for name in ("colours", "depth", "cameras"))
    if colours.shape[-1] != size:
        colours = F.interpolate(colours, size=size, mode="bilinear", antialias=True)
        depth = F.interpolate(depth, size=size, mode="nearest-exact")
    return encoder_input(colours, pluecker(cameras, size), depth).unflatten(0, (-1, count))


@dataclass(frozen=True, eq=False)
class Window:
    """Where pictures are compared: rays through a window of every picture, and what was seen there.

    Attributes:
        origins, directions: (objects, pictures x pixels, 3).
        colours: in [-1, 1], (objects x pictures, 3, side, side); ``depth`` and ``alpha`` of one channel.
    """

    origins: Tensor
    directions: Tensor
    colours: Tensor
    depth: Tensor
    alpha: Tensor

    @property
    def side(self) -> int:
        return int(self.colours.shape[-1])

    def pictures(self, values: Float[Tensor, "objects rays channels"]) -> Float[Tensor, "n channels side side"]:
        """What rays saw, as pictures."""
        return values.reshape(-1, self.side, self.side, values.shape[-1]).permute(0, 3, 1, 2)


def some_pictures(batch: Batch, count: int | None) -> Batch:
    """A batch with so many pictures of every object, drawn at random; None: all."""
    total = batch["colours"].shape[1]
    if count is None or count >= total:
        return batch
    chosen = torch.randperm(total)[:count].to(batch["colours"].device)
    return {**batch, **{name: batch[name][:, chosen] for name in ("colours", "depth", "alpha", "cameras")}}


def cut_window(batch: Batch, patch: int, foreground: float) -> Window:
    """A random window of every picture; most touch what is not background."""
    objects, count, _, size, _ = batch["colours"].shape
    side = min(patch, size)
    alpha = batch["alpha"].flatten(0, 1)
    corners = [_corner(each[0] > 0.5, side, foreground) for each in alpha]
    origins, directions = camera_rays(batch["cameras"].flatten(0, 1), size)

    def cut(values: Tensor) -> Tensor:
        rows = zip(values, corners, strict=True)
        return torch.stack([value[:, top : top + side, left : left + side] for value, (top, left) in rows])

    def flat(rays: Tensor) -> Tensor:
        pixels = cut(rays.mT.unflatten(2, (size, size))).flatten(2).mT
        return pixels.unflatten(0, (objects, count)).flatten(1, 2)

    colours = cut(batch["colours"].flatten(0, 1)) * 2 - 1
    return Window(flat(origins), flat(directions), colours, cut(batch["depth"].flatten(0, 1)), cut(alpha))


def _corner(seen: Bool[Tensor, "height width"], side: int, foreground: float) -> tuple[int, int]:
    """Top and left of a window."""
    room = seen.shape[-1] - side
    places = []
    for dim in (1, 0):
        used = seen.any(dim).nonzero()[:, 0]
        low, high = 0, room
        if len(used) and torch.rand(()) < foreground:
            low, high = max(int(used[0]) - side // 2, 0), min(int(used[-1]) - side // 2, room)
        low = min(low, room)
        places.append(int(torch.randint(low, max(high, low) + 1, ())))
    return places[0], places[1]


class TriplaneTraining(TrainingTask):
    """Trains a :class:`nextscale.tasks.shapes.sar3d_tokenizer.TriplaneVQ` of density fields.

    A batch holds what is to be seen: ``cameras`` (objects, n, 25), ``colours`` (objects, n, 3, size, size) in [0, 1] on
    white, and of one channel ``depth`` and ``alpha``; and, where the first pictures are not what the encoder reads,
    ``views`` (objects, views, 10, height, width).
    """

    name = "sar3d-tokenizer"

    def __init__(self, tokenizer: TriplaneVQ, config: TriplaneLossConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        tokenizer.density()
        self.phases: dict[str, nn.Module] = {"tokenizer": tokenizer}
        self.discriminator = None
        if config.adversarial:
            self.discriminator = PatchDiscriminator(config.discriminator_channels, config.discriminator_levels)
            if config.patch < self.discriminator.smallest_side:
                raise ValueError(
                    f"windows of {config.patch} pixels are too small for the discriminator, which needs "
                    f"{self.discriminator.smallest_side}: enlarge patch or set adversarial to 0"
                )
            self.phases["discriminator"] = self.discriminator
        self._perceptual = perceptual_loss(
            ReconstructionLossConfig(vgg_weights=config.vgg_weights, lpips_weights=config.lpips_weights)
        )
        self.usage = CodeUsage(tokenizer.config.schedule, tokenizer.config.quantizer.vocabulary)

    def active(self, phase: str, step: int) -> bool:
        return phase == "tokenizer" or step >= self.config.adversarial_start

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        if phase == "discriminator":
            real, fake = module(torch.cat((batch["real"], batch["fake"]))).chunk(2)
            loss = self.config.adversarial * (F.relu(1 - real) + F.relu(1 + fake)).mean() / 2
            return loss, {"real": real.detach().mean(), "fake": fake.detach().mean()}
        planes, quantized = module(views_of(batch, self.tokenizer).flatten(0, 1))
        if self.tokenizer.training:
            self.usage.record(quantized.tokens)
        window = cut_window(some_pictures(batch, self.config.pictures), self.config.patch, self.config.foreground)
        with torch.autocast(planes.device.type, enabled=False):
            noise = Noise.drawn(self.tokenizer.config.render, window.directions.shape[:2], planes.device)
            seen = self.tokenizer.see(planes.float(), window.origins, window.directions, noise)
            pictures = window.pictures(seen.colour)
            loss, metrics = self.compare(
                pictures, window.pictures(seen.depth), window.pictures(seen.mask), window, step
            )
        loss = loss + self.config.quantizer * quantized.loss
        metrics |= {"quantizer": quantized.loss.detach()}
        if self.discriminator is not None and self.active("discriminator", step):
            self.discriminator.requires_grad_(False)
            adversarial = -self.discriminator(pictures).mean()
            self.discriminator.requires_grad_(True)
            loss = loss + self.config.adversarial**2 * adversarial
            metrics |= {"adversarial": adversarial.detach()}
        batch["real"], batch["fake"] = window.colours, pictures.detach()  # for the discriminator's turn
        return loss, metrics

    def compare(
        self, pictures: Tensor, depth: Tensor, mask: Tensor, window: Window, step: int
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """The terms that compare what rays see with what cameras saw."""
        config = self.config
        colour, outline = F.l1_loss(pictures, window.colours), F.l1_loss(mask, window.alpha)
        loss = config.colour * colour + config.mask * outline
        squared = F.mse_loss(pictures.detach(), window.colours)
        metrics: Metrics = {
            "colour": colour.detach(),
            "mask": outline.detach(),
            "psnr": (10 * torch.log10(4 / squared.clamp_min(1e-10))).detach(),
        }
        if config.depth:
            inside = (window.alpha > 0.5) & (window.depth > 0)
            aligned = aligned_depth_loss(depth[:, 0], window.depth[:, 0], inside[:, 0])
            loss = loss + config.depth * torch.where(aligned > config.depth_limit, aligned * 0, aligned)
            metrics |= {"depth": aligned.detach()}
        if config.perceptual and step >= config.perceptual_start:
            inner = slice(1, -1) if window.side > 8 else slice(None)
            perceived = self._perceptual(pictures[..., inner, inner], window.colours[..., inner, inner])
            loss = loss + config.perceptual * perceived
            metrics |= {"perceptual": perceived.detach()}
        return loss, metrics

    def after_step(self, step: int) -> Metrics:
        if step % 10:
            return {}
        return {f"usage/scale{scale}": share / 100 for scale, share in enumerate(self.usage.shares())}

    def state_dict(self) -> dict[str, Any]:
        return self.usage.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.usage.load_state_dict(state)
