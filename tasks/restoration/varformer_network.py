"""VarFormer's restoration network: an encoder and a decoder into whose levels the prior is injected.

Official code siywang541/Varformer, ``var_vqgan_arch.py``. Level 0 is full resolution, each next one half of it; the
tokenizer's own feature maps, V in the paper, guide what is taken from the prior. Maps are (batch, channels, height,
width).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.autoencoder import NORM_EPS, AutoencoderConfig, Decoder, Encoder, Level, Upsample, middle
from nextscale.tasks.restoration.varformer_adjust import Adjustment
from nextscale.tasks.restoration.varformer_parts import AnchorAttention, Map, Mixer, Selector

Prior = Float[Tensor, "batch scales codes h w"]

OWN, SKIP = 3.0, 0.0
"""Where training anew begins, before the softmax and the sigmoid: a level's own map over the prior, and in the decoder
the encoder's map over what comes from below.
"""


@dataclass(frozen=True)
class FusionSizes:
    """What all fusions of one network share.

    Attributes:
        scales, codes: of the prior.
        side: of the prior's maps.
        heads, window: of the window attention; groups: of two blocks of it, one after the other.
        published: as in published files: weighed first, and with what they hold and never run.
        injected: levels that the prior enters, from the lowest up; None: all but full resolution, as published.
    """

    scales: int
    codes: int
    side: int
    heads: int
    window: int
    groups: int
    published: bool
    injected: int | None = None


class Fusion(nn.Module):
    """How the prior enters one level: select, mix, attend.

    Args:
        guide, width: channels of the tokenizer's map and of the level's.
        factor: how often larger the level is than the prior.
    """

    def __init__(self, guide: int, width: int, factor: int, sizes: FusionSizes, norm_groups: int) -> None:
        super().__init__()
        side = sizes.side * factor
        self.norm = nn.GroupNorm(norm_groups, guide + width, NORM_EPS)
        self.conv = nn.Conv2d(guide + width, guide, 1)
        windows = {"window": sizes.window, "groups": sizes.groups, "unused": sizes.published}
        self.selector = Selector(
            guide, width, sizes.scales, sizes.codes, factor, sizes.heads, side, weigh_first=sizes.published, **windows
        )
        self.mixer = Mixer(width, sizes.heads, side, **windows)
        self.anchors = AnchorAttention(width, width, norm_groups)
        if not sizes.published:
            self._begin_quietly()

    def _begin_quietly(self) -> None:
        """Let levels pass almost unchanged at first: what untrained fusions add is noise to those below them."""
        _silence(self.mixer.conv1x1)
        _silence(self.anchors.projection)
        assert self.mixer.conv1x1.bias is not None
        nn.init.constant_(self.mixer.conv1x1.bias[:1], OWN)

    def forward(self, h: Map, guide: Map, prior: Prior) -> Map:
        chosen = self.selector(self.conv(self.norm(torch.cat((guide, h), dim=1))), prior)
        return cast(Tensor, self.anchors(self.mixer(h, chosen), chosen))


def _fusions(widths: Sequence[tuple[int, int]], sizes: FusionSizes, norm_groups: int) -> nn.ModuleDict:
    """One for each level that the prior enters; published files hold one of level 0 too, which is never run.

    Args:
        widths: of the tokenizer's map and of the level's, from full resolution down.
    """
    lowest = len(widths) - 1
    first = 1 if sizes.injected is None else len(widths) - sizes.injected
    levels = range(0 if sizes.published else first, len(widths))
    return nn.ModuleDict({str(i): Fusion(*widths[i], 2 ** (lowest - i), sizes, norm_groups) for i in levels})


@dataclass(frozen=True)
class EncoderMaps:
    """Attributes:

    latent: what the encoder ends in.
    levels: of each level before it is halved, from full resolution down.
    middle: after the middle blocks.
    """

    latent: Map
    levels: list[Map]
    middle: Map


def encode_levels(
    encoder: Encoder, image: Float[Tensor, "batch 3 height width"], enter: Callable[[int, Map], Map] | None = None
) -> EncoderMaps:
    """An encoder, with the maps of all levels.

    Args:
        enter: what becomes of a level's input.
    """
    h, levels = encoder.conv_in(image), list[Tensor]()
    for i, level in enumerate(encoder.levels):
        assert isinstance(level, Level)
        h = level.process(h if enter is None else enter(i, h))
        levels.append(h)
        if level.resample is not None:
            h = level.resample(h)
    h = encoder.middle(h)
    return EncoderMaps(encoder.conv_out(F.silu(encoder.norm_out(h))), levels, h)


class MainEncoder(nn.Module):
    """The tokenizer's encoder with weights of its own, and with the prior entering before the blocks of a level."""

    def __init__(self, config: AutoencoderConfig, sizes: FusionSizes) -> None:
        super().__init__()
        outputs = [config.channels * m for m in config.multipliers]
        inputs = [config.channels, *outputs[:-1]]
        self.trunk = Encoder(config)
        self.fusions = _fusions(list(zip(outputs, inputs, strict=True)), sizes, config.norm_groups)

    def forward(self, image: Float[Tensor, "batch 3 height width"], guides: Sequence[Map], prior: Prior) -> EncoderMaps:
        """Maps of an image.

        Args:
            image: in [-1, 1].
            guides: the tokenizer's encoder's maps, from full resolution down.
        """

        def enter(i: int, h: Map) -> Map:
            return cast(Tensor, self.fusions[str(i)](h, guides[i], prior)) if i and str(i) in self.fusions else h

        return encode_levels(self.trunk, image, enter)


