"""The configuration of Infinity's training runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from nextscale.core.optim import Schedule
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.datasets.aspects import AspectImages, open_aspects
from nextscale.tasks.data import Load
from nextscale.tasks.generation.infinity import Infinity
from nextscale.tasks.generation.infinity_config import PRESETS, InfinityConfig, hidden_width
from nextscale.tasks.generation.infinity_training import InfinityLossConfig, InfinityTraining, initialize
from nextscale.tasks.generation.infinity_transformer import InfinityBlocksConfig
from nextscale.tasks.generation.text import TextEncoder
from nextscale.tasks.generation.text_recipe import CaptionData, TextImages, TextRecipe
from nextscale.tasks.tokenizers.bitwise_schedules import PIXELS, published, schedule_of
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ


@dataclass(frozen=True)
class InfinityData(CaptionData):
    """Images with texts, square or at the published aspect ratios.

    Attributes:
        ratios: train each image at the aspect ratio (height / width) nearest to its own among these, a batch of one
            ratio each; ``[]``: all fifteen. ``size`` then is the side of the square ones, of 16, 32, 48 or 64 tokens.
            Resized to cover, cut to the centre, never mirrored. None: squares of ``size``.
    """

    ratios: list[float] | None = None

    def __post_init__(self) -> None:
        if self.ratios is None:
            return
        if unknown := [ratio for ratio in self.ratios if ratio not in published()]:
            known = ", ".join(map(str, sorted(published())))
            raise ValueError(f"ratios has {', '.join(map(str, unknown))}; expected some of {known}")
        if self.captions != "files" or self.streamed or self.flip:
            raise ValueError(
                "images of several aspect ratios need texts of their own (captions: files), no stream, no flip"
            )

    def open_ratios(self, stride: int, seed: int) -> AspectImages:
        """The training set at several aspect ratios.

        Raises:
            ValueError: no published list has squares of ``size``.
        """
        name = PIXELS.get(16 * self.size // stride) if self.size % stride == 0 else None
        if name is None:
            sides = ", ".join(str(side * stride // 16) for side in PIXELS)
            raise ValueError(
                f"data.size is {self.size}; expected {sides} with this tokenizer, for several aspect ratios"
            )
        sizes = [schedule_of(ratio, name).scaled(stride) for ratio in self.ratios or published()]
        return open_aspects(self.source, sizes, field=self.field, choice=self.choice(seed))


@dataclass(frozen=True)
class InfinityRecipe(TextRecipe):
    """Train an Infinity on images with texts.

    Attributes:
        tokenizer: a bitwise one, folder or official file.
        size: one of the paper's, such as 125m or 2b; the next five replace parts of it.
        mlp_ratio: None: as published, the nearest multiple of 256 to four times the width.
        scales: None: the tokenizer's list.
        gate: initial size of the gates of the blocks' branches; ``modulation`` of their scales and shifts. The
            published values are for long runs.
        init: an Infinity to start from, a folder or an official file.
    """

    data: InfinityData
    size: str = "125m"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    drop_path: float | None = None
    chunks: int = 1
    scales: str | None = None
    gate: float = 5e-6
    modulation: float = 1e-3
    loss: InfinityLossConfig = field(default_factory=InfinityLossConfig)
    init: str | None = None
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            output="runs/infinity",
            epochs=100,
            betas=(0.9, 0.97),
            weight_decay=0.005,
            warmup_epochs=0,
            end_rate=1.0,
            grad_clip=5.0,
        )
    )

    def __post_init__(self) -> None:
        if f"infinity-{self.size}" not in PRESETS:
            names = ", ".join(name.removeprefix("infinity-") for name in PRESETS)
            raise ValueError(f"size is {self.size!r}; expected one of {names}")

    def open_texts(self, load: Load) -> TextImages:
        if self.data.ratios is None:
            return super().open_texts(load)
        return self.data.open_ratios(self.open_tokenizer(load, BitwiseVQ, self.scales).stride, self.training.seed)

    def build(self, encoder: TextEncoder, load: Load) -> Infinity:
        """The model to train: new, or from ``init``.

        Raises:
            ValueError: the tokenizer is no bitwise one, or its scales are not of the images' size.
        """
        tokenizer: BitwiseVQ = self.open_tokenizer(load, BitwiseVQ, self.scales)
        schedule = tokenizer.config.schedule
        if self.init is not None:
            model: Infinity = load(self.init, tokenizer)
            model.config = replace(
                model.config,
                schedule=schedule,
                text=encoder.config,
                text_drop=self.text_drop,
                guidance=self.guidance,
                temperature=self.temperature,
            )
        else:
            config = self._config(encoder, tokenizer, schedule)
            model = initialize(Infinity(config, tokenizer), gate=self.gate, modulation=self.modulation)
        model.text_encoder = encoder
        return model

    def _config(self, encoder: TextEncoder, tokenizer: BitwiseVQ, schedule: ScaleSchedule) -> InfinityConfig:
        base = PRESETS[f"infinity-{self.size}"].transformer
        width = self.width or base.width
        blocks = InfinityBlocksConfig(
            width=width,
            depth=self.depth or base.depth,
            heads=self.heads or base.heads,
            mlp_ratio=self.mlp_ratio or hidden_width(width) / width,
            drop_path=base.drop_path if self.drop_path is None else self.drop_path,
            chunks=self.chunks,
        )
        heads = max(encoder.width // 128, 1)
        return InfinityConfig(
            blocks,
            text_width=encoder.width,
            text_length=self.text_length,
            pool_heads=heads if width % heads == 0 else blocks.heads,
            token_bits=tokenizer.config.quantizer.token_bits,
            levels=max(len(schedule), PRESETS["infinity-2b"].levels),
            schedule=schedule,
            text=encoder.config,
            text_drop=self.text_drop,
            guidance=self.guidance,
            temperature=self.temperature,
        )

    def task(self, model: Infinity, plan: Schedule) -> InfinityTraining:
        return InfinityTraining(model, self.loss)
