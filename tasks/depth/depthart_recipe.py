"""The configuration of DepthART's training runs, and of a tokenizer of photos and depth for small models."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nextscale.core.random import ImageDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Hooks, Metrics, Trainer, TrainingConfig
from nextscale.core.transformer import TransformerConfig
from nextscale.datasets.depth import DepthDataset
from nextscale.evaluation.depth import depth_metrics
from nextscale.evaluation.depth_alignment import align
from nextscale.tasks.data import Examples, Load, tokenizer_of, trainer
from nextscale.tasks.depth.depthart import DepthART, DepthARTConfig
from nextscale.tasks.depth.depthart_data import DepthPictures
from nextscale.tasks.depth.depthart_normalizer import DepthNormalizer
from nextscale.tasks.depth.depthart_sampling import Pick
from nextscale.tasks.depth.depthart_training import DepthARTLoss, DepthARTTraining
from nextscale.tasks.depth.sets import DepthSet
from nextscale.tasks.generation.var_training import initialize
from nextscale.tasks.tokenizers.recipe import TokenizerRecipe

SHOWN = 8
"""Pairs on a run's sample sheet."""


@dataclass(frozen=True)
class DepthTokenizerRecipe(TokenizerRecipe):
    """Train a tokenizer on photos and on their depth maps as grey pictures, half and half."""

    data: DepthPictures  # type: ignore[assignment]
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output="runs/depth-tokenizer", epochs=20))

    @property
    def image_size(self) -> tuple[int, int]:
        return self.data.size


