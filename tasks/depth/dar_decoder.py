"""DAR's depth decoder: from the features of an image to depths, from low to high resolution.

A transformer grows a feature map over the scales; each map becomes, through a convolutional GRU that also reads the
bins and a feature map of the image, the weights of the depth bins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.cache import GradientCache, KeyValueCache
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.depth.dar_bins import OrdinalBins, centres
from nextscale.tasks.depth.dar_necks import GROUPS
from nextscale.tasks.depth.dar_transformer import DARTransformer, DARTransformerConfig

SCHEDULE = ScaleSchedule.parse("4x5 8x10 12x15 16x20")
"""Of the published code."""


@dataclass(frozen=True)
class DARDecoderConfig:
    """Attributes:

    schedule: token grids; depths come out at twice the last.
    causal: tokens see their own scale and those before (the paper's patch-wise causal mask), so that earlier scales are
        computed once. Else all tokens see each other, and the earlier ones are computed again at every scale, as in
        the published code, which builds the mask and does not apply it.
    context_width: channels of the image's feature map that the GRU reads.
    bin_width: channels of the features that are made of the bins' centres.
    width: of the GRU's state.
    up_widths, up_kernels: of the transposed convolutions of stride 2 that enlarge a token map (kernels 2, 3 or 4).
    unread_layers: carry the layers of the published files that nothing reads.
    log_bins: the GRU is told the logarithms of the bins' centres instead of metres. Convolutions over values of up to
        80 saturate its gates, and every step of an optimiser throws them about; at 10 m that matters less.
    norm: "batch" as published. All scales share one layer's running statistics, though their tokens grow from scale to
        scale, so the finished model does not see what it saw in training; "group" is the same in both.
    """

    transformer: DARTransformerConfig = field(default_factory=DARTransformerConfig)
    bins: OrdinalBins = field(default_factory=OrdinalBins)
    schedule: ScaleSchedule = SCHEDULE
    causal: bool = True
    context_width: int = 320
    bin_width: int = 128
    width: int = 192
    up_widths: tuple[int, ...] = (32, 32, 32)
    up_kernels: tuple[int, ...] = (2, 2, 2)
    unread_layers: bool = False
    log_bins: bool = False
    norm: Literal["batch", "group"] = "batch"

    def __post_init__(self) -> None:
        if len(self.up_widths) != len(self.up_kernels) or set(self.up_kernels) - {2, 3, 4}:
            raise ValueError(
                f"up_kernels are {self.up_kernels} for {len(self.up_widths)} layers; expected one of 2, 3, 4 for each"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the depths."""
        return self.schedule.scaled(2)


@dataclass(frozen=True, eq=False)
class DepthStep:
    """What one scale says.

    Attributes:
        tokens: what the transformer gave: of this scale, or of all so far where they are computed again.
        weights: of the bins, summing to 1.
        edges: of the bins, in metres; of one row and one pixel where they are the same for all.
        centres: of the bins that the weights are of.
    """

    bins: OrdinalBins
    tokens: Float[Tensor, "batch positions channels"]
    weights: Float[Tensor, "batch bins height width"]
    edges: Float[Tensor, "*batch edges height width"]

    @property
    def centres(self) -> Float[Tensor, "*batch bins height width"]:
        return centres(self.edges)

    @cached_property
    def depth(self) -> Float[Tensor, "batch 1 height width"]:
        """The weights' mean, in metres."""
        return (self.weights * self.centres).sum(1, keepdim=True)

    @property
    def uncertainty(self) -> Float[Tensor, "batch 1 height width"]:
        """The weights' standard deviation, in metres."""
        return (self.weights * (self.centres - self.depth) ** 2).sum(1, keepdim=True).sqrt()

    @property
    def labels(self) -> Int[Tensor, "batch 1 height width"]:
        """The bin that holds the depth."""
        return self.bins.labels(self.depth, self.edges)

    def next_edges(self) -> Float[Tensor, "*batch edges height width"]:
        """Of the bins of the next scale; no gradient flows through them."""
        if not self.bins.refined:
            return self.edges
        with torch.no_grad():
            return self.bins.divide(self.edges, self.labels)


class SeparableGRU(nn.Module):
    """A GRU on maps whose convolutions are five wide: one step along the rows, one along the columns (as in RAFT).

    Its input has a part that stays (the image) and one that may change from scale to scale (the bins); what either
    adds to the gates is computed apart, so that it can be kept.
    """

    def __init__(self, width: int, bin_width: int, context_width: int) -> None:
        super().__init__()
        self.widths = (width, bin_width, context_width)
        self.horizontal = nn.Conv2d(sum(self.widths), 3 * width, (1, 5), padding=(0, 2))
        self.vertical = nn.Conv2d(sum(self.widths), 3 * width, (5, 1), padding=(2, 0))

    @property
    def steps(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        """Update gate, reset gate and candidate, in this order, of either direction."""
        return self.horizontal, self.vertical

    def of_context(self, context: Tensor) -> list[Tensor]:
        """What the image adds to the gates."""
        start = sum(self.widths[:2])
        return [_convolve(step, context, step.weight[:, start:], step.bias) for step in self.steps]

    def of_bins(self, features: Tensor) -> list[Tensor]:
        """What the bins add to the gates."""
        span = slice(self.widths[0], sum(self.widths[:2]))
        return [_convolve(step, features, step.weight[:, span]) for step in self.steps]

    def forward(self, state: Tensor, *given: list[Tensor]) -> Tensor:
        """The new state.

        Args:
            given: from :meth:`of_context` and :meth:`of_bins`.
        """
        width = self.widths[0]
        for step, added in zip(self.steps, (sum(parts) for parts in zip(*given, strict=True)), strict=True):
            weight, added = step.weight[:, :width], cast(Tensor, added)
            gates = _convolve(step, state, weight[: 2 * width]) + added[:, : 2 * width]
            update, reset = gates.sigmoid().chunk(2, dim=1)
            candidate = _convolve(step, reset * state, weight[2 * width :]) + added[:, 2 * width :]
            state = (1 - update) * state + update * candidate.tanh()
        return state


def _convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=cast("tuple[int, int]", layer.padding))


def _norm(kind: str, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if kind == "batch" else nn.GroupNorm(GROUPS, width)


def _enlarge(inputs: int, widths: tuple[int, ...], kernels: tuple[int, ...], norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, kernel in zip(widths, kernels, strict=True):
        padding, extra = {2: (0, 0), 3: (1, 1), 4: (1, 0)}[kernel]
        layers.append(nn.ConvTranspose2d(inputs, width, kernel, 2, padding, extra, bias=False))
        layers += [_norm(norm, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


class DARDecoder(nn.Module):
    """Image features -> one depth map per scale."""

    def __init__(self, config: DARDecoderConfig) -> None:
        super().__init__()
        self.config, tokens, width = config, config.transformer.token_width, config.width
        self.query_tokens = nn.Parameter(torch.zeros(1, config.schedule.lengths[0], tokens))
        self.transformer = DARTransformer(config.transformer)
        self.up = _enlarge(tokens, config.up_widths, config.up_kernels, config.norm)
        self.project = nn.Sequential(
            nn.Conv2d(config.up_widths[-1], width, 3, padding=1), _norm(config.norm, width), nn.ReLU()
        )
        features = config.bin_width
        self.bin_features = nn.Sequential(
            nn.Conv2d(config.bins.count, features, 7, padding=3),
            nn.ReLU(),
            nn.Conv2d(features, features, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(features, features, 3, padding=1),
            nn.ReLU(),
        )
        self.gru = SeparableGRU(width, features, config.context_width)
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, config.bins.count, 3, padding=1)
        )
        self.unread: nn.Sequential | None = None
        if config.unread_layers:
            self.unread = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 3, padding=1)
            ).requires_grad_(False)

    def forward(
        self,
        memory: Float[Tensor, "batch channels tall wide"],
        context: Float[Tensor, "batch features height width"],
        schedule: ScaleSchedule | None = None,
    ) -> Iterator[DepthStep]:
        """Depths, scale by scale.

        Args:
            memory: the image's features.
            context: a feature map of the image; it is resized to twice the last scale.
            schedule: other grids, the first of which has as many tokens; None: the configuration's.

        Raises:
            ValueError: the first grid has another number of tokens.
        """
        config, schedule = self.config, schedule or self.config.schedule
        if schedule.lengths[0] != self.query_tokens.shape[1]:
            raise ValueError(
                f"the first scale of '{schedule}' has {schedule.lengths[0]} tokens; this model begins with "
                f"{self.query_tokens.shape[1]}"
            )
        size = schedule.scaled(2)
        of_context = self.gru.of_context(_resize(context, size))
        edges = config.bins.first(memory)
        of_bins = self._of_bins(edges, size)
        for index, tokens in enumerate(self.grow(memory, schedule)):
            scale = schedule[index]
            latest = tokens[:, -scale.tokens :].mT.unflatten(-1, scale.grid)
            state = _resize(self.project(self.up(latest)), size)
            weights = self.head(self.gru(state, of_context, of_bins)).softmax(1)
            step = DepthStep(config.bins, tokens, weights, edges)
            yield step
            if config.bins.refined and index + 1 < len(schedule):
                edges = step.next_edges()
                of_bins = self._of_bins(edges, size)

    def grow(
        self, memory: Float[Tensor, "batch channels tall wide"], schedule: ScaleSchedule
    ) -> Iterator[Float[Tensor, "batch positions channels"]]:
        """The transformer's output at each scale: of its tokens, or where nothing is masked of all so far.

        A scale's tokens are the output map of the scale before, resized.
        """
        image = self.transformer.remember(memory.flatten(2).mT)
        new = self.query_tokens.expand(len(memory), -1, -1)
        cache = self._cache(image[0][0], schedule) if self.config.causal else None
        sequence = new
        for index, scale in enumerate(schedule.scales):
            output: Tensor = self.transformer(sequence, image, cache=cache)
            yield output
            if index + 1 < len(schedule):
                latest = output[:, -scale.tokens :].mT.unflatten(-1, scale.grid)
                new = _resize(latest, schedule[index + 1].grid).flatten(2).mT
                sequence = torch.cat((sequence, new), dim=1) if cache is None else new

    def _cache(self, key: Tensor, schedule: ScaleSchedule) -> KeyValueCache:
        depth = self.config.transformer.depth
        if torch.is_grad_enabled():
            return GradientCache(depth)
        batch, _, heads, size = key.shape
        return KeyValueCache(depth, batch, schedule.length, heads, size, dtype=key.dtype, device=key.device)

    def _of_bins(self, edges: Tensor, size: tuple[int, int]) -> list[Tensor]:
        middle = centres(edges).expand(-1, -1, *size)
        middle = (middle.log() if self.config.log_bins else middle).to(self.query_tokens.dtype)
        return self.gru.of_bins(self.bin_features(middle))


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
