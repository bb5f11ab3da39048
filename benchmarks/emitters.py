"""Models that emit indices, bits or latents side by side: their images, their tokens, and the time that drawing takes.

    python benchmarks/emitters.py MODEL MODEL … --classifier FILE --real TEST --out FOLDER

Models of classes and models of texts both go. A model of texts is given captions of the real test images, made of
their classes and colours, as it was trained; how often its image has the colour that was asked for is measured too.
The classifier is a TorchScript file: images in [0, 1] -> (features, logits). Codes are counted over the tokens of the
test images: of indices, those that come up at all; of bits, those that take both values. Times are of calls taken in
turn in one process, text encoder, guidance and decoder included.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import in_turn, machine
from torch import Tensor

import nextscale
from nextscale.cli.console import table
from nextscale.core.checkpoint import write_json
from nextscale.datasets.captions import colours_of, describe
from nextscale.datasets.images import ImageDataset, open_images
from nextscale.evaluation.bit_usage import BitUsage
from nextscale.evaluation.classifier import Classifier, load_classifier
from nextscale.evaluation.distances import frechet_distance, precision_recall
from nextscale.evaluation.generation import FeatureSet
from nextscale.evaluation.reconstruction import CodebookUsage
from nextscale.pictures import comparison_sheet, save_png
from nextscale.tasks.generation.text_to_image import TextToImage

CHUNK = 100
"""Images drawn at once where quality is measured."""
ROWS = 2
"""Rows of each model on the sheet."""
EMITS = {torch.bool: "bits", torch.int64: "indices", torch.float32: "latents"}


class Subject:
    """A model, and how it is asked for images of the kind of real ones: by their labels, or by captions of them."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.template, self.guidance = Path(name).name, options.template, dict(options.guidance or [])
        self.model = nextscale.load(name, device=options.device)
        self.class_names: Sequence[str] = ()

    def draw(self, batch: dict[str, Any], seed: int) -> Tensor:
        """An image in [0, 1] for every image of a batch, which has its labels, and the colours that captions name."""
        count = len(batch["label"])
        seeds, chosen = list(range(seed, seed + count)), {"batch_size": count}
        if self.name in self.guidance:
            chosen["guidance"] = self.guidance[self.name]
        if isinstance(self.model, TextToImage):
            return self.model.generate(describe(batch, self.template, self.class_names), count, seeds, **chosen)
        return self.model.generate(batch["label"].tolist(), count, seeds, **chosen)

    def tokens(self, images: Tensor) -> Tensor:
        """Of images in [-1, 1]."""
        return self.model.tokenizer.encode(images.to(self.model.device))

    def sizes(self) -> dict[str, Any]:
        """Parameters, and what there is of tokens."""
        model = self.model
        tokenizer = sum(parameter.numel() for parameter in model.tokenizer.parameters())
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()) - tokenizer,
            "tokenizer's": tokenizer,
            "tokens": model.tokenizer.config.schedule.length,
        }


def even(dataset: ImageDataset, per_class: int) -> list[int]:
    """Numbers of the first images of every class, class by class.

    Raises:
        ValueError: a class has fewer.
    """
    assert dataset.labels is not None
    labels = torch.from_numpy(dataset.labels)
    found = [(labels == label).nonzero()[:per_class, 0].tolist() for label in range(dataset.num_classes)]
    if min(map(len, found)) < per_class:
        raise ValueError(f"a class has {min(map(len, found))} images, expected {per_class}: lower --per-class")
    return [number for each in found for number in each]


def batches(dataset: ImageDataset, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(numbers), CHUNK):
        yield dataset.fetch(numbers[start : start + CHUNK])


