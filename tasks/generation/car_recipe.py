"""The configuration of CAR's training runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nextscale.core.optim import Schedule
from nextscale.core.training import TrainingConfig
from nextscale.tasks.data import Examples, ImageData, Load
from nextscale.tasks.generation.car import CAR, CARConfig
from nextscale.tasks.generation.car_training import CARTraining, initialize, pass_base_through
from nextscale.tasks.generation.class_recipe import SHOWN_CLASSES, ClassRecipe
from nextscale.tasks.generation.controls import Extraction
from nextscale.tasks.generation.controlvar_data import Kinds, PairDataset
from nextscale.tasks.generation.drawing import class_name

FITTED_IMAGES = 256
"""Images from which the skips are fitted before training."""


@dataclass(frozen=True)
class CARRecipe(ClassRecipe):
    """Train a CAR adapter on images with classes and their control pictures.

    Attributes:
        base: the VAR to control, which stays as it is: a name, folder or official file. Its classes are kept.
        control: how control pictures are made of each crop on the fly: canny, hed and sketch; with ``folder``, what
            its pictures show.
        folder: tree of ready-made control pictures with the images' folders and names, cropped and mirrored alike.
        validation_folder: the same of the held-out images.
        widths: of the control encoder, one more than halvings to a token; None: the official (64, 128, 256, 512, 1024)
            or, where a token has fewer pixels, the last of them.
        official_start: begin with the official random weights; false: with convolutions that let a narrow encoder's
            signal through, and skips fitted to leave the base as it is.
    """

    base: str | None = None
    control: Extraction = field(default_factory=Extraction)
    folder: str | None = None
    validation_folder: str | None = None
    widths: list[int] | None = None
    label_smoothing: float = 0.0
    guidance: float = 4.0
    official_start: bool = False
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output="runs/car"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base is None:
            raise ValueError("an adapter needs the model it controls: give base, a VAR's name, folder or official file")
        if self.folder and self.data and self.data.validation and not self.validation_folder:
            raise ValueError("the held-out images need control pictures too: give validation_folder")

    # --- data --------------------------------------------------------------------------------------------

    def open(self) -> PairDataset:
        images = super().open()
        trees = [self._tree(self.folder).open_training(self.training.seed, labels=False)] if self.folder else []
        return PairDataset(images, self._kinds(self.folder), trees, seed=self.training.seed)

    def held_out(self) -> PairDataset | None:
        images = super().held_out()
        if images is None:
            return None
        opened = self._tree(self.validation_folder).open_validation(labels=False) if self.validation_folder else None
        return PairDataset(images, self._kinds(self.validation_folder), [opened] if opened else [])

    def _kinds(self, folder: str | None) -> Kinds:
        return Kinds((), {self.control.kind: folder}) if folder else Kinds((self.control,))

    def _tree(self, source: str) -> ImageData:
        """The data's own settings for a tree of controls: the same crops of the same samples."""
        assert self.data is not None
        return replace(self.data, source=source, validation=source)

    # --- the model ---------------------------------------------------------------------------------------

    def build(self, dataset: Any, load: Load) -> CAR:
        """A new adapter on the base.

        Raises:
            ValueError: the base is no VAR, or knows fewer or other classes than the data.
        """
        # Files may hold half precision; what trains on top computes in float32.
        base, (classes, names) = load(self.base).float(), self.known_classes(dataset)
        if not hasattr(base, "place"):
            raise ValueError(f"{self.base} is a {type(base).__name__}; CAR controls a VAR")
        if classes > base.config.classes:
            raise ValueError(f"the data has {classes} classes, {self.base} knows {base.config.classes}")
        check_places(names or (), base.config.class_names or ())
        steps = (base.tokenizer.stride - 1).bit_length() + 1
        widths = tuple(self.widths) if self.widths else CARConfig(base.config).widths[-steps:]
        config = CARConfig(base.config, widths, self.control, self.label_drop, self.guidance)
        model = CAR(config, base, self.base)
        if self.official_start:
            return initialize(model)
        count = min(len(dataset), FITTED_IMAGES)
        batch = dataset.fetch([index * (len(dataset) // count) for index in range(count)])
        batch = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        return pass_base_through(initialize(model, conv_std=None), batch)

    def task(self, model: CAR, plan: Schedule, load: Load) -> CARTraining:
        return CARTraining(model, label_smoothing=self.label_smoothing)

    def examples(self, run: Any) -> Examples:
        """Controls of held-out images, and what is drawn from them with and without their control."""
        model, dataset = run.task.model, self.held_out() or self.open()
        count = min(len(dataset), SHOWN_CLASSES)
        batch = dataset.fetch(list(range(count)))
        control, labels = (batch["control"] + 1) / 2, batch["label"].tolist()
        rows = [
            ("image", (batch["image"] + 1) / 2),
            (f"{self.control.kind} control", control),
            *((f"seed {seed}", model.generate(labels, seed=[seed] * count, control=control)) for seed in (0, 1)),
            ("without control", model.generate(labels, seed=[0] * count)),
        ]
        return Examples([(name, list(part)) for name, part in rows], [class_name(model, label) for label in labels])


def check_places(names: Sequence[str], known: Sequence[str]) -> None:
    """Whether classes have the numbers that a model knows them by; names that it does not know may stand for any.

    Raises:
        ValueError: a name has another number.
    """
    places: dict[str, set[int]] = {}
    for number, synonyms in enumerate(known):
        for name in synonyms.split(","):
            places.setdefault(name.strip().casefold(), set()).add(number)
    for number, name in enumerate(names):
        found = places.get(name.casefold(), {number})
        if number not in found:
            raise ValueError(
                f"class {number} of the data is {name}, which the base knows as class {min(found)}: give the data the "
                "base's classes, all of them and in its order"
            )
