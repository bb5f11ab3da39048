"""The configuration of VAR's training and fine-tuning runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nextscale.core.optim import Schedule
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.core.transformer import TransformerConfig
from nextscale.tasks.data import Load, tokenizer_of
from nextscale.tasks.generation.class_recipe import TokenRecipe
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.generation.var_finetune import LoRAConfig, adapt, add_lora, merge_lora
from nextscale.tasks.generation.var_training import ProgressiveConfig, VARTraining, initialize


@dataclass(frozen=True)
class VARRecipe(TokenRecipe):
    """Train a VAR on images with classes, or on their tokens.

    Attributes:
        tokenizer: folder or official file; may be left out with ``init``, whose tokenizer is then kept.
        depth: sets width 64 d, d heads and drop path 0.1 d / 24; the next four replace parts of that.
        scales: None: the tokenizer's list.
        gate: initial size of the gates (the official trainer: 1e-3 for d16 and d20, 1e-4 for d24, 1e-5 for d30).
        init: a VAR to start from, a folder or an official file: fine-tuning.
        lora: low-rank adapters instead of training all weights; with ``init``.
    """

    tokenizer: str | None = None
    depth: int = 16
    width: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    drop_path: float | None = None
    conditioning: Literal["block", "shared"] = "block"
    attention: Literal["cosine", "dot"] = "cosine"
    scales: str | None = None
    label_smoothing: float = 0.0
    gate: float = 1e-3
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    init: str | None = None
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output="runs/var"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is None and self.init is None:
            raise ValueError("a VAR needs a tokenizer: give tokenizer, a folder or an official file")
        if self.lora.rank and self.init is None:
            raise ValueError("LoRA adapts a trained model: give init, the VAR to start from")

    def build(self, dataset: Any, load: Load) -> VAR:
        """The model to train: new, or adapted from ``init``."""
        tokenizer = tokenizer_of(load(self.tokenizer)) if self.tokenizer else None
        classes, names = self.known_classes(dataset)
        if self.init is not None:
            start = load(self.init, tokenizer)
            schedule = ScaleSchedule.parse(self.scales) if self.scales else start.config.schedule
            if names is None and classes == start.config.classes:
                names = start.config.class_names
            model, changed = adapt(
                start, classes=classes, class_names=names, schedule=schedule, tokenizer=tokenizer or start.tokenizer
            )
            model.config = replace(model.config, label_drop=self.label_drop, guidance=self.guidance)
            return add_lora(model, self.lora, changed) if self.lora.rank else model
        assert tokenizer is not None
        quantizer = tokenizer.config.quantizer
        config = VARConfig(
            self._transformer(),
            classes=classes,
            class_names=names,
            vocabulary=quantizer.vocabulary,
            code_channels=quantizer.channels,
            schedule=ScaleSchedule.parse(self.scales) if self.scales else tokenizer.config.schedule,
            label_drop=self.label_drop,
            guidance=self.guidance,
        )
        return initialize(VAR(config, tokenizer), gate=self.gate)

    def _transformer(self) -> TransformerConfig:
        base = VARConfig.of_depth(self.depth).transformer
        return replace(
            base,
            width=self.width or base.width,
            heads=self.heads or base.heads,
            mlp_ratio=self.mlp_ratio,
            drop_path=base.drop_path if self.drop_path is None else self.drop_path,
            conditioning=self.conditioning,
            attention=self.attention,
        )

    def task(self, model: VAR, plan: Schedule, load: Load) -> VARTraining:
        return VARTraining(model, **self._options(plan))

    def _options(self, plan: Schedule) -> dict[str, Any]:
        """What all tasks that train a VAR are told."""
        return {
            "label_smoothing": self.label_smoothing,
            "progressive": self.progressive,
            "warmup": round(plan.warmup),
            "total": plan.total,
        }

    def finished(self, model: VAR) -> VAR:
        return merge_lora(model) if self.lora.rank else model