@dataclass(frozen=True)
class DepthARTRecipe:
    """Train a DepthART, or its baseline, on pairs of photos and depth.

    The defaults are the published ones where the training loop has them: AdamW at 1e-4 for 16 pairs a step.

    Attributes:
        tokenizer: folder, official file or name; may be left out with ``init``, whose tokenizer is then kept.
        objective: ``refined``: on the model's own predictions, DepthART; ``plain``: next-scale prediction by teacher
            forcing, DepthVAR.
        depth: sets width 64 d and d heads; the next two replace them.
        attention: the release's ``dot``; ``cosine`` fits a VAR to start from better.
        scales: None: the tokenizer's list.
        gate: initial size of the gates of a new model.
        init: a VAR to start from, as published, or a DepthART: name, folder or official file. Sizes are then its own.
        samples, pick, top_k, top_p: how the finished model predicts where nothing else is asked for.
        validation_pairs: held-out pairs whose depth is predicted at a validation, at most.
    """

    data: DepthSet
    tokenizer: str | None = None
    objective: Literal["refined", "plain"] = "refined"
    depth: int = 16
    width: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    drop_path: float = 1 / 15
    conditioning: Literal["block", "shared"] = "block"
    attention: Literal["cosine", "dot"] = "dot"
    scales: str | None = None
    normalizer: DepthNormalizer = field(default_factory=DepthNormalizer)
    loss: DepthARTLoss = field(default_factory=DepthARTLoss)
    gate: float = 1e-3
    init: str | None = None
    samples: int = 5
    pick: Pick = "drawn"
    top_k: int = 900
    top_p: float = 0.9
    validation_pairs: int = 200
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            output="runs/depthart",
            epochs=30,
            batch_size=16,
            learning_rate=1.6e-3,
            betas=(0.9, 0.999),
            weight_decay=0.01,
            schedule="exp",
            grad_clip=0.0,
        )
    )

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.init is None:
            raise ValueError("a DepthART needs a tokenizer: give tokenizer, a folder, an official file or a name")

    # --- the model ---------------------------------------------------------------------------------------

    def build(self, load: Load) -> DepthART:
        """The model to train: new, or with the weights of ``init``.

        Raises:
            ValueError: the scales do not end at the pictures' size, or ``init`` does not fit.
        """
        start = load(self.init) if self.init is not None else None
        tokenizer = tokenizer_of(load(self.tokenizer) if self.tokenizer is not None else start)
        codes = tokenizer.config.quantizer
        schedule = ScaleSchedule.parse(self.scales) if self.scales else tokenizer.config.schedule
        if tokenizer.image_size(schedule) != self.data.size:
            tall, wide = tokenizer.image_size(schedule)
            raise ValueError(
                f"the scales '{schedule}' with stride {tokenizer.stride} stand for pictures of {tall} x {wide} pixels, "
                f"the data has {self.data.height} x {self.data.width}: set data.height and data.width, or scales"
            )
        config = DepthARTConfig(
            self._transformer() if start is None else self._adopted(start.config.transformer),
            training=self.objective,
            classes=0 if start is None else start.config.classes,
            vocabulary=codes.vocabulary,
            code_channels=codes.channels,
            schedule=schedule,
            normalizer=self.normalizer,
            **{name: getattr(self, name) for name in ("samples", "pick", "top_k", "top_p")},
        )
        model: Any = DepthART(config, tokenizer)
        initialize(model, gate=self.gate)
        if start is not None:
            adopt(model, start)
        return model

    def _transformer(self) -> TransformerConfig:
        base = DepthARTConfig.of_depth(self.depth).transformer
        return replace(
            base,
            width=self.width or base.width,
            heads=self.heads or base.heads,
            mlp_ratio=self.mlp_ratio,
            drop_path=self.drop_path,
            conditioning=self.conditioning,
            attention=self.attention,
        )

    def _adopted(self, transformer: TransformerConfig) -> TransformerConfig:
        """Sizes of a model to start from; attention and drop path of this recipe."""
        return replace(transformer, attention=self.attention, drop_path=self.drop_path)

    # --- the run -----------------------------------------------------------------------------------------

    def trainer(self, load: Load, hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start; validation is added to ``hooks`` where there are held-out pairs.

        Args:
            load: reads a model, given its file or folder.
        """
        torch.manual_seed(self.training.seed)
        dataset, held_out, hooks = (
            self.data.open_training(self.training.seed),
            self.data.open_validation(),
            hooks or Hooks(),
        )
        task = DepthARTTraining(self.build(load), self.loss)
        if held_out is not None and hooks.validate is None:
            hooks.validate = lambda step: validate(task.model, held_out, self.validation_pairs)
        return trainer(self.training, task, dataset, hooks)

    def examples(self, run: Trainer) -> Examples:
        """Photos over their true depth and what the model makes of them, from the same seeds each time."""
        assert isinstance(run.task, DepthARTTraining)
        model = run.task.model
        pairs = self.data.open_validation() or self.data.open_training(self.training.seed)
        batch = pairs.fetch(range(min(SHOWN, len(pairs))))
        true = (model.config.normalizer.target(batch["depth"], batch["valid"]) + 1) / 2
        found = predict(model, batch["image"]).expand(-1, 3, -1, -1)
        rows = [("photo", (batch["image"] + 1) / 2), ("depth", true.expand(-1, 3, -1, -1)), ("predicted", found)]
        return Examples([(name, list(part)) for name, part in rows])

    def finish(self, run: Trainer) -> Path:
        """Write the trained (averaged) model; returns its folder."""
        assert isinstance(run.task, DepthARTTraining)
        with run.averaged():
            return run.task.model.save(Path(self.training.output) / "model")


@torch.no_grad()
def adopt(model: DepthART, start: Any) -> DepthART:
    """Give a model the weights of another of VAR's family, as the official code does: all that have the same place.

    Raises:
        ValueError: one of them has another size.
    """
    own = model.state_dict()
    found = {n: v for n, v in start.state_dict().items() if n in own and not n.startswith("tokenizer.")}
    if wrong := [name for name, value in found.items() if value.shape != own[name].shape]:
        name = wrong[0]
        raise ValueError(
            f"{name} has the shape {tuple(found[name].shape)} in init, {tuple(own[name].shape)} here: give init's own "
            "scales and tokenizer"
        )
    model.load_state_dict(found, strict=False)
    return model


@torch.inference_mode()
def predict(model: DepthART, images: Tensor) -> Tensor:
    """Relative depth (n, 1, height, width) in [0, 1], on the CPU, of photos in [-1, 1] at the network's size."""
    draws = ImageDraws(range(len(images)))
    photos = (images.to(model.device) + 1) / 2
    return model.infer(photos, model.published_samples, draws, lambda done, total: None).cpu()


def validate(model: DepthART, pairs: DepthDataset, limit: int = 200, batch_size: int = 20) -> Metrics:
    """abs_rel and the share d1 of good pixels on held-out pairs, after the median of each is set right."""
    figures: list[dict[str, float]] = []
    count = min(limit, len(pairs))
    for start in range(0, count, batch_size):
        batch = pairs.fetch(range(start, min(start + batch_size, count)))
        found = predict(model, batch["image"])
        for depth, valid, predicted in zip(batch["depth"], batch["valid"], found, strict=True):
            known = valid.numpy()
            true, given = depth.numpy()[known], predicted.numpy()[known].clip(1e-3)
            figures.append(depth_metrics(true, align(true, given, "median")(given), ("abs_rel", "d1")))
    return {name: float(np.mean([each[name] for each in figures])) for name in ("abs_rel", "d1")}
