"""DAR: metric depth by regression from low to high resolution and from wide to narrow depth intervals.

Wang et al. 2025, "Scalable Autoregressive Monocular Depth Estimation" (arXiv 2411.11361, CVPR); official code
wjh892521292/DAR, of which no weights are published. The code differs from the paper. A model made anew follows the
paper; one read from a file in the official layout does what the code does: :func:`as_published`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nextscale.core.checkpoint import assign, save_folder, weightless
from nextscale.core.config import from_json, to_json
from nextscale.core.random import Draws
from nextscale.core.schedule import ScaleSchedule
from nextscale.tasks.depth.dar_bins import OrdinalBins
from nextscale.tasks.depth.dar_decoder import SCHEDULE, DARDecoder, DARDecoderConfig, DepthStep
from nextscale.tasks.depth.dar_diffusion import DiffusionEncoder, DiffusionEncoderConfig
from nextscale.tasks.depth.dar_encoders import ConvEncoder, ConvEncoderConfig, PatchEncoder, PatchEncoderConfig
from nextscale.tasks.depth.dar_layout import LAYOUTS, from_layout, to_layout
from nextscale.tasks.depth.dar_official import find_official, is_official, read_config
from nextscale.tasks.depth.dar_transformer import DARTransformerConfig
from nextscale.tasks.depth.dar_windows import cut_windows, join_windows
from nextscale.tasks.depth.predictor import DepthModel, Unit, resize

SYSTEM = "dar"

SCHEDULE_5 = ScaleSchedule.parse("4x5 8x10 16x20 32x40 64x80")
"""Five scales, as the paper has; each doubles the one before."""


@dataclass(frozen=True)
class DARConfig:
    """Attributes:

    conv, patch, diffusion: the image encoder: one of them is given.
    image_size: (height, width) in which the network sees photos, whatever their shape; it is padded with black to what
        the encoder takes.
    window: wider images are seen in two windows of this width, left and right, blended where they meet.
    out_size: (height, width) to which the decoder's maps are resized before the padding is cut off; None: the padded
        image's. The published code has one per data set, whatever the padding.
    """

    decoder: DARDecoderConfig = field(default_factory=DARDecoderConfig)
    conv: ConvEncoderConfig | None = None
    patch: PatchEncoderConfig | None = None
    diffusion: DiffusionEncoderConfig | None = None
    image_size: tuple[int, int] = (480, 640)
    window: int | None = None
    out_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        kinds = [name for name in ("conv", "patch", "diffusion") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(f"the encoder is given by {' and '.join(kinds) or 'nothing'}; expected one of the three")
        if self.window is not None and not self.window <= self.image_size[1] <= 2 * self.window:
            raise ValueError(
                f"two windows of {self.window} columns do not cover images {self.image_size[1]} wide; expected between "
                "half their width and all of it"
            )

    @classmethod
    def of_size(cls, depth: int, width: int, heads: int, **changes: Any) -> Self:
        """The paper's model with such a transformer: five scales, 16 bins."""
        transformer = DARTransformerConfig(width, depth, heads)
        return cls(DARDecoderConfig(transformer, schedule=SCHEDULE_5), **changes)


TINY = DARConfig(
    DARDecoderConfig(
        DARTransformerConfig(width=128, depth=3, heads=4, token_width=96, memory_width=128),
        OrdinalBins(min_depth=0.3, max_depth=80.0, spacing="log"),
        ScaleSchedule.parse("3x4 6x8 12x16"),
        context_width=64,
        bin_width=16,
        width=48,
        up_widths=(48,),
        up_kernels=(2,),
        log_bins=True,
        norm="group",
    ),
    conv=ConvEncoderConfig(),
    image_size=(96, 128),
)
"""For small machines: rooms and streets at 96 x 128 pixels."""

PRESETS: dict[str, DARConfig] = {
    "dar-small": DARConfig.of_size(5, 960, 8, patch=PatchEncoderConfig()),
    "dar-base": DARConfig.of_size(7, 2400, 20, patch=PatchEncoderConfig()),
    "dar-large": DARConfig.of_size(13, 2160, 18, diffusion=DiffusionEncoderConfig()),
    "dar-tiny": TINY,
}
"""The paper's three sizes, of 440 M, 1.0 B and 2.0 B parameters with the encoder, and one for small machines.

The paper's numbers of layers and of parameters are known; its widths are not, and are chosen so that the sums come out.
"""


