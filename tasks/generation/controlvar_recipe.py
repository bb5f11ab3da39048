"""The configuration of ControlVAR's training and fine-tuning runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nextscale.core.optim import Schedule
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.tasks.data import Examples, ImageData, Load, tokenizer_of
from nextscale.tasks.generation.class_recipe import SHOWN_CLASSES, ClassRecipe
from nextscale.tasks.generation.controls import Extraction
from nextscale.tasks.generation.controlvar import ControlVAR, ControlVARConfig
from nextscale.tasks.generation.controlvar_data import Kinds, PairDataset
from nextscale.tasks.generation.controlvar_pairs import Halves, paired, single
from nextscale.tasks.generation.controlvar_training import ControlVARTraining, from_var, with_scales
from nextscale.tasks.generation.drawing import class_name
from nextscale.tasks.generation.var_finetune import adapt
from nextscale.tasks.generation.var_training import initialize


@dataclass(frozen=True)
class ControlVARRecipe(ClassRecipe):
    """Train a ControlVAR on images with classes and their control pictures.

    Attributes:
        extract: controls made of each image on the fly: canny, hed and sketch.
        folders: trees of ready-made control pictures by type; same folders and names as the images'.
        validation_folders: the same of the held-out images.
        init: a VAR to start from, or a ControlVAR to go on with: a name, folder or official file.
        tokenizer: with no ``init``: folder or official file.
        depth: of a new model: width 64 d, d heads and drop path 0.1 d / 24.
        scales: None: those of ``init`` or the tokenizer.
        halves: what the control and the image of one scale see of each other, in a new model.
        either_order: train with the control first and with the image first, half of the batches each.
        type_drop: share of control types replaced by "no type".
        ignore_black: leave the black of masks out of the loss at the finer scales.
        repeat_positions: lay the positions of ``init`` out as the official script does.
        gate: initial size of the gates of a new model.
    """

    extract: list[Extraction] = field(default_factory=list)
    folders: dict[str, str] | None = None
    validation_folders: dict[str, str] | None = None
    init: str | None = None
    tokenizer: str | None = None
    depth: int = 16
    scales: str | None = None
    halves: Halves = "joined"
    either_order: bool = False
    type_drop: float = 0.1
    guidance: float = 4.0
    ignore_black: bool = False
    repeat_positions: bool = False
    gate: float = 1e-3
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output="runs/controlvar"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.init is None) == (self.tokenizer is None):
            raise ValueError("give init, a model to start from, or tokenizer, for a new model; one of the two")
        if self.kinds.folders and self.data and self.data.validation and not self.validation_folders:
            raise ValueError("the held-out images need control pictures too: give validation_folders")

    @property
    def kinds(self) -> Kinds:
        return Kinds(tuple(self.extract), self.folders)

    # --- data --------------------------------------------------------------------------------------------

    def open(self) -> PairDataset:
        images = super().open()
        assert self.data is not None
        trees = [self._tree(source).open_training(self.training.seed, labels=False) for source in self._sources()]
        return PairDataset(images, self.kinds, trees, seed=self.training.seed)

    def held_out(self) -> PairDataset | None:
        images = super().held_out()
        if images is None:
            return None
        folders = self.validation_folders or {}
        if missing := [name for name in self.folders or {} if name not in folders]:
            raise ValueError(f"validation_folders names no folder of {missing[0]} controls")
        kinds = Kinds(tuple(self.extract), {name: folders[name] for name in self.folders or {}})
        trees = [self._tree(folders[name]).open_validation(labels=False) for name in self.folders or {}]
        opened = [tree for tree in trees if tree is not None]
        return PairDataset(images, kinds, opened, seed=self.training.seed)

    def _sources(self) -> list[str]:
        return list((self.folders or {}).values())

    def _tree(self, source: str) -> ImageData:
        """The data's own settings for a tree of controls: the same crops of the same samples."""
        assert self.data is not None
        return replace(self.data, source=source, validation=source)

    # --- the model ---------------------------------------------------------------------------------------

    def build(self, dataset: Any, load: Load) -> ControlVAR:
        """The model to train: new, made from a VAR, or a ControlVAR to go on with.

        Raises:
            ValueError: a ControlVAR to go on with knows other classes or other types.
        """
        classes, names = self.known_classes(dataset)
        own: dict[str, Any] = {
            "label_drop": self.label_drop,
            "type_drop": self.type_drop,
            "guidance": self.guidance,
            "extractions": tuple(self.extract),
            "either_order": self.either_order,
        }
        if self.init is None:
            assert self.tokenizer is not None
            tokenizer = tokenizer_of(load(self.tokenizer))
            codes = tokenizer.config.quantizer
            schedule = ScaleSchedule.parse(self.scales) if self.scales else tokenizer.config.schedule
            config = ControlVARConfig.of_depth(
                self.depth,
                classes=classes,
                class_names=names,
                vocabulary=codes.vocabulary,
                code_channels=codes.channels,
                schedule=paired(schedule),
                control_types=self.kinds.names,
                halves=self.halves,
                **own,
            )
            model = ControlVAR(config, tokenizer)
            initialize(model, gate=self.gate)
            return model
        start = load(self.init)
        if isinstance(start, ControlVAR):
            return self._go_on(start, classes, own)
        schedule = ScaleSchedule.parse(self.scales) if self.scales else start.config.schedule
        if names is None and classes == start.config.classes:
            names = start.config.class_names
        base, _ = adapt(start, classes=classes, class_names=names, schedule=schedule)
        return from_var(
            base,
            repeat_positions=self.repeat_positions,
            control_types=self.kinds.names,
            halves=self.halves,
            **own,
        )

    def _go_on(self, model: ControlVAR, classes: int, own: dict[str, Any]) -> ControlVAR:
        config = model.config
        if classes != config.classes:
            raise ValueError(f"{self.init} knows {config.classes} classes, the data has {classes}")
        if unknown := [name for name in self.kinds.names if name not in config.control_types]:
            raise ValueError(f"{self.init} knows the controls {', '.join(config.control_types)}, not {unknown[0]}")
        model.config = replace(config, **own)
        schedule = ScaleSchedule.parse(self.scales) if self.scales else single(config.schedule)
        return model if schedule == single(config.schedule) else with_scales(model, schedule)

    def task(self, model: ControlVAR, plan: Schedule, load: Load) -> ControlVARTraining:
        places = [model.config.control_types.index(name) for name in self.kinds.names]
        return ControlVARTraining(model, ignore_black=self.ignore_black, places=places)

    def examples(self, run: Any) -> Examples:
        """Controls, the images drawn from them, and pairs drawn from the class alone."""
        model = run.task.model
        dataset = self.held_out() or self.open()
        count = min(len(dataset), SHOWN_CLASSES)
        batch = dataset.fetch(list(range(count)))
        types = [self.kinds.names[number] for number in batch["type"].tolist()]
        control, labels = (batch["control"] + 1) / 2, batch["label"].tolist()
        drawn = model.generate(labels, seed=0, control=control, control_type=types)
        pairs = model.pairs(labels, seed=0, control_type=types)
        with torch.no_grad():
            seen = model.tokenizer.decode(model.encode(control), single(model.config.schedule)).cpu()
        rows = [
            ("image", (batch["image"] + 1) / 2),
            ("control", control),
            ("its tokens", (seen + 1) / 2),
            ("image from control", drawn),
            ("control from class", pairs[0]),
            ("image with it", pairs[1]),
        ]
        return Examples([(name, list(part)) for name, part in rows], [class_name(model, label) for label in labels])
