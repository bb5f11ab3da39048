"""The configuration of VAR's training and fine-tuning runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Hooks, Metrics, Trainer, TrainingConfig
from nextscale.core.transformer import TransformerConfig
from nextscale.datasets.tokens import TokenDataset, open_tokens
from nextscale.tasks.data import ImageData, trainer
from nextscale.tasks.generation.var import VAR, VARConfig
from nextscale.tasks.generation.var_finetune import LoRAConfig, adapt, add_lora, merge_lora
from nextscale.tasks.generation.var_training import ProgressiveConfig, VARTraining, initialize
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ
from nextscale.tasks.tokenizers.tokenize import fingerprint


@dataclass(frozen=True)
class VARRecipe:
    """Train a VAR on images with classes, or on their tokens.

    Attributes:
        tokenizer: folder or official file; may be left out with ``init``, whose tokenizer is then kept.
        data: images, encoded on the fly; or
        tokens: a folder that ``nextscale tokenize`` has written (with ``validation_tokens`` for held-out ones).
        depth: sets width 64 d, d heads and drop path 0.1 d / 24; the next four replace parts of that.
        scales: None: the tokenizer's list.
        guidance: strength the finished model samples with where none is asked for.
        classes: None: as many as the data has.
        class_names: None: those of the data, if it names its classes.
        gate: initial size of the gates (the official trainer: 1e-3 for d16 and d20, 1e-4 for d24, 1e-5 for d30).
        init: a VAR to start from, a folder or an official file: fine-tuning.
        lora: low-rank adapters instead of training all weights; with ``init``.
    """

    tokenizer: str | None = None
    data: ImageData | None = None
    tokens: str | None = None
    validation_tokens: str | None = None
    depth: int = 16
    width: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    drop_path: float | None = None
    conditioning: Literal["block", "shared"] = "block"
    attention: Literal["cosine", "dot"] = "cosine"
    scales: str | None = None
    classes: int | None = None
    class_names: list[str] | None = None
    label_drop: float = 0.1
    guidance: float = 1.5
    label_smoothing: float = 0.0
    gate: float = 1e-3
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    init: str | None = None
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output="runs/var"))

    def __post_init__(self) -> None:
        if (self.data is None) == (self.tokens is None):
            raise ValueError("give either data (images) or tokens (a folder of token shards), not both or neither")
        if self.tokenizer is None and self.init is None:
            raise ValueError("a VAR needs a tokenizer: give tokenizer, a folder or an official file")
        if self.lora.rank and self.init is None:
            raise ValueError("LoRA adapts a trained model: give init, the VAR to start from")

    def open(self) -> Any:
        """The training data.

        Raises:
            ValueError: it has no classes.
        """
        if self.data is not None:
            return self.data.open_training(self.training.seed, labels=True).require_labels()
        assert self.tokens is not None
        return open_tokens(self.tokens, seed=self.training.seed).require_labels()

    def build(self, dataset: Any, load: Callable[[str, ResidualVQ | None], VAR]) -> VAR:
        """The model to train: new, or adapted from ``init``.

        Args:
            dataset: from :meth:`open`.
            load: reads ``init``, given the tokenizer to use (None: the model's own).

        Raises:
            ValueError: tokens, images, scales and tokenizer do not belong together.
        """
        torch.manual_seed(self.training.seed)
        tokenizer = ResidualVQ.load(self.tokenizer) if self.tokenizer else None
        classes = self.classes or dataset.num_classes
        names = tuple(self.class_names) if self.class_names else dataset.classes
        if names is not None and len(names) != classes:
            if self.class_names:
                raise ValueError(f"{len(names)} class names were given for {classes} classes")
            names = None
        if int(dataset.labels.max()) >= classes:
            raise ValueError(f"the data has classes up to {int(dataset.labels.max())}, the model {classes}")
        if self.init is not None:
            start = load(self.init, tokenizer)
            schedule = ScaleSchedule.parse(self.scales) if self.scales else start.config.schedule
            if names is None and classes == start.config.classes:
                names = start.config.class_names
            model, changed = adapt(
                start, classes=classes, class_names=names, schedule=schedule, tokenizer=tokenizer or start.tokenizer
            )
            model.config = replace(model.config, label_drop=self.label_drop, guidance=self.guidance)
            if self.lora.rank:
                model = add_lora(model, self.lora, changed)
        else:
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
            model = initialize(VAR(config, tokenizer), gate=self.gate)
        self._check(model, dataset)
        return model

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

    def _check(self, model: VAR, dataset: Any) -> None:
        schedule, tokenizer = model.config.schedule, model.tokenizer
        if isinstance(dataset, TokenDataset):
            made_with, own = dataset.metadata.get("tokenizer"), fingerprint(tokenizer)
            if dataset.metadata.get("schedule") != str(schedule) or made_with != own:
                raise ValueError(
                    f"the tokens in {dataset.folder} were made with scales '{dataset.metadata.get('schedule')}' and "
                    f"tokenizer {made_with}, the model has '{schedule}' and {own}: make them again"
                )
        elif tokenizer.image_size(schedule) != (dataset.size, dataset.size):
            raise ValueError(
                f"the scales '{schedule}' with stride {tokenizer.stride} stand for images of "
                f"{tokenizer.image_size(schedule)[0]} pixels, data.size is {dataset.size}"
            )

    def trainer(self, load: Callable[[str, ResidualVQ | None], VAR], hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start; validation is added to ``hooks`` where there is held-out data."""
        dataset, hooks = self.open(), hooks or Hooks()
        model = self.build(dataset, load)
        steps = len(dataset) / self.training.batch_size
        plan = self.training.plan(steps)
        task = VARTraining(
            model,
            label_smoothing=self.label_smoothing,
            progressive=self.progressive,
            warmup=round(plan.warmup),
            total=plan.total,
        )
        held_out = self._held_out()
        if held_out is not None:
            self._check(model, held_out)
            if None not in (held_out.classes, dataset.classes) and held_out.classes != dataset.classes:
                raise ValueError(
                    f"the held-out data has the classes {', '.join(held_out.classes[:5])} …, the training data "
                    f"{', '.join(dataset.classes[:5])} …: numbers would stand for other classes; give both the same"
                )
        if held_out is not None and hooks.validate is None:
            hooks.validate = lambda step: validate(task, held_out)
        return trainer(self.training, task, dataset, hooks)

    def _held_out(self) -> Any:
        if self.validation_tokens is not None:
            return open_tokens(self.validation_tokens, views=[0])
        return self.data.open_validation(labels=True) if self.data is not None else None

    def finish(self, run: Trainer) -> Path:
        """Write the trained (averaged) model; returns its folder."""
        assert isinstance(run.task, VARTraining)
        with run.averaged():
            model = merge_lora(run.task.model) if self.lora.rank else run.task.model
            return model.save(Path(self.training.output) / "model")


@torch.no_grad()
def validate(task: VARTraining, dataset: Any, samples: int = 10_000, batch_size: int = 100) -> Metrics:
    """Loss and accuracy on held-out data, all scales, no label dropped."""
    model, count = task.model, 0
    totals: dict[str, float] = {}
    limit = min(samples, len(dataset))
    full = task.progressive
    task.progressive = ProgressiveConfig()
    try:
        for start in range(0, limit, batch_size):
            batch = dataset.fetch(range(start, min(start + batch_size, limit)))
            batch = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            batch["uniform"] = torch.ones(len(batch["label"]), device=model.device)
            loss, metrics = task.loss(task.name, model, batch, 0)
            for name, value in {"loss": loss, **metrics}.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(batch["label"])
            count += len(batch["label"])
    finally:
        task.progressive = full
    return {name: total / count for name, total in totals.items()}
