"""The configuration of STAR's training runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from nextscale.core.optim import Schedule
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.datasets.caption_stream import StreamedCaptions
from nextscale.tasks.data import Load
from nextscale.tasks.generation.star import STAR
from nextscale.tasks.generation.star_config import PRESETS, STARConfig
from nextscale.tasks.generation.star_training import STARHeadTraining, STARLossConfig, STARTraining, initialize
from nextscale.tasks.generation.star_transformer import STARBlocksConfig
from nextscale.tasks.generation.text import TextEncoder
from nextscale.tasks.generation.text_recipe import TextImages, TextRecipe, TextTraining
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ

SIZES = ("d16", "d30")
LOOKED_AT = 64
"""Texts made of classes that are looked at for their length."""


@dataclass(frozen=True)
class STARRecipe(TextRecipe):
    """Train a STAR on images with texts.

    Attributes:
        tokenizer: a residual one, folder or official file.
        stage: the backbone, or the sampling head on a trained one's frozen features.
        size: d16 or d30; the next four replace parts of it.
        scales: None: the tokenizer's list.
        rotary: positions by rotation; else a learned table.
        cross_attention: ``own``: each image attends to its own text; ``first``: the first of a batch attends for all,
            as the released models were trained; None: ``own``, or as ``init`` has it.
        stable_from: with stage sampler: place of the first scale that the sampling head fills.
        init: a STAR to start from, a folder or an official file, also of fewer or other scales.
    """

    stage: Literal["backbone", "sampler"] = "backbone"
    size: str = "d16"
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    drop_path: float | None = None
    scales: str | None = None
    rotary: bool = True
    cross_attention: Literal["own", "first", "none"] | None = None
    stable_from: int = 9
    loss: STARLossConfig = field(default_factory=STARLossConfig)
    init: str | None = None
    guidance: float = 4.0
    text_length: int = 77
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            output="runs/star", epochs=10, batch_size=512, learning_rate=5e-5, end_rate=0.01
        )
    )

    small_encoder: ClassVar[Literal["t5", "clip"]] = "clip"

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size is {self.size!r}; expected one of {', '.join(SIZES)}")
        if self.stage == "sampler" and self.init is None:
            raise ValueError("the sampling head is trained on a finished backbone: give its folder or file as init")

    def encoder(self, dataset: TextImages) -> TextEncoder:
        """The text encoder, made here where none is named.

        Raises:
            ValueError: no text would ever be replaced by the empty one, which guidance needs.
        """
        if self.text_drop and self.loss.spare_short:
            looked_at = self.data.captions == "classes" or isinstance(dataset, StreamedCaptions)
            shown = dataset.fetch(range(min(len(dataset), LOOKED_AT)))["text"] if looked_at else dataset.vocabulary()
            longest = max(map(len, shown))
            if longest <= self.loss.spare_short:
                raise ValueError(
                    f"texts of up to {self.loss.spare_short} characters are never replaced by the empty one, and the "
                    f"longest here has {longest}, so the model would not learn what guidance needs: give "
                    "--loss.spare_short 0"
                )
        return super().encoder(dataset)

    def build(self, encoder: TextEncoder, load: Load) -> STAR:
        """The model to train: new, or from ``init``.

        Raises:
            ValueError: the tokenizer is no residual one, its scales are not of the images' size, or the text encoder
                has another width than ``init`` reads.
        """
        tokenizer: ResidualVQ = self.open_tokenizer(load, ResidualVQ, self.scales)
        schedule = tokenizer.config.schedule
        begun = None if self.init is None else load(self.init, tokenizer)
        config = self._config(encoder, tokenizer, schedule, begun)
        model = initialize(STAR(config, tokenizer))
        if begun is not None:
            take_over(model, begun)
        model.text_encoder = encoder
        return model

    def _config(
        self, encoder: TextEncoder, tokenizer: ResidualVQ, schedule: ScaleSchedule, begun: STAR | None
    ) -> STARConfig:
        if begun is None:
            base = PRESETS[f"star-{self.size}-256"].transformer
            depth = self.depth or base.depth
            blocks = STARBlocksConfig(
                width=self.width or base.width,
                depth=depth,
                heads=self.heads or base.heads,
                drop_path=0.1 * depth / 24 if self.drop_path is None else self.drop_path,
                text_width=encoder.width,
                cross_attention=self.cross_attention or "own",
            )
            config = STARConfig(blocks, rotary=self.rotary)
        else:
            config = begun.config
            if config.text_width != encoder.width:
                raise ValueError(
                    f"{self.init} reads texts of {config.text_width} channels, the text encoder "
                    f"{encoder.config.name} gives {encoder.width}: name the encoder it was trained with"
                )
            if self.cross_attention is not None:
                config = replace(config, transformer=replace(config.transformer, cross_attention=self.cross_attention))
        own_head = begun is not None and begun.stable is not None
        return replace(
            config,
            vocabulary=tokenizer.config.quantizer.vocabulary,
            code_channels=tokenizer.config.quantizer.channels,
            schedule=schedule,
            stable_from=self.stable_from if self.stage == "sampler" or own_head else None,
            text=encoder.config,
            text_drop=self.text_drop,
            guidance=self.guidance,
            temperature=self.temperature,
        )

    def task(self, model: STAR, plan: Schedule) -> TextTraining:
        return (STARHeadTraining if self.stage == "sampler" else STARTraining)(model, self.loss)


def take_over(model: STAR, begun: STAR) -> None:
    """Give a model another one's weights; tables of levels and positions keep what they have beyond the other's.

    Where levels modulate the blocks, new levels begin as the other's last one.

    Raises:
        ValueError: other parts than these tables differ in shape.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("tokenizer.")}
    given = begun.state_dict()
    with torch.no_grad():
        for name, value in own.items():
            old = given.get(name)
            if old is None:
                continue
            table = name.rsplit(".", 2)[-2] == "level_embedding" if "." in name else name == "position_embedding"
            if table:
                dim = value.ndim - 2
                rows = min(value.shape[dim], old.shape[dim])
                value.narrow(dim, 0, rows).copy_(old.narrow(dim, 0, rows))
                if model.config.transformer.conditioning == "shared" and dim == 0:
                    value[rows:] = old[-1]
            elif value.shape == old.shape:
                value.copy_(old)
            else:
                raise ValueError(
                    f"{name} has shape {tuple(old.shape)} in the model to start from, expected {tuple(value.shape)}: "
                    "train with its sizes and its tokenizer's codes"
                )