class Usage:
    """How much of the room of codes tokens take; nothing of latents."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.schedule = tokenizer, tokenizer.config.schedule
        self.counts: BitUsage | CodebookUsage | None = None

    def add(self, tokens: Tensor) -> None:
        if tokens.is_floating_point():
            return
        if self.counts is None and tokens.dtype == torch.bool:
            self.counts = BitUsage(tokens.shape[-1], len(self.schedule))
        elif self.counts is None:
            self.counts = CodebookUsage(self.tokenizer.config.quantizer.vocabulary, len(self.schedule))
        self.counts.update(tokens.split(list(self.schedule.lengths), dim=1))

    def figures(self) -> dict[str, float]:
        if self.counts is None:
            return {}
        overall = self.counts.overall()
        return {"codes used": overall.used, "entropy in bits": overall.entropy}


def quality(
    subject: Subject, classifier: Classifier, dataset: ImageDataset, numbers: Sequence[int], seed: int
) -> dict[str, Any]:
    """The figures of one model."""
    real, drawn, rebuilt = (FeatureSet(classifier) for _ in range(3))
    right, coloured, usage, kind = 0.0, 0.0, Usage(subject.model.tokenizer), torch.float32
    for start, batch in zip(range(0, len(numbers), CHUNK), batches(dataset, numbers), strict=True):
        tokens = subject.tokens(batch["image"])
        kind = tokens.dtype
        usage.add(tokens)
        rebuilt.add((subject.model.tokenizer.decode(tokens).cpu() + 1) / 2)
        images = subject.draw(batch, seed + start)
        real.add((batch["image"] + 1) / 2)
        drawn.add(images)
        asked = colours_of(batch["image"])
        coloured += sum(a == b for a, b in zip(asked, colours_of(images * 2 - 1), strict=True))
        right += float((drawn.logits[start:].argmax(1) == batch["label"]).sum())
    spread = precision_recall(real.features, drawn.features, 3)
    figures = {
        "emits": EMITS[kind],
        **subject.sizes(),
        "classified": right / len(numbers),
        "distance": frechet_distance(drawn.features, real.features),
        "distance of reconstructions": frechet_distance(rebuilt.features, real.features),
        "precision": spread.precision,
        "recall": spread.recall,
    }
    if isinstance(subject.model, TextToImage):
        figures["colour as asked"] = coloured / len(numbers)
    return figures | usage.figures()


def times(
    subjects: Sequence[Subject], dataset: ImageDataset, size: int, options: argparse.Namespace
) -> dict[str, float]:
    """Seconds an image of each model, for batches of a size."""
    batch, device = dataset.fetch(list(range(size))), subjects[0].model.device
    calls = {subject.name: (lambda s=subject: s.draw(batch, options.seed)) for subject in subjects}
    return {name: statistics.median(each) / size for name, each in in_turn(calls, options.rounds, device).items()}


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def guidance(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    return name, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names, files or folders, each of another last name")
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--real", required=True, help="test images, labelled")
    parser.add_argument("--per-class", type=int, default=200)
    parser.add_argument("--guidance", type=guidance, nargs="+", metavar="NAME=STRENGTH", help="else each model's own")
    parser.add_argument("--class-names", nargs="+", help="else those of a model, or of the data")
    parser.add_argument("--template", default="a {colour} {class}", help="of captions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=3, help="calls of each; one more is not counted")
    parser.add_argument("--out", required=True, help="folder for figures.json and a sheet of samples")
    options = parser.parse_args()

    subjects = [Subject(name, options) for name in options.models]
    if len({subject.name for subject in subjects}) < len(subjects):
        parser.error("two models have the same last name")
    size = subjects[0].model.tokenizer.image_size()[0]
    dataset = open_images(options.real, size=size, crop="center", resize_ratio=1.0).require_labels()
    known = [getattr(each.model.config, "class_names", None) for each in subjects]
    names = next((found for found in [options.class_names, *known, dataset.classes] if found), None)
    if names is None or len(names) < dataset.num_classes:
        parser.error(f"the data has {dataset.num_classes} classes without names: give --class-names")
    for each in subjects:
        each.class_names = names
    numbers = even(dataset, options.per_class)
    classifier = load_classifier(options.classifier, device=subjects[0].model.device)
    found = {each.name: quality(each, classifier, dataset, numbers, options.seed) for each in subjects}
    for count in options.batch:
        for name, seconds in times(subjects, dataset, count, options).items():
            found[name][f"seconds an image, batch {count}"] = seconds
    keys = list(dict.fromkeys(key for figures in found.values() for key in figures))
    print(table(["", *found], [[key, *(shown(figures.get(key, "")) for figures in found.values())] for key in keys]))
    out = Path(options.out)
    result = {"figures": found, "images": len(numbers), "machine": machine(subjects[0].model.device)}
    write_json(out / "figures.json", result)
    write_sheet(subjects, dataset, options, out / "samples.png")
    print(f"written: {out}")


def write_sheet(subjects: Sequence[Subject], dataset: ImageDataset, options: argparse.Namespace, path: Path) -> None:
    """A column for every class, a few rows of each model."""
    batch, rows = dataset.fetch(even(dataset, 1)), []
    for subject in subjects:
        for number in range(ROWS):
            images = subject.draw(batch, options.seed + 1000 * number)
            rows.append((subject.name, list(images)))
    save_png(comparison_sheet(rows, list(subjects[0].class_names), scale=2), path, overwrite=True)


if __name__ == "__main__":
    main()