class DAR(DepthModel):
    """Image encoder and depth decoder. It draws nothing: a photo has one depth map, in metres."""

    system: ClassVar[str] = SYSTEM
    unit: Unit = "metre"

    def __init__(self, config: DARConfig) -> None:
        super().__init__()
        self.config, self.tokenizer = config, None
        self.encoder: ConvEncoder | PatchEncoder | DiffusionEncoder
        if config.conv is not None:
            self.encoder = ConvEncoder(config.conv)
        elif config.patch is not None:
            self.encoder = PatchEncoder(config.patch)
        else:
            assert config.diffusion is not None
            self.encoder = DiffusionEncoder(config.diffusion)
        given = (config.decoder.transformer.memory_width, config.decoder.context_width)
        if self.encoder.widths != given:
            raise ValueError(
                f"the encoder gives tokens and features of {self.encoder.widths} channels; the decoder reads {given}"
            )
        self.decoder = DARDecoder(config.decoder)

    @property
    def rates(self) -> dict[str, float]:
        """Factors of the learning rate, by parts of names: a trained diffusion network moves slowly, scenes fast."""
        return {"encoder.unet.": 0.01, "scene_embedding": 10.0} if self.config.diffusion is not None else {}

    def with_scales(self, scales: str) -> Self:
        """This model, to go on with another list of scales whose first has as many tokens.

        Raises:
            ValueError: the first scale has another number of tokens, or the list is none.
        """
        schedule, given = ScaleSchedule.parse(scales), self.config.decoder.schedule
        if schedule.lengths[0] != given.lengths[0]:
            raise ValueError(
                f"the first scale of '{scales}' has {schedule.lengths[0]} tokens; this model begins with "
                f"{given.lengths[0]}"
            )
        self.config = replace(self.config, decoder=replace(self.config.decoder, schedule=schedule))
        self.decoder.config = self.config.decoder
        return self

    # --- depths ------------------------------------------------------------------------------------------

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], schedule: ScaleSchedule | None = None
    ) -> list[Float[Tensor, "batch 1 height width"]]:
        """The depth of every scale, in metres, at the images' size.

        Args:
            images: in [-1, 1].
            schedule: other token grids (:meth:`DARDecoder.forward`).
        """
        return [self.at_size(step.depth, images) for step in self.steps(images, schedule)]

    def steps(
        self, images: Float[Tensor, "batch 3 height width"], schedule: ScaleSchedule | None = None
    ) -> Iterator[DepthStep]:
        """Scale by scale, at twice the last token grid's size; images in [-1, 1]."""
        memory, context = self.encoder(self._padded(images))
        return self.decoder(memory, context, schedule)

    def at_size(self, depth: Tensor, images: Tensor) -> Float[Tensor, "batch 1 height width"]:
        """A depth map of the decoder at the images' size."""
        size = self.config.out_size or self._padded_size(images)
        enlarged = F.interpolate(depth, size=size, mode="bilinear", align_corners=False)
        return enlarged[..., : images.shape[-2], : images.shape[-1]]

    def _padded_size(self, images: Tensor) -> tuple[int, int]:
        multiple = self.encoder.multiple
        height, width = (-(-side // multiple) * multiple for side in images.shape[-2:])
        return height, width

    def _padded(self, images: Tensor) -> Tensor:
        """With black (-1) below and on the right."""
        height, width = self._padded_size(images)
        return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]), value=-1.0)

    # --- prediction --------------------------------------------------------------------------------------

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        return self.config.image_size

    def enter(self, photos: Tensor) -> Tensor:
        return resize(photos, self.config.image_size).clamp(0, 1).to(self.dtype)

    def leave(self, depth: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(depth.float(), size=size, mode="bilinear", align_corners=False)

    def infer(self, images: Tensor, samples: int, draws: Draws, report: Callable[[int, int], None]) -> Tensor:
        if samples != 1:
            raise ValueError(f"{samples} samples were asked for; DAR draws nothing, so there is one: leave n out")
        windows = cut_windows(images, self.config.window) * 2 - 1
        scales, depth = len(self.config.decoder.schedule), None
        for done, step in enumerate(self.steps(windows), 1):
            report(done, scales)
            depth = step.depth if done == scales else None
        assert depth is not None
        return join_windows(self.at_size(depth, windows), images.shape[-1])

    def loss(self, batch: dict[str, Any]) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        from nextscale.tasks.depth.dar_training import DARTraining

        return DARTraining(self).loss(self.system, self, batch, 0)

    # --- files -------------------------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self}

    @property
    def official_name(self) -> str:
        return "dar.pth"

    def save(self, folder: str | Path) -> Path:
        return save_folder(folder, self.state_dict(), {"system": self.system, "config": to_json(self.config)})

    @classmethod
    def from_saved(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        with weightless():
            model = cls(from_json(DARConfig, config["config"]))
        assign(model, state, "the saved DAR")
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """The official state dict.

        Raises:
            ValueError: the encoder is one that the official code does not have.
        """
        kind = next((name for name in LAYOUTS if getattr(self.config, name) is not None), None)
        if kind is None:
            raise ValueError("the official code has no convolutional encoder: save this model in this library's form")
        return to_layout(LAYOUTS[kind], self.state_dict())

    @classmethod
    def read_official(cls, content: Mapping[str, Any], **overrides: Any) -> tuple[DARConfig, dict[str, Tensor]]:
        """Configuration and flat state dict in an official file's content; overrides as for :meth:`from_official`."""
        state = find_official(content)
        return as_published(*read_config(state), **overrides), state

    @classmethod
    def official_parts(
        cls, content: Mapping[str, Any], **overrides: Any
    ) -> list[tuple[str, DARConfig, Mapping[str, Tensor]]]:
        """What an official file holds: (part, configuration, flat state dict)."""
        return [("model", *cls.read_official(content, **overrides))]

    @classmethod
    def from_official(cls, content: Mapping[str, Any], **overrides: Any) -> Self:
        """Build from an official file's content, to do what the published code does.

        Args:
            overrides: see :func:`as_published`.

        Raises:
            CheckpointError: the content is not a DAR.
        """
        config, state = cls.read_official(content, **overrides)
        with weightless():
            model = cls(config)
        assign(model, from_layout(LAYOUTS["patch" if config.patch is not None else "diffusion"], state), cls.__name__)
        return model.eval()


@dataclass(frozen=True)
class PublishedUse:
    """What the published code sets by the data set.

    Attributes:
        out_sizes: of the decoder's last enlargement, for the diffusion and for the patch encoder.
    """

    max_depth: float
    image_size: tuple[int, int]
    window: int | None
    out_sizes: tuple[tuple[int, int], tuple[int, int]]


USES = {
    "nyu": PublishedUse(10.0, (480, 640), None, ((512, 640), (504, 672))),
    "kitti": PublishedUse(80.0, (352, 1216), 640, ((392, 672), (392, 672))),
}


def as_published(
    decoder: DARDecoderConfig,
    encoder: PatchEncoderConfig | DiffusionEncoderConfig,
    *,
    dataset: str = "nyu",
    max_depth: float | None = None,
    min_depth: float = 1e-3,
    schedule: ScaleSchedule | str = SCHEDULE,
    heads: int = 8,
) -> DARConfig:
    """The published code's model: no mask, and the first, uniform bins at every scale.

    Args:
        decoder, encoder: their sizes; everything else of them is set here.
        dataset: "nyu" or "kitti": decides on the depth range and on sizes.
        max_depth: metres; None: 10 or 80, by the data set.

    Raises:
        ValueError: the data set is another one.
    """
    if dataset not in USES:
        raise ValueError(f"the published code knows no data set {dataset!r}; it has {' and '.join(USES)}")
    use, diffuses = USES[dataset], isinstance(encoder, DiffusionEncoderConfig)
    bins = OrdinalBins(
        min_depth, max_depth or use.max_depth, decoder.bins.count, neighbours=2, refined=False, last_edge=False
    )
    return DARConfig(
        replace(
            decoder,
            transformer=replace(decoder.transformer, heads=heads),
            bins=bins,
            schedule=ScaleSchedule.parse(schedule),
            causal=False,
        ),
        patch=None if isinstance(encoder, DiffusionEncoderConfig) else encoder,
        diffusion=encoder if isinstance(encoder, DiffusionEncoderConfig) else None,
        image_size=use.image_size,
        window=use.window,
        out_size=use.out_sizes[0 if diffuses else 1],
    )


__all__ = ["DAR", "PRESETS", "SYSTEM", "DARConfig", "as_published", "is_official"]
