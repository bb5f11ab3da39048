"""The configurations of G3PT's training runs: tokenizer, transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Hooks, Metrics, Trainer, TrainingConfig
from nextscale.core.transformer import TransformerConfig
from nextscale.datasets.shapes import ShapeSet
from nextscale.tasks.data import Examples, Load, tokenizer_of, trainer
from nextscale.tasks.generation.text import TextEncoder, TextEncoderConfig
from nextscale.tasks.generation.text_small import make_encoder
from nextscale.tasks.shapes.g3pt import CLIP_L, DINO_L, G3PT, G3PTConfig
from nextscale.tasks.shapes.g3pt_data import ConditionedShapes, ShapeData, prompt_of
from nextscale.tasks.shapes.g3pt_tokenizer import PointTokenizer, PointTokenizerConfig
from nextscale.tasks.shapes.g3pt_tokenizer_training import (
    PointTokenizerLossConfig,
    PointTokenizerTraining,
    initialize,
    iou,
)
from nextscale.tasks.shapes.g3pt_training import G3PTLossConfig, G3PTTraining
from nextscale.tasks.shapes.g3pt_training import initialize as initialize_transformer
from nextscale.tasks.shapes.pictures import ImageEncoderConfig, LearnedEncoderConfig
from nextscale.tasks.shapes.sar3d_recipe import picture_of
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig

SHOWN = 6
"""Shapes on a run's sample sheet, at most."""


