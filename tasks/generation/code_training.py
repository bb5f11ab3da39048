"""Fine-tuning for CoDe: the drafter on its own scales, the refiner towards a larger model.

Chen et al. 2024 (arXiv 2411.17787), section on training-phase optimisation; the official code has the losses only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextscale.core.training import Batch, Metrics
from nextscale.tasks.generation.code import CoDe
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.generation.var_training import Stage, VARTraining, next_scale_loss


def distillation(
    student: Float[Tensor, "rows vocabulary"],
    teacher: Float[Tensor, "rows vocabulary"],
    targets: Int[Tensor, " rows"] | None = None,
    *,
    temperature: float = 1.0,
    alpha: float | None = None,
    label_smoothing: float = 0.0,
    per_row: bool = False,
) -> Tensor:
    """T² KL(softmax(teacher / T) || softmax(student / T)) of logits (Hinton et al. 2015).

    Args:
        targets: true symbols, for ``alpha``.
        temperature: T; the factor T² keeps the gradient's size.
        alpha: share of the divergence, the rest being the cross-entropy with ``targets`` (at temperature 1); None:
            the divergence alone.
        label_smoothing: of the cross-entropy.
        per_row: one value per row instead of their mean.

    Raises:
        ValueError: the temperature is not above 0, or ``alpha`` is given without ``targets``.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; expected more than 0")
    taught = F.softmax(teacher / temperature, dim=-1)
    rows = F.kl_div(F.log_softmax(student / temperature, dim=-1), taught, reduction="none").sum(-1) * temperature**2
    if alpha is not None:
        if targets is None:
            raise ValueError(f"alpha is {alpha}: the cross-entropy beside the divergence needs targets")
        truth = F.cross_entropy(student, targets, reduction="none", label_smoothing=label_smoothing)
        rows = alpha * rows + (1 - alpha) * truth
    return rows if per_row else rows.mean()


class DrafterTraining(VARTraining):
    """Trains a VAR on its first scales only; the others neither run nor count.

    Args:
        draft_scales: how many scales the drafter will draw.
    """

    name = "code-drafter"

    def __init__(self, model: VAR, draft_scales: int, **options: Any) -> None:
        super().__init__(model, **options)
        self.draft_scales, self.phases = draft_scales, {self.name: model}

    def stage(self, step: int) -> Stage:
        return self._drafted(super().stage(step))

    def _drafted(self, stage: Stage) -> Stage:
        return stage if stage.scales <= self.draft_scales else Stage(self.draft_scales, 1.0)

    def _loss(self, module: nn.Module, batch: Batch, stage: Stage) -> tuple[Tensor, Metrics]:
        return super()._loss(module, batch, self._drafted(stage))


class RefinerTraining(VARTraining):
    """Trains a VAR towards the distributions of a larger one.

    Per token the loss is :func:`distillation`, weighted by its scale: scales k >= N (counted from 0), which the refiner
    will draw, weigh 1; the drafted scales k < N weigh lambda, which falls linearly from 1 at the first step to 0 at the
    last. Summed over tokens and divided by the number of tokens of all scales; mean over the batch.

    Args:
        pair: the teacher and the model to train, with N as their hand-over.
        temperature, alpha: see :func:`distillation`.
        compiled: run the teacher through PyTorch's compiler.
        total: steps of the run.
    """

    name = "code-refiner"

    def __init__(
        self,
        pair: CoDe,
        *,
        temperature: float = 1.0,
        alpha: float | None = None,
        compiled: bool = False,
        total: int = 1,
        **options: Any,
    ) -> None:
        teacher, model = pair.models
        super().__init__(model, total=total, **options)
        self.pair, self.phases = pair, {self.name: model}
        self.draft_scales = pair.config.handovers[0]
        self.temperature, self.alpha, self.total = temperature, alpha, total
        teacher.requires_grad_(False).eval()
        self._teacher = torch.compile(teacher) if compiled else teacher

    def drafted_weight(self, step: int) -> float:
        """Lambda: how much the drafted scales count at a step."""
        return 1 - min(step / max(self.total - 1, 1), 1.0)

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        weight, stage = self.drafted_weight(step), self.stage(step)
        loss, metrics, _, _ = self._distilled(module, batch, stage, weight)
        return loss, {**metrics, "drafted_weight": weight}

    def evaluate(self, batch: Batch) -> Metrics:
        """All scales at full weight, and the cross-entropy with the true tokens."""
        schedule = self.model.config.schedule
        loss, metrics, logits, tokens = self._distilled(self.model, batch, Stage(len(schedule), 1.0), 1.0)
        return {"loss": loss, **metrics, **next_scale_loss(logits, tokens, schedule, schedule.length)[1]}

    def _distilled(
        self, module: nn.Module, batch: Batch, stage: Stage, drafted_weight: float
    ) -> tuple[Tensor, Metrics, Tensor, Tensor]:
        """Loss, what to log, logits and tokens."""
        full = self.model.config.schedule
        schedule = full.prefix(stage.scales)
        tokens, inputs, labels = self.teacher_forced(batch, stage.scales)
        logits = module(inputs, labels, schedule)
        self.pair.models[0].to(inputs.device)
        with torch.no_grad():
            taught = self._teacher(inputs, labels, schedule)
        rows = distillation(
            logits.flatten(0, 1),
            taught.flatten(0, 1),
            tokens.flatten(),
            temperature=self.temperature,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            per_row=True,
        ).view(tokens.shape)
        weights = torch.full((schedule.length,), 1 / full.length, device=rows.device)
        weights[: full.ranges[self.draft_scales][0]] *= drafted_weight
        weights[schedule.ranges[-1][0] :] *= stage.newest_weight
        refined = rows.detach()[:, full.ranges[self.draft_scales][0] :]
        metrics: Metrics = {"divergence": rows.detach().mean(), "divergence_refined": refined.mean()}
        return (rows * weights).sum(1).mean(), metrics, logits, tokens
