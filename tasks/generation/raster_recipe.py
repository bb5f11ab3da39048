"""The configuration of the raster baseline's training runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nextscale.core.optim import Schedule
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.tasks.data import Load, tokenizer_of
from nextscale.tasks.generation.class_conditional import ClassConditional
from nextscale.tasks.generation.class_recipe import TokenRecipe, check_tokens
from nextscale.tasks.generation.raster import Raster, raster_order
from nextscale.tasks.generation.raster_training import RasterTraining
from nextscale.tasks.generation.var import VARConfig
from nextscale.tasks.generation.var_training import initialize


@dataclass(frozen=True)
class RasterRecipe(TokenRecipe):
    """Train a transformer that predicts one grid token by token, on images with classes, or on their tokens.

    Attributes:
        tokenizer: folder, file or name, of one scale.
        depth: sets width 64 d, d heads and drop path 0.1 d / 24; the next three replace parts of that.
        gate: initial size of the gates.
    """

    tokenizer: str | None = None
    depth: int = 16
    width: int | None = None
    heads: int | None = None
    drop_path: float | None = None
    conditioning: Literal["block", "shared"] = "block"
    label_smoothing: float = 0.0
    gate: float = 1e-3
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output="runs/raster"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is None:
            raise ValueError("a raster model needs a tokenizer of one scale: give tokenizer, a folder or a file")

    def build(self, dataset: Any, load: Load) -> Raster:
        """The model to train."""
        assert self.tokenizer is not None
        tokenizer, (classes, names) = tokenizer_of(load(self.tokenizer)), self.known_classes(dataset)
        sizes = {name: getattr(self, name) for name in ("width", "heads", "drop_path")}
        config = VARConfig.of_depth(
            self.depth,
            classes=classes,
            class_names=names,
            vocabulary=tokenizer.config.quantizer.vocabulary,
            code_channels=tokenizer.config.quantizer.channels,
            schedule=raster_order(tokenizer.config.schedule),
            label_drop=self.label_drop,
            guidance=self.guidance,
        )
        changes = {name: size for name, size in sizes.items() if size is not None}
        transformer = replace(config.transformer, conditioning=self.conditioning, **changes)
        model = Raster(replace(config, transformer=transformer), tokenizer)
        initialize(model, gate=self.gate)
        return model

    def check(self, model: ClassConditional, dataset: Any) -> None:
        check_tokens(dataset, model.tokenizer, self.token_schedule(model), self.token_schedule(model))

    def token_schedule(self, model: ClassConditional) -> ScaleSchedule:
        schedule: ScaleSchedule = model.tokenizer.config.schedule
        return schedule

    def task(self, model: Raster, plan: Schedule, load: Load) -> RasterTraining:
        return RasterTraining(model, label_smoothing=self.label_smoothing)
