"""The configurations of CoDe's two fine-tuning runs. Their defaults are the paper's."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextscale.core.optim import Schedule
from nextscale.core.training import Trainer, TrainingConfig
from nextscale.tasks.data import Examples, Load
from nextscale.tasks.generation.class_recipe import class_examples
from nextscale.tasks.generation.code import CoDe
from nextscale.tasks.generation.code_training import DrafterTraining, RefinerTraining
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.generation.var_recipe import VARRecipe


@dataclass(frozen=True)
class DrafterRecipe(VARRecipe):
    """Train a VAR on its first scales only, so that it drafts for a smaller one.

    Attributes:
        draft_scales: how many scales it will draw.
    """

    draft_scales: int = 8
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            output="runs/code-drafter", epochs=17.5, batch_size=1024, learning_rate=1e-6, weight_decay=0.08
        )
    )

    def task(self, model: VAR, plan: Schedule, load: Load) -> DrafterTraining:
        scales = len(model.config.schedule)
        if not 1 <= self.draft_scales < scales:
            raise ValueError(
                f"draft_scales is {self.draft_scales}; of {scales} scales 1 to {scales - 1} can be drafted"
            )
        return DrafterTraining(model, self.draft_scales, **self._options(plan))


@dataclass(frozen=True)
class RefinerRecipe(VARRecipe):
    """Train a VAR to draw the fine scales as a larger one does, anew or from ``init``.

    Attributes:
        teacher: the larger VAR, on the same tokens; its tokenizer is taken where none is named.
        draft_scales: how many scales another model will draw before it; they count less and less.
        temperature: both models' logits are divided by it where they are compared.
        alpha: share of the divergence from the teacher in the loss, the rest being the usual cross-entropy; None: the
            divergence alone.
    """

    teacher: str | None = None
    draft_scales: int = 8
    temperature: float = 1.0
    alpha: float | None = None
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            output="runs/code-refiner", epochs=50, batch_size=1024, learning_rate=1e-5, weight_decay=0.0
        )
    )

    def __post_init__(self) -> None:
        if self.teacher is None:
            raise ValueError(
                "a refiner learns from a larger model: give teacher, a VAR's name, folder or official file"
            )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; expected a share from 0 to 1")
        if self.label_smoothing and self.alpha is None:
            raise ValueError("label_smoothing is of the cross-entropy, which has no share in the loss: give alpha")
        if self.tokenizer is None and self.init is None:
            object.__setattr__(self, "tokenizer", self.teacher)
        super().__post_init__()

    def task(self, model: VAR, plan: Schedule, load: Load) -> RefinerTraining:
        return RefinerTraining(
            CoDe([load(self.teacher), model], [self.draft_scales]),
            temperature=self.temperature,
            alpha=self.alpha,
            compiled=self.training.compile,
            **self._options(plan),
        )

    def examples(self, run: Trainer) -> Examples:
        """Pictures that the teacher drafts and the model refines."""
        assert isinstance(run.task, RefinerTraining)
        return class_examples(run.task.pair)
