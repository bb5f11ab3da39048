"""Training a describer: the projector first, then the language model too, or adapters on it.

SAR3D (Chen et al. 2024, arXiv 2411.16856): stage 1 trains the projector, learning rate 2e-3; stage 2 all but the
tokenizer, 2e-5; three epochs each, a warm-up of 3 %, then cosine.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nextscale.core.training import Batch, Metrics, TrainingTask
from nextscale.tasks.generation.vargpt_language import train_plainly
from nextscale.tasks.shapes.describing import SYSTEM, Describer
from nextscale.tasks.shapes.describing_data import IGNORED, DescriptionSet

Stage = Literal["projector", "all"]


class DescriberTraining(TrainingTask):
    """Trains a :class:`nextscale.tasks.shapes.describing.Describer`.

    A batch holds ``ids`` and ``mask`` (batch, length), ``labels``, :data:`IGNORED` where nothing counts, and ``tokens``
    of the shapes.

    Args:
        stage: ``"projector"``: nothing else learns; ``"all"``: all but the tokenizer.
    """

    name = SYSTEM

    def __init__(self, model: Describer, stage: Stage = "all") -> None:
        if stage not in ("projector", "all"):
            raise ValueError(f"stage is {stage!r}; expected projector or all")
        self.model = model
        model.language.requires_grad_(stage == "all")
        model.projector.requires_grad_(True)
        train_plainly(model.language.text, model.device)
        self.phases: dict[str, nn.Module] = {SYSTEM: model}

    def loss(self, phase: str, module: nn.Module, batch: Batch, step: int) -> tuple[Float[Tensor, ""], Metrics]:
        logits = module(batch["ids"], batch["mask"], self.model.codes(batch["tokens"]))
        wanted = batch["labels"][:, 1:]
        counts = wanted != IGNORED
        scores, right = logits[:, :-1][counts].float(), wanted[counts]
        loss = F.cross_entropy(scores, right)
        return loss, {"accuracy": 100 * (scores.argmax(-1) == right).float().mean().detach()}

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Metrics:
        """Loss and share of right words of a batch."""
        loss, metrics = self.loss(SYSTEM, self.model, batch, 0)
        return {"loss": loss, **metrics}


def measure(task: DescriberTraining, dataset: DescriptionSet, samples: int = 500, batch_size: int = 16) -> Metrics:
    """Means of :meth:`DescriberTraining.evaluate` over held-out conversations."""
    limit, totals = min(samples, len(dataset)), dict[str, float]()
    for start in range(0, limit, batch_size):
        numbers = range(start, min(start + batch_size, limit))
        batch: dict[str, Any] = {name: v.to(task.model.device) for name, v in dataset.fetch(numbers).items()}
        for name, value in task.evaluate(batch).items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(numbers)
    return {name: total / limit for name, total in totals.items()}