@dataclass(frozen=True)
class PointTokenizerRecipe:
    """Train a tokenizer of surface points.

    Attributes:
        scales: numbers of tokens, coarse to fine.
        width, heads, latents, points, encoder_depth, decoder_depth, octaves, readout_ratio, quantizer: see
            :class:`nextscale.tasks.shapes.g3pt_tokenizer.PointTokenizerConfig`.
        init: a tokenizer to start from, a folder; its sizes then replace those given.
    """

    data: ShapeData
    scales: str = "1 4 9 16 25 36 64 100 169 256 400 576 752"
    width: int = 512
    heads: int = 8
    latents: int = 2304
    points: int = 16384
    encoder_depth: int = 12
    decoder_depth: int = 16
    octaves: int = 8
    readout_ratio: float = 4.0
    quantizer: BitwiseQuantizerConfig = field(default_factory=lambda: BitwiseQuantizerConfig(13))
    loss: PointTokenizerLossConfig = field(default_factory=PointTokenizerLossConfig)
    init: str | None = None
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            output="runs/g3pt-tokenizer",
            epochs=100,
            batch_size=128,
            weight_decay=1e-3,
            average=0.9999,
            precision="bf16",
        )
    )

    def build(self, load: Load) -> PointTokenizer:
        """The tokenizer to train: new, or from ``init``.

        Raises:
            ValueError: ``init`` is another model.
        """
        if self.init is not None:
            found = tokenizer_of(load(self.init))
            if not isinstance(found, PointTokenizer):
                raise ValueError(f"{self.init} is a {type(found).__name__}; expected a tokenizer of points")
            return found.requires_grad_(True)
        counts = [int(count) for count in self.scales.replace(",", " ").split()]
        config = PointTokenizerConfig(
            self.width,
            self.heads,
            self.latents,
            self.points,
            self.encoder_depth,
            self.decoder_depth,
            self.octaves,
            self.readout_ratio,
            self.quantizer,
            ScaleSchedule.counts(*counts),
        )
        return initialize(PointTokenizer(config))

    def trainer(self, load: Load, hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start; validation is added to ``hooks`` where there are held-out shapes."""
        torch.manual_seed(self.training.seed)
        hooks, dataset = hooks or Hooks(), self.data.open_training(self.training.seed)
        total = self.training.plan(len(dataset) / self.training.batch_size).total
        task = PointTokenizerTraining(self.build(load), self.loss, total)
        held_out = self.data.open_validation()
        if held_out is not None and hooks.validate is None:
            hooks.validate = lambda step: validate_occupancy(task.tokenizer, held_out)
        return trainer(self.training, task, dataset, hooks)

    def examples(self, run: Trainer) -> Examples:
        """The first shapes, from the first scales alone, half of the scales, and all."""
        assert isinstance(run.task, PointTokenizerTraining)
        tokenizer, dataset = run.task.tokenizer, self.data.open_validation() or self.data.open_training()
        surface, scales = dataset.fetch(_places(dataset))["surface"], len(tokenizer.config.schedule)
        rows = []
        for count in sorted({max(scales // 4, 1), max(scales // 2, 1), scales}):
            shapes = tokenizer.reconstruct(surface, count, resolution=64)
            rows.append((f"{count} scales", [picture_of(shape) for shape in shapes]))
        return Examples(rows)

    def finish(self, run: Trainer) -> Path:
        """Write the trained (averaged) tokenizer; returns its folder."""
        assert isinstance(run.task, PointTokenizerTraining)
        with run.averaged():
            return run.task.tokenizer.save(Path(self.training.output) / "model")


def _places(dataset: ShapeSet) -> list[int]:
    """Shapes to show, spread over a set."""
    count = min(SHOWN, len(dataset))
    return [len(dataset) * place // count for place in range(count)]


@torch.no_grad()
def validate_occupancy(tokenizer: PointTokenizer, dataset: ShapeSet, limit: int = 256, batch: int = 16) -> Metrics:
    """Mean IoU over held-out shapes, through all tokens and through the first half of the scales, and without tokens,
    among the points drawn uniformly."""
    schedule, sums = tokenizer.config.schedule, {"iou": 0.0, "iou_half": 0.0, "iou_continuous": 0.0}
    count = min(limit, len(dataset))
    for start in range(0, count, batch):
        given = dataset.fetch(range(start, min(start + batch, count)))
        given = {name: value.to(tokenizer.device) for name, value in given.items() if isinstance(value, Tensor)}
        features = tokenizer.features(given["surface"])
        _, totals = tokenizer.quantizer.encode(features, schedule)
        seen = {"iou": totals[-1], "iou_half": totals[len(totals) // 2], "iou_continuous": features}
        for name, latents in seen.items():
            logits = tokenizer.occupancy(tokenizer.decode_features(latents), given["queries"])
            sums[name] += float(iou(logits, given["occupied"], ~given["near"])) * len(features)
    return {name: total / count for name, total in sums.items()}


@dataclass(frozen=True)
class G3PTRecipe:
    """Train a G3PT on prepared shapes, told by any of class, picture and text.

    Attributes:
        tokenizer: a trained one, a folder.
        width, depth, heads: of the transformer; the defaults are the smallest published size's.
        symbols: see :class:`nextscale.tasks.shapes.g3pt.G3PTConfig`.
        classes: tell it the classes. pictures: ``"none"``, ``"learned"``, a small network trained along, or DINOv2
            (folder or hub name). texts: tell it prompts that name the class, such as "a chair".
        picture: sizes of the learned encoder. picture_width: channels of its features.
        text_encoder: folder or hub name; None: one of a few thousand weights that knows the prompts' words, made in the
            run's folder and saved with the model.
        text_width: channels of an encoder made here.
        drop: share of shapes that no condition is shown of.
        gate: see :func:`nextscale.tasks.shapes.g3pt_training.initialize`.
        init: a G3PT to start from, a folder.
    """

    tokenizer: str
    data: ShapeData
    width: int = 768
    depth: int = 12
    heads: int = 12
    drop_path: float = 0.0
    dropout: float = 0.0
    symbols: Literal["number", "bits"] = "number"
    classes: bool = True
    pictures: str = "none"
    texts: bool = False
    picture: LearnedEncoderConfig = field(default_factory=LearnedEncoderConfig)
    picture_width: int = 128
    text_encoder: str | None = None
    text_width: int = 64
    drop: float = 0.1
    guidance: float = 2.0
    gate: float = 0.1
    loss: G3PTLossConfig = field(default_factory=G3PTLossConfig)
    init: str | None = None
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(output="runs/g3pt", epochs=100, batch_size=256, precision="bf16")
    )

    def build(self, load: Load, dataset: ShapeSet) -> G3PT:
        """The model to train: new, or from ``init``.

        Raises:
            ValueError: the tokenizer is another model, or what the model is told by is not in the data.
        """
        tokenizer = tokenizer_of(load(self.tokenizer))
        if not isinstance(tokenizer, PointTokenizer):
            raise ValueError(f"{self.tokenizer} is a {type(tokenizer).__name__}; expected a tokenizer of points")
        if self.init is not None:
            model: G3PT = load(self.init)
            model.config = replace(model.config, condition_drop=self.drop, guidance=self.guidance)
            return model
        if (self.classes or self.texts) and not dataset.classes:
            raise ValueError(f"{self.data.source} names no classes: give classes: false and texts: false")
        own = tokenizer.config
        config = G3PTConfig(
            TransformerConfig(
                self.width,
                self.depth,
                self.heads,
                conditioning="shared",
                drop_path=self.drop_path,
                dropout=self.dropout,
            ),
            own.width,
            own.quantizer.bits,
            own.schedule,
            self.symbols,
            len(dataset.classes) if self.classes else 0,
            dataset.classes if self.classes else None,
            condition_drop=self.drop,
            guidance=self.guidance,
            **self._pictures(),
            **self._texts([prompt_of(name) for name in dataset.classes]),
        )
        return initialize_transformer(G3PT(config, tokenizer), gate=self.gate)

    def _pictures(self) -> dict[str, Any]:
        if self.pictures == "none":
            return {}
        if self.pictures == "learned":
            return {"learned": self.picture, "picture_width": self.picture_width}
        from transformers import AutoConfig

        width = int(AutoConfig.from_pretrained(self.pictures).hidden_size)
        image: ImageEncoderConfig = replace(DINO_L, name=self.pictures)
        return {"image": image, "picture_width": width}

    def _texts(self, prompts: list[str]) -> dict[str, Any]:
        if not self.texts:
            return {}
        text: TextEncoderConfig = replace(CLIP_L, name=self.text_encoder or CLIP_L.name)
        if self.text_encoder is None:
            place = Path(self.training.output) / "text-encoder"
            if not (place / "config.json").is_file():
                make_encoder(place, prompts, kind="clip", width=self.text_width, max_length=16)
            text = replace(CLIP_L, name=str(place), max_length=16)
        return {"text": text, "text_width": TextEncoder(text).width}

    def trainer(self, load: Load, hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start; validation is added to ``hooks`` where there are held-out shapes."""
        torch.manual_seed(self.training.seed)
        hooks, seen = hooks or Hooks(), self.pictures != "none"
        dataset = self.data.open_training(self.training.seed, images=seen)
        model = self.build(load, dataset)
        texts = None
        if model.config.text is not None:
            texts = model.reader.vectors([prompt_of(name) for name in dataset.classes])
        plan = self.training.plan(len(dataset) / self.training.batch_size)
        task = G3PTTraining(model, self.loss, warmup=round(plan.warmup), total=plan.total)
        held_out = self.data.open_validation(images=seen, classes=dataset.classes)
        if held_out is not None and hooks.validate is None:
            hooks.validate = validation(task, ConditionedShapes(held_out, model, texts))
        return trainer(self.training, task, ConditionedShapes(dataset, model, texts), hooks)

    def examples(self, run: Trainer) -> Examples:
        """Two shapes of up to six classes from the same seeds each time, or of the first pictures."""
        assert isinstance(run.task, G3PTTraining)
        model = run.task.model
        count = min(model.config.classes, SHOWN)
        conditions: list[Any] = [model.config.classes * place // count for place in range(count)]
        if not conditions:
            dataset = self.data.open_training(images=True)
            conditions = list(dataset.fetch(_places(dataset))["image"]) if model.config.prefix else [None]
        rows = []
        for seed in (0, 1):
            shapes = model.generate(conditions, seed=[seed] * len(conditions), resolution=64)
            rows.append((f"seed {seed}", [picture_of(shape) for shape in shapes]))
        return Examples(rows)

    def finish(self, run: Trainer) -> Path:
        """Write the trained (averaged) model; returns its folder."""
        assert isinstance(run.task, G3PTTraining)
        with run.averaged():
            return run.task.model.save(Path(self.training.output) / "model")


def validation(task: G3PTTraining, shapes: ConditionedShapes, limit: int = 512) -> Callable[[int], Metrics]:
    """Means of :meth:`G3PTTraining.evaluate` over held-out shapes, at most so many."""

    def measure(step: int) -> Metrics:
        totals: dict[str, float] = {}
        count = min(limit, len(shapes))
        for start in range(0, count, 32):
            batch = shapes.fetch(range(start, min(start + 32, count)))
            batch = {name: v.to(task.model.device) if isinstance(v, Tensor) else v for name, v in batch.items()}
            for name, value in task.evaluate(batch).items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(batch["label"])
        return {name: total / count for name, total in totals.items()}

    return measure
