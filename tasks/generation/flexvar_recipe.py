"""The configuration of FlexVAR's training runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nextscale.core.optim import Schedule
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.tasks.data import Load, tokenizer_of
from nextscale.tasks.generation.class_conditional import ClassConditional
from nextscale.tasks.generation.class_recipe import TokenRecipe
from nextscale.tasks.generation.flexvar import FlexVAR, FlexVARConfig, GuidanceForm
from nextscale.tasks.generation.flexvar_lists import RandomLists
from nextscale.tasks.generation.flexvar_training import FlexVARTraining, initialize
from nextscale.tasks.tokenizers.flex_vq import FlexVQ


@dataclass(frozen=True)
class FlexVARRecipe(TokenRecipe):
    """Train a FlexVAR on images with classes, or on their tokens.

    Attributes:
        tokenizer: folder, official file or name; may be left out with ``init``, whose tokenizer is then kept.
        depth: sets width 64 d, d heads and drop path 0.1 d / 24; the next four replace parts of that.
        lists: how the scales of each step are drawn. Its ``standard`` list is the model's own: for validation, and for
            sampling where none is asked for. Tokens must hold all of its grids, coarse to fine.
        gate: initial size of the gates (the official trainer: 1e-3 for d16 and d20, 1e-4 for d24).
        init: a FlexVAR to start from, a folder or an official file: fine-tuning.
    """

    tokenizer: str | None = None
    depth: int = 16
    width: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    drop_path: float | None = None
    conditioning: Literal["block", "shared"] = "block"
    attention: Literal["cosine", "dot"] = "cosine"
    position_side: int = 32
    lists: RandomLists = field(default_factory=RandomLists)
    guidance: float = 2.5
    guidance_form: GuidanceForm = "var"
    label_smoothing: float = 0.0
    gate: float = 1e-3
    init: str | None = None
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output="runs/flexvar", epochs=180.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is None and self.init is None:
            raise ValueError("a FlexVAR needs a tokenizer: give tokenizer, a folder or an official file")

    def build(self, dataset: Any, load: Load) -> FlexVAR:
        """The model to train: new, or from ``init``."""
        classes, names = self.known_classes(dataset)
        schedule = ScaleSchedule.parse(self.lists.standard)
        if self.init is not None:
            model = load(self.init)
            if not isinstance(model, FlexVAR) or model.config.classes != classes:
                raise ValueError(
                    f"{self.init} is a {type(model).__name__} of {getattr(model.config, 'classes', 'no')} classes; "
                    f"expected a FlexVAR of {classes}"
                )
            if self.tokenizer is not None:
                model = _with_tokenizer(model, _tokenizer(load, self.tokenizer))
            config = model.config
        else:
            assert self.tokenizer is not None
            tokenizer = _tokenizer(load, self.tokenizer)
            quantizer = tokenizer.config.quantizer
            config = FlexVARConfig.of_depth(
                self.depth,
                classes=classes,
                vocabulary=quantizer.vocabulary,
                code_channels=quantizer.channels,
                position_side=self.position_side,
            )
            parts = ("width", "heads", "drop_path")
            sizes = {name: getattr(self, name) for name in parts if getattr(self, name) is not None}
            options = {name: getattr(self, name) for name in ("mlp_ratio", "conditioning", "attention")}
            config = replace(config, transformer=replace(config.transformer, **sizes, **options))
            model = initialize(FlexVAR(replace(config, schedule=schedule), tokenizer), gate=self.gate)
        model.config = replace(
            config,
            schedule=schedule,
            class_names=names or config.class_names,
            label_drop=self.label_drop,
            guidance=self.guidance,
            guidance_form=self.guidance_form,
        )
        return model

    def token_schedule(self, model: ClassConditional) -> ScaleSchedule:
        return self.lists.everything

    def task(self, model: FlexVAR, plan: Schedule, load: Load) -> FlexVARTraining:
        return FlexVARTraining(
            model,
            label_smoothing=self.label_smoothing,
            lists=self.lists,
            seed=self.training.seed,
            held=self.lists.everything,
        )


def _tokenizer(load: Load, source: str) -> FlexVQ:
    tokenizer = tokenizer_of(load(source))
    if not isinstance(tokenizer, FlexVQ):
        raise ValueError(
            f"{source} has a {type(tokenizer).__name__}; FlexVAR needs a tokenizer whose scales stand alone: train one "
            "with `nextscale train flex-tokenizer`"
        )
    return tokenizer


def _with_tokenizer(model: FlexVAR, tokenizer: FlexVQ) -> FlexVAR:
    """The model on another tokenizer of the same codes' sizes."""
    made = FlexVAR(model.config, tokenizer)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("tokenizer.")}
    made.load_state_dict(state, strict=False)
    return made
