"""What the training recipes of class-conditional generators share: data, classes, held-out figures, sample pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nextscale.core.optim import Schedule
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Batch, Hooks, Metrics, Trainer, TrainingConfig, TrainingTask
from nextscale.datasets.streaming import StreamedImages
from nextscale.datasets.tokens import TokenDataset, open_tokens
from nextscale.tasks.data import Examples, ImageData, Load, trainer
from nextscale.tasks.generation.class_conditional import ClassConditional
from nextscale.tasks.generation.drawing import class_name
from nextscale.tasks.tokenizers.tokenize import fingerprint

SHOWN_CLASSES = 10
"""Classes on a run's sample sheet, at most; two pictures each."""


class ClassTraining(TrainingTask):
    """Trains a :class:`ClassConditional` generator.

    Attributes:
        model: what is trained; the modules in ``phases`` belong to it.
    """

    model: Any

    def evaluate(self, batch: Batch) -> Metrics:
        """Loss and accuracy of the finished objective on a batch in which no label is dropped."""
        loss, metrics = self.loss(self.name, self.model, batch, 0)
        return {"loss": loss, **metrics}


@dataclass(frozen=True)
class ClassRecipe:
    """Train on images with classes.

    Attributes:
        data: the images, encoded on the fly.
        classes: None: as many as the data has; 1: all images are of one, and need no labels.
        class_names: None: those of the data, if it names its classes.
        label_drop: share of labels replaced by "no class".
        guidance: strength the finished model samples with where none is asked for.
    """

    data: ImageData | None = None
    classes: int | None = None
    class_names: list[str] | None = None
    label_drop: float = 0.1
    guidance: float = 1.5
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.data is None:
            raise ValueError("there is nothing to train on: give data (images)")

    # --- what a system says ------------------------------------------------------------------------------

    def build(self, dataset: Any, load: Load) -> ClassConditional:
        """The model to train."""
        raise NotImplementedError

    def task(self, model: Any, plan: Schedule, load: Load) -> ClassTraining:
        """How it is trained.

        Args:
            plan: the run's steps and schedule.
        """
        raise NotImplementedError

    def finished(self, model: Any) -> Any:
        """The model to save, of the trained one."""
        return model

    # --- data --------------------------------------------------------------------------------------------

    def open(self) -> Any:
        """The training data.

        Raises:
            ValueError: it has no classes.
        """
        assert self.data is not None
        dataset = self.data.training_images(self.training.seed, labels=self.classes != 1)
        if isinstance(dataset, StreamedImages) and self.classes != 1:
            dataset.name_classes(self.classes, self.class_names)
        return dataset.as_one_class() if self.classes == 1 else dataset.require_labels()

    def held_out(self) -> Any:
        """Data to validate on, or None."""
        dataset = self.data.open_validation(labels=self.classes != 1) if self.data is not None else None
        return dataset.as_one_class() if dataset is not None and self.classes == 1 else dataset

    def known_classes(self, dataset: Any) -> tuple[int, tuple[str, ...] | None]:
        """How many classes the model is to know, and their names.

        Raises:
            ValueError: there are more classes in the data, or another number of names.
        """
        classes = self.classes or dataset.num_classes
        names = tuple(self.class_names) if self.class_names else dataset.classes
        if names is not None and len(names) != classes:
            if self.class_names:
                raise ValueError(f"{len(names)} class names were given for {classes} classes")
            names = None
        # Of streamed images the labels are not known; each is checked as it is read.
        if dataset.labels is not None and int(dataset.labels.max()) >= classes:
            raise ValueError(f"the data has classes up to {int(dataset.labels.max())}, the model {classes}")
        return classes, names

    def check(self, model: ClassConditional, dataset: Any) -> None:
        """Raises:

        ValueError: images or tokens are not what the model's tokenizer makes and draws.
        """
        check_tokens(dataset, model.tokenizer, self.token_schedule(model), model.config.schedule)

    def token_schedule(self, model: ClassConditional) -> ScaleSchedule:
        """The scales that token shards must hold."""
        schedule: ScaleSchedule = model.config.schedule
        return schedule

    # --- the run -----------------------------------------------------------------------------------------

    def trainer(self, load: Load, hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start; validation is added to ``hooks`` where there is held-out data.

        Args:
            load: reads a model, given its file or folder.
        """
        torch.manual_seed(self.training.seed)
        dataset, hooks = self.open(), hooks or Hooks()
        model = self.build(dataset, load)
        self.check(model, dataset)
        task = self.task(model, self.training.plan(len(dataset) / self.training.batch_size), load)
        held_out = self.held_out()
        if held_out is not None:
            self.check(model, held_out)
            if None not in (held_out.classes, dataset.classes) and held_out.classes != dataset.classes:
                raise ValueError(
                    f"the held-out data has the classes {', '.join(held_out.classes[:5])} …, the training data "
                    f"{', '.join(dataset.classes[:5])} …: numbers would stand for other classes; give both the same"
                )
            if hooks.validate is None:
                hooks.validate = lambda step: validate(task, held_out)
        return trainer(self.training, task, dataset, hooks)

    def examples(self, run: Trainer) -> Examples:
        """Two pictures of up to ten classes, from the same seeds each time."""
        assert isinstance(run.task, ClassTraining)
        return class_examples(run.task.model)

    def finish(self, run: Trainer) -> Path:
        """Write the trained (averaged) model; returns its folder."""
        assert isinstance(run.task, ClassTraining)
        with run.averaged():
            return Path(self.finished(run.task.model).save(Path(self.training.output) / "model"))


@dataclass(frozen=True)
class TokenRecipe(ClassRecipe):
    """Train on images with classes, or on their tokens.

    Attributes:
        tokens: a folder that ``nextscale tokenize`` has written; instead of ``data``.
        validation_tokens: the same of held-out images.
    """

    tokens: str | None = None
    validation_tokens: str | None = None

    def __post_init__(self) -> None:
        if (self.data is None) == (self.tokens is None):
            raise ValueError("give either data (images) or tokens (a folder of token shards), not both or neither")

    def open(self) -> Any:
        if self.tokens is None:
            return super().open()
        return open_tokens(self.tokens, seed=self.training.seed).require_labels()

    def held_out(self) -> Any:
        if self.validation_tokens is None:
            return super().held_out()
        return open_tokens(self.validation_tokens, views=[0])


def check_tokens(dataset: Any, tokenizer: Any, schedule: ScaleSchedule, drawn: ScaleSchedule) -> None:
    """Whether a data set fits a tokenizer.

    Args:
        schedule: the scales that tokens must hold.
        drawn: the scales whose last one is the image's.

    Raises:
        ValueError: the tokens were made otherwise, or the images have another size.
    """
    if isinstance(dataset, TokenDataset):
        made_with, own = dataset.metadata.get("tokenizer"), fingerprint(tokenizer)
        if dataset.metadata.get("schedule") != str(schedule) or made_with != own:
            raise ValueError(
                f"the tokens in {dataset.folder} were made with scales '{dataset.metadata.get('schedule')}' and "
                f"tokenizer {made_with}, the model has '{schedule}' and {own}: make them again"
            )
    elif tokenizer.image_size(drawn) != (dataset.size, dataset.size):
        raise ValueError(
            f"the scales '{drawn}' with stride {tokenizer.stride} stand for images of "
            f"{tokenizer.image_size(drawn)[0]} pixels, data.size is {dataset.size}"
        )


@torch.no_grad()
def validate(task: ClassTraining, dataset: Any, samples: int = 10_000, batch_size: int = 100) -> Metrics:
    """Means of :meth:`ClassTraining.evaluate` over held-out data."""
    device, count = task.model.device, 0
    totals: dict[str, float] = {}
    limit = min(samples, len(dataset))
    for start in range(0, limit, batch_size):
        batch = dataset.fetch(range(start, min(start + batch_size, limit)))
        batch = {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        batch["uniform"] = torch.ones(len(batch["label"]), device=device)
        for name, value in task.evaluate(batch).items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(batch["label"])
        count += len(batch["label"])
    return {name: total / count for name, total in totals.items()}


def class_examples(model: Any, **given: Any) -> Examples:
    """A row of pictures per seed, a column per class.

    Args:
        given: what the model's ``generate`` takes beside the class.
    """
    count = min(model.config.classes, SHOWN_CLASSES)
    classes = [model.config.classes * i // count for i in range(count)]
    rows = [(f"seed {seed}", list(model.generate(classes, n=count, seed=[seed] * count, **given))) for seed in (0, 1)]
    return Examples(rows, [class_name(model, label) for label in classes])
