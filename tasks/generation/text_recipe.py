"""What the training recipes of text-to-image generators share: images with texts, the text encoder, sample pictures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from nextscale.core.optim import Schedule
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import Batch, Hooks, Metrics, Trainer, TrainingConfig, TrainingTask
from nextscale.datasets.aspects import AspectImages
from nextscale.datasets.caption_stream import StreamedCaptions, open_caption_stream
from nextscale.datasets.captions import CaptionedImages, Choice, open_captions
from nextscale.tasks.data import Examples, ImageData, Load, stream_shards, tokenizer_of, trainer
from nextscale.tasks.generation.text import TextEncoder, TextEncoderConfig
from nextscale.tasks.generation.text_small import make_encoder
from nextscale.tasks.generation.text_to_image import TextToImage

TextImages = CaptionedImages | StreamedCaptions | AspectImages
"""A training set of images with texts."""
SHOWN = 8
"""Texts on a run's sample sheet, at most; two pictures each."""


@dataclass(frozen=True)
class CaptionData(ImageData):
    """Images with texts.

    Attributes:
        captions: ``"files"``: texts beside the images (.txt, .json), in folders or webdataset shards; ``"classes"``:
            made of each image's class and colour.
        field: entry of .json files; None: caption, text, prompt or long_caption, whichever is there.
        short_captions: share of the images of a list that are given with their short text, where they have one.
        cut_captions: give a drawn number of a text's first sentences instead of all.
        template: of texts made of classes, with {class} and {colour}.
        class_names: where the data does not name its classes.
    """

    captions: Literal["files", "classes"] = "files"
    field: str | None = None
    template: str = "a {colour} {class}"
    class_names: list[str] | None = None
    short_captions: float = 0.0
    cut_captions: bool = False

    def choice(self, seed: int) -> Choice:
        """Which text of a training image is given."""
        return Choice(self.short_captions, self.cut_captions, seed)

    def open_texts(self, seed: int) -> CaptionedImages | StreamedCaptions:
        """The training set."""
        if self.streamed:
            if self.choice(seed) != Choice(seed=seed):
                raise ValueError("streamed shards have one text an image: leave out short_captions and cut_captions")
            return open_caption_stream(
                stream_shards(self.source),
                captions=self.captions,
                field=self.field,
                template=self.template,
                class_names=self.class_names,
                **self.streaming_options(seed),
            )
        images = self.open_training(seed, labels=self.captions == "classes")
        return self._captioned(self.source, images, self.choice(seed))

    def open_validation_texts(self) -> CaptionedImages | None:
        """The held-out set, if there is one."""
        images = self.open_validation(labels=self.captions == "classes")
        return None if images is None or self.validation is None else self._captioned(self.validation, images)

    def _captioned(self, source: str, images: Any, choice: Choice | None = None) -> CaptionedImages:
        return open_captions(
            source,
            images,
            captions=self.captions,
            field=self.field,
            template=self.template,
            class_names=self.class_names,
            choice=choice,
        )


class TextTraining(TrainingTask):
    """Trains a :class:`nextscale.tasks.generation.text_to_image.TextToImage`."""

    model: Any

    def evaluate(self, batch: Batch) -> Metrics:
        """Loss and accuracy on a batch in which no text is dropped."""
        raise NotImplementedError


