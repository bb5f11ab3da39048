"""The configuration of VarFormer's training runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from nextscale.core.autoencoder import lay_out_channels_last
from nextscale.core.training import Hooks, Metrics, Trainer, TrainingConfig
from nextscale.datasets.images import collate
from nextscale.datasets.restoration import RestorationDataset
from nextscale.tasks.data import Examples, Load, trainer
from nextscale.tasks.restoration.data import RestorationData
from nextscale.tasks.restoration.varformer import VarFormer, VarFormerConfig
from nextscale.tasks.restoration.varformer_training import VarFormerLossConfig, VarFormerTraining

SHOWN = 8
"""Images on a run's sample sheet."""


@dataclass(frozen=True)
class VarFormerRecipe:
    """Train a VarFormer.

    Attributes:
        stage: 1: the prior learns to give back what it is steered by, without a restoration network, as published on
            clean images (no ``data.degradations``); 2: restoration, from the first stage's model or a bare prior.
        prior: the VAR to build on, which stays as it is but for its embeddings and its head: a name, folder or official
            file. Its null class is what is rolled out.
        init: a VarFormer to start from, of either stage, whose prior and sizes are kept: a name, folder or official
            file.
        without_prior: train the same restoration network with zeros in place of all that the prior gives, to compare.
        model: what VarFormer adds to the prior; of ``init``, sizes that it has already are kept.
    """

    data: RestorationData
    stage: Literal[1, 2] = 2
    prior: str | None = None
    init: str | None = None
    without_prior: bool = False
    model: VarFormerConfig = field(default_factory=VarFormerConfig)
    loss: VarFormerLossConfig = field(default_factory=VarFormerLossConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            output="runs/varformer",
            epochs=100,
            batch_size=64,
            learning_rate=4e-4,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            schedule="constant",
            warmup_epochs=0.0,
            grad_clip=0.0,
            average=0.998,
        )
    )

    def __post_init__(self) -> None:
        if (self.prior is None) == (self.init is None):
            raise ValueError("give either prior, the VAR to build on, or init, a VarFormer to start from")
        if self.without_prior and self.stage == 1:
            raise ValueError("without the prior there is no first stage; give stage 2")

    # --- the model ---------------------------------------------------------------------------------------

    def build(self, load: Load) -> VarFormer:
        """The model to train.

        Raises:
            ValueError: what is given is of another kind, or the crops are not of the model's size.
        """
        second = self.stage == 2
        wanted = replace(self.model, restoration=second, with_prior=not self.without_prior)
        if self.init is None:
            prior = load(self.prior)
            if not hasattr(prior, "word_embedding") or not hasattr(prior.tokenizer, "post_quant_conv"):
                raise ValueError(f"{self.prior} is a {type(prior).__name__}; VarFormer builds on a VAR")
            model = VarFormer(wanted, prior.float())
        else:
            start = load(self.init)
            if not isinstance(start, VarFormer):
                raise ValueError(f"{self.init} is a {type(start).__name__}; give the VAR as prior, or a VarFormer")
            model = _continued(start.float(), wanted)
        if self.data.size != model.side:
            raise ValueError(f"data.size is {self.data.size}, the prior's images have {model.side} pixels a side")
        if self.without_prior:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(("encoder.", "decoder.")))
        lay_out_channels_last(model)
        return model

    def trainer(self, load: Load, hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start; validation is added to ``hooks`` where there are held-out images.

        Args:
            load: reads a model, given its file or folder.
        """
        torch.manual_seed(self.training.seed)
        hooks, dataset = hooks or Hooks(), self.data.open_training(self.training.seed)
        # The pixels of the first stage have no gradient: they are drawn from codes that are chosen.
        loss = self.loss if self.stage == 2 else replace(self.loss, l1=0.0, psnr=0.0, perceptual=0.0)
        task = VarFormerTraining(self.build(load), loss)
        held_out = self.data.open_validation()
        if held_out is not None and hooks.validate is None:
            hooks.validate = lambda step: validate(task, held_out)
        return trainer(self.training, task, dataset, hooks)

    def examples(self, run: Trainer) -> Examples:
        """Degraded crops of held-out images, what becomes of them, and the clean ones."""
        assert isinstance(run.task, VarFormerTraining)
        model, dataset = run.task.model, self.data.open_validation() or self.data.open_training(self.training.seed)
        count = min(len(dataset), SHOWN)
        batch = collate([dataset[i * (len(dataset) // count)] for i in range(count)])
        degraded, clean = ((batch[name] + 1) / 2 for name in ("degraded", "clean"))
        rows = (("degraded", degraded), ("restored", model.restore_squares(degraded)), ("clean", clean))
        return Examples([(name, list(part)) for name, part in rows])

    def finish(self, run: Trainer) -> Path:
        """Write the trained (averaged) model; returns its folder."""
        assert isinstance(run.task, VarFormerTraining)
        with run.averaged():
            return run.task.model.save(Path(self.training.output) / "model")


def _continued(start: VarFormer, wanted: VarFormerConfig) -> VarFormer:
    """A model that goes on from another: as it is, or with the restoration network that it lacks."""
    own = start.config
    kept = replace(own, restoration=wanted.restoration, with_prior=wanted.with_prior)
    if not own.restoration and wanted.restoration:
        # What the first stage has is kept; the rest is new.
        kept = replace(
            wanted,
            steered=own.steered,
            steering_heads=own.steering_heads,
            enhancement=own.enhancement,
            guidance=own.guidance,
            form=own.form,
        )
    if kept == own:
        return start
    model = VarFormer(kept, start.prior)
    shared = {name: value for name, value in start.state_dict().items() if not name.startswith("prior.")}
    if own.restoration and not kept.restoration:
        shared = {name: v for name, v in shared.items() if not name.startswith(("encoder.", "decoder."))}
    missing = [n for n in model.load_state_dict(shared, strict=False).missing_keys if not n.startswith("prior.")]
    assert all(name.startswith(("encoder.", "decoder.")) for name in missing)
    return model


def validate(task: VarFormerTraining, dataset: RestorationDataset, samples: int = 200, batch_size: int = 16) -> Metrics:
    """Means of :meth:`VarFormerTraining.evaluate` over held-out crops."""
    device, totals, limit = task.model.device, dict[str, float](), min(samples, len(dataset))
    for start in range(0, limit, batch_size):
        batch = collate([dataset[i] for i in range(start, min(start + batch_size, limit))])
        count = len(batch["clean"])
        moved = {name: batch[name].to(device) for name in ("degraded", "clean")}
        for name, value in task.evaluate(moved).items():
            totals[name] = totals.get(name, 0.0) + float(value) * count
    return {name: total / limit for name, total in totals.items()}
