"""The configuration of DAR's training runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Hooks, Metrics, Trainer, TrainingConfig
from nextscale.datasets.depth import DepthDataset
from nextscale.evaluation.depth import depth_metrics
from nextscale.evaluation.depth_alignment import align
from nextscale.tasks.data import Examples, Load, trainer
from nextscale.tasks.depth.dar import DAR, PRESETS, DARConfig
from nextscale.tasks.depth.dar_backbones import load_classifier, load_diffusion, load_dinov2
from nextscale.tasks.depth.dar_diffusion import DiffusionEncoder
from nextscale.tasks.depth.dar_encoders import PatchEncoder
from nextscale.tasks.depth.dar_training import VARIANCE_FOCUS, DARTraining
from nextscale.tasks.depth.sets import DepthSet

SHOWN = 8
"""Pairs on a run's sample sheet."""


@dataclass(frozen=True)
class DARRecipe:
    """Train a DAR on pairs of photos and depth.

    The defaults are those of the published code where the training loop has them: AdamW without clipping, 5e-4 at the
    peak for 32 pairs a step, reached in the middle of the run (here along straight lines), 0.06 of it at both ends.

    Attributes:
        preset: sizes and encoder: dar-small, dar-base, dar-large (the paper's) or dar-tiny.
        scales: token grids; None: the preset's.
        depth, width, heads: of the transformer; None: the preset's.
        min_depth, max_depth: metres that the bins reach from and to; None: the preset's.
        spacing: bins of one width, the paper's, or of one ratio (:class:`OrdinalBins`); None: the preset's.
        causal, refined: the paper's mask and its bins; without both, the published code's model.
        backbone: file or folder of a trained DINOv2 or Stable Diffusion, for the presets whose encoder that is.
        classifier: folder of a trained ViT-B/16 classifier, for Stable Diffusion's scene embedding.
        init: a DAR to start from: folder or official file. Its sizes are then its own, but for ``scales``.
        validation_pairs: held-out pairs whose depth is predicted at a validation, at most.
    """

    data: DepthSet
    preset: str = "dar-tiny"
    scales: str | None = None
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    min_depth: float | None = None
    max_depth: float | None = None
    bins: int = 16
    spacing: Literal["uniform", "log"] | None = None
    causal: bool = True
    refined: bool = True
    variance_focus: float = VARIANCE_FOCUS
    backbone: str | None = None
    classifier: str | None = None
    init: str | None = None
    validation_pairs: int = 200
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            output="runs/dar",
            epochs=25,
            batch_size=32,
            learning_rate=4e-3,
            betas=(0.9, 0.999),
            weight_decay=0.1,
            schedule="lin00",
            warmup_epochs=12.5,
            start_rate=0.06,
            end_rate=0.06,
            grad_clip=0.0,
        )
    )

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}; there are {', '.join(PRESETS)}")

    # --- the model ---------------------------------------------------------------------------------------

    def config(self) -> DARConfig:
        """Of a new model."""
        base = PRESETS[self.preset]
        decoder, transformer = base.decoder, base.decoder.transformer
        return replace(
            base,
            decoder=replace(
                decoder,
                transformer=replace(
                    transformer,
                    width=self.width or transformer.width,
                    depth=self.depth or transformer.depth,
                    heads=self.heads or transformer.heads,
                ),
                bins=replace(
                    decoder.bins,
                    min_depth=self.min_depth or decoder.bins.min_depth,
                    max_depth=self.max_depth or decoder.bins.max_depth,
                    count=self.bins,
                    spacing=self.spacing or decoder.bins.spacing,
                    refined=self.refined,
                ),
                schedule=ScaleSchedule.parse(self.scales) if self.scales else decoder.schedule,
                causal=self.causal,
            ),
            image_size=self.data.size,
        )

    def build(self, load: Load) -> DAR:
        """The model to train: new, with a trained backbone where one is given, or ``init``.

        Raises:
            ValueError: a backbone is given for an encoder that has none, or does not fit.
        """
        if self.init is not None:
            start: DAR = load(self.init)
            start.config = replace(start.config, image_size=self.data.size)
            return start.with_scales(self.scales) if self.scales else start
        model = DAR(self.config())
        encoder = model.encoder
        if self.classifier is not None and not isinstance(encoder, DiffusionEncoder):
            raise ValueError(f"{self.preset} has no classifier; leave classifier out, or take dar-large")
        if self.backbone is not None:
            if isinstance(encoder, PatchEncoder):
                load_dinov2(encoder, self.backbone)
            elif isinstance(encoder, DiffusionEncoder):
                load_diffusion(encoder, self.backbone)
            else:
                raise ValueError(f"{self.preset} has convolutions for an encoder; leave backbone out")
        if self.classifier is not None and isinstance(encoder, DiffusionEncoder):
            load_classifier(encoder, self.classifier)
        return model

    # --- the run -----------------------------------------------------------------------------------------

    def trainer(self, load: Load, hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start; validation is added to ``hooks`` where there are held-out pairs.

        Args:
            load: reads a model, given its file or folder.
        """
        torch.manual_seed(self.training.seed)
        dataset, held_out = self.data.open_training(self.training.seed), self.data.open_validation()
        hooks = hooks or Hooks()
        task = DARTraining(self.build(load), variance_focus=self.variance_focus)
        if held_out is not None and hooks.validate is None:
            hooks.validate = lambda step: validate(task.model, held_out, self.validation_pairs)
        return trainer(self.training, task, dataset, hooks)

    def examples(self, run: Trainer) -> Examples:
        """Photos over their true depth and the depth of every scale, on a scale of greys of each photo's own."""
        assert isinstance(run.task, DARTraining)
        model = run.task.model
        pairs = self.data.open_validation() or self.data.open_training(self.training.seed)
        batch = pairs.fetch(range(min(SHOWN, len(pairs))))
        with torch.inference_mode():
            depths = [each.float().cpu() for each in model(batch["image"].to(model.device))]
        farthest = batch["depth"].amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-3)
        grey = [(each / farthest).clamp(0, 1).expand(-1, 3, -1, -1) for each in (batch["depth"], *depths)]
        names = ["depth", *(f"scale {number}" for number in range(1, len(depths) + 1))]
        rows: list[tuple[str, list[Tensor]]] = [("photo", list((batch["image"] + 1) / 2))]
        return Examples([*rows, *((name, list(maps)) for name, maps in zip(names, grey, strict=True))])

    def finish(self, run: Trainer) -> Path:
        """Write the trained (averaged) model; returns its folder."""
        assert isinstance(run.task, DARTraining)
        with run.averaged():
            return run.task.model.save(Path(self.training.output) / "model")


@torch.inference_mode()
def validate(model: DAR, pairs: DepthDataset, limit: int = 200, batch_size: int = 8) -> Metrics:
    """abs_rel, rmse and d1 on held-out pairs in metres, and d1 after the median of each is set right."""
    figures: list[dict[str, float]] = []
    count = min(limit, len(pairs))
    for start in range(0, count, batch_size):
        batch = pairs.fetch(range(start, min(start + batch_size, count)))
        found = model(batch["image"].to(model.device))[-1].float().cpu()
        for depth, valid, predicted in zip(batch["depth"], batch["valid"], found, strict=True):
            if not valid.any():
                continue
            true, given = depth[valid].numpy(), predicted[valid].numpy()
            metrics = depth_metrics(true, given, ("abs_rel", "rmse", "d1"))
            metrics["d1_median"] = depth_metrics(true, align(true, given, "median")(given), ("d1",))["d1"]
            figures.append(metrics)
    names = figures[0] if figures else {}
    return {name: float(np.mean([each[name] for each in figures])) for name in names}