def decode_levels(decoder: Decoder, latent: Map, stop: int = 0) -> tuple[Map, dict[int, Map]]:
    """The tokenizer's decoder: the map after its middle, and that of each level before it is doubled.

    Args:
        stop: the last level that is computed.
    """
    h = start = decoder.middle(decoder.conv_in(latent))
    levels: dict[int, Tensor] = {}
    for i in reversed(range(stop, len(decoder.levels))):
        level = decoder.levels[i]
        assert isinstance(level, Level)
        h = levels[i] = level.process(h)
        if level.resample is not None:
            h = level.resample(h)
    return start, levels


class RefinementBlock(nn.Module):
    """conv, ReLU, conv, plus the input, without norms (Lim et al. 2017, EDSR); at first, the input alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        _silence(self.conv2)

    def forward(self, x: Map) -> Map:
        return x + cast(Tensor, self.conv2(F.relu(self.conv1(x))))


class Refinement(nn.Module):
    """What is still wrong with restored pixels, from these, the degraded ones and the decoder's last map.

    A last stage at full resolution, as Restormer has it (Zamir et al. 2022, section 3). What it adds is a multiple of
    the degraded pixels, counted from black, and an offset: haze and darkness are undone by such. At first it finds
    nothing.
    """

    def __init__(self, channels: int, blocks: int, width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(RefinementBlock(width) for _ in range(blocks)))
        self.conv_out = nn.Conv2d(width, 6, 3, padding=1)
        _silence(self.conv_out)

    def forward(self, pixels: Map, image: Map, h: Map) -> Map:
        found = self.conv_out(F.relu(self.blocks(self.conv_in(torch.cat((pixels, image, h), dim=1)))))
        gain, offset = found.chunk(2, dim=1)
        return cast(Tensor, gain * (image + 1) + offset)


def _silence(layer: nn.Conv2d) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class MainDecoder(nn.Module):
    """From the latent to the image, with the main encoder's maps and the prior entering before a level's blocks.

    Args:
        blocks: residual blocks per level.
        adjust: whether maps are adjusted to the frozen decoder's (:class:`Adjustment`).
        refinement: blocks and width of a :class:`Refinement`; without blocks there is none.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        sizes: FusionSizes,
        blocks: int,
        adjust: bool,
        refinement: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        multipliers, groups = config.multipliers, config.norm_groups
        widths = [config.channels * m for m in multipliers]
        outputs = [config.channels, *widths[:-1]]
        lowest = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.middle = middle(widths[-1], config)
        levels = [
            Level(widths[i], outputs[i], blocks, config.attention and i == lowest, config) for i in range(len(widths))
        ]
        for i, level in enumerate(levels):
            level.resample = Upsample(outputs[i]) if i else None
        self.levels = nn.ModuleList(levels)
        self.fusions = _fusions([(width, width) for width in widths], sizes, groups)
        self.share = nn.Parameter(torch.full((len(widths),), 1.0 if sizes.published else SKIP))
        self.norm_out = nn.GroupNorm(groups, outputs[0], NORM_EPS)
        self.conv_out = nn.Conv2d(outputs[0], config.image_channels, 3, padding=1)
        self.input_share = nn.Parameter(torch.tensor(0.5))
        self.adjustments = nn.ModuleDict()
        if adjust:
            self.adjustments["middle"] = Adjustment(widths[-1], multipliers[-1], 0, groups, join=False)
            for i in range(1, len(widths)):
                self.adjustments[str(i)] = Adjustment(outputs[i], multipliers[i - 1], widths[i], groups, join=True)
        self.refinement = Refinement(outputs[0] + 6, *refinement) if refinement[0] else None
        # Published files hold a convolution of a map that a softmax over one channel has made all ones.
        self.unused = nn.Conv2d(1, 1, 1) if sizes.published else None

    def forward(
        self,
        latent: Map,
        image: Float[Tensor, "batch 3 height width"],
        skips: Sequence[Map],
        guides: tuple[Map, dict[int, Map]],
        prior: Prior,
    ) -> Float[Tensor, "batch 3 height width"]:
        """The restored image, not clamped.

        Args:
            image: the degraded one, in [-1, 1], of which a learned share is added at the end.
            skips: the main encoder's maps, from full resolution down.
            guides: :func:`decode_levels` of the frozen decoder.
        """
        h, handed_on = self.middle(self.conv_in(latent)), None
        if self.adjustments:
            h, handed_on = self.adjustments["middle"](h, guides[0])
        for i in reversed(range(len(self.levels))):
            share = self.share[i].sigmoid()
            h = share * h + (1 - share) * skips[i]
            if i > 0 and str(i) in self.fusions:
                h = self.fusions[str(i)](h, guides[1][i], prior)
            h = self.levels[i](h)
            if i > 0 and self.adjustments:
                h, handed_on = self.adjustments[str(i)](h, guides[1][i - 1], handed_on)
        h = F.silu(self.norm_out(h))
        pixels: Tensor = self.conv_out(h) * (1 - self.input_share) + image * self.input_share
        return pixels if self.refinement is None else pixels + self.refinement(pixels, image, h)