@dataclass(frozen=True)
class TextRecipe:
    """Train on images with texts.

    Attributes:
        tokenizer: folder or official file.
        text_encoder: folder or hub name; None: one of a few thousand weights that knows the captions' words, made in
            the run's folder and saved with the model.
        text_width, text_seed: channels of an encoder made here, and what its weights are drawn from.
        text_length: tokens a text is cut to.
        text_bits: 8 or 4: load the encoder with weights of so many bits.
        text_cache: folder to keep the features of texts in.
        text_drop: share of texts replaced by no text.
        guidance, temperature: the finished model samples with where none are asked for.
    """

    tokenizer: str
    data: CaptionData
    text_encoder: str | None = None
    text_width: int = 64
    text_seed: int = 0
    text_length: int = 64
    text_bits: Literal[8, 4] | None = None
    text_cache: str | None = None
    text_drop: float = 0.1
    guidance: float = 3.0
    temperature: float = 1.0
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output="runs/text-to-image"))

    small_encoder: ClassVar[Literal["t5", "clip"]] = "t5"
    """Kind of an encoder made here."""

    # --- what a system says ------------------------------------------------------------------------------

    def build(self, encoder: TextEncoder, load: Load) -> TextToImage:
        """The model to train."""
        raise NotImplementedError

    def task(self, model: Any, plan: Schedule) -> TextTraining:
        """How it is trained."""
        raise NotImplementedError

    def open_tokenizer(self, load: Load, kind: type, scales: str | None) -> Any:
        """The tokenizer, with the scales to train on: those named, or its own.

        Raises:
            ValueError: it is of another kind, or the scales are not of the images' size.
        """
        tokenizer = tokenizer_of(load(self.tokenizer))
        if not isinstance(tokenizer, kind):
            raise ValueError(f"{self.tokenizer} is a {type(tokenizer).__name__}, expected a {kind.__name__}")
        found: Any = tokenizer
        schedule = ScaleSchedule.parse(scales) if scales else found.config.schedule
        if found.image_size(schedule) != (self.data.size, self.data.size):
            raise ValueError(
                f"the scales '{schedule}' with stride {found.stride} stand for images of "
                f"{found.image_size(schedule)[0]} pixels, data.size is {self.data.size}"
            )
        found.config = replace(found.config, schedule=schedule)
        return found

    # --- the run -----------------------------------------------------------------------------------------

    def open_texts(self, load: Load) -> TextImages:
        """The training set."""
        return self.data.open_texts(self.training.seed)

    def encoder(self, dataset: TextImages) -> TextEncoder:
        """The text encoder, made here where none is named."""
        name = self.text_encoder
        if name is None:
            place = Path(self.training.output) / "text-encoder"
            if not (place / "config.json").is_file():
                make_encoder(
                    place,
                    dataset.vocabulary(),
                    kind=self.small_encoder,
                    width=self.text_width,
                    max_length=self.text_length,
                    seed=self.text_seed,
                )
            name = str(place)
        config = TextEncoderConfig(name, max_length=self.text_length)
        return TextEncoder(config, bits=self.text_bits, cache=self.text_cache)

    def trainer(self, load: Load, hooks: Hooks | None = None) -> Trainer:
        """The run, ready to start; validation is added to ``hooks`` where there are held-out images."""
        torch.manual_seed(self.training.seed)
        dataset, hooks = self.open_texts(load), hooks or Hooks()
        model = self.build(self.encoder(dataset), load)
        task = self.task(model, self.training.plan(len(dataset) / self.training.batch_size))
        held_out = self.data.open_validation_texts()
        if held_out is not None and hooks.validate is None:
            hooks.validate = lambda step: validate(task, held_out)
        return trainer(self.training, task, dataset, hooks)

    def examples(self, run: Trainer) -> Examples:
        """Two pictures of each of a few texts of the data, from the same seeds each time."""
        assert isinstance(run.task, TextTraining)
        held_out = self.data.open_validation_texts()
        dataset = self.data.open_texts(self.training.seed) if held_out is None else held_out
        # From the first to the last: in equal whole steps, data that repeats its classes in order would show only one.
        numbers = sorted({place * (len(dataset) - 1) // (SHOWN - 1) for place in range(SHOWN)})
        texts: list[str] = dataset.fetch(numbers)["text"]
        model = run.task.model
        rows = [(f"seed {seed}", list(model.generate(texts, seed=[seed] * len(texts)))) for seed in (0, 1)]
        return Examples(rows, texts)

    def finish(self, run: Trainer) -> Path:
        """Write the trained (averaged) model; returns its folder."""
        assert isinstance(run.task, TextTraining)
        with run.averaged():
            return Path(run.task.model.save(Path(self.training.output) / "model"))


@torch.no_grad()
def validate(task: TextTraining, dataset: CaptionedImages, samples: int = 5000, batch_size: int = 100) -> Metrics:
    """Means of :meth:`TextTraining.evaluate` over held-out images."""
    device = task.model.device
    limit = min(samples, len(dataset))
    totals: dict[str, float] = {}
    for start in range(0, limit, batch_size):
        batch = dataset.fetch(range(start, min(start + batch_size, limit)))
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        for name, value in task.evaluate(batch).items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(batch["image"])
    return {name: total / limit for name, total in totals.items()}
