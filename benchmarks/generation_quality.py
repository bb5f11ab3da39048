"""How good a class-conditional model's images are, in the features of a classifier you name.

    python benchmarks/generation_quality.py MODEL --classifier FILE --real TEST --training TRAIN --out FOLDER

Draws images of every class, measures them against the real test images and against the tokenizer's
reconstructions of those, and puts the nearest training images beside some of the samples. The classifier is
a TorchScript file: images in [0, 1] -> (features, logits).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

import nextscale
from nextscale.core.checkpoint import write_text
from nextscale.datasets.images import ImageDataset, open_images
from nextscale.evaluation.classifier import load_classifier
from nextscale.evaluation.generation import evaluate_generator, nearest_neighbours
from nextscale.pictures import comparison_sheet, contact_sheet, save_png


def batches(dataset: ImageDataset, size: int = 250, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in [0, 1] and labels."""
    count = min(len(dataset), limit or len(dataset))
    for start in range(0, count, size):
        batch = dataset.fetch(range(start, min(start + size, count)))
        yield (batch["image"] + 1) / 2, batch["label"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--real", required=True, help="test images, labelled")
    parser.add_argument("--training", help="training images, for nearest neighbours")
    parser.add_argument("--per-class", type=int, default=200)
    parser.add_argument("--guidance", type=float, help="unless given, the model's own")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=0.96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use only so many real images")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    model = nextscale.load(options.model)
    size = model.tokenizer.image_size()[0]
    classifier = load_classifier(options.classifier, device=model.device)
    sampling = {"guidance": options.guidance, "top_k": options.top_k, "top_p": options.top_p}
    seconds = 0.0

    def generate(labels: Tensor, seeds: list[int]) -> Tensor:
        nonlocal seconds
        start = time.perf_counter()
        images = model.generate(labels.tolist(), len(seeds), seeds, batch_size=len(seeds), **sampling)
        seconds += time.perf_counter() - start
        return images

    def reconstruct(images: Tensor) -> Tensor:
        tokens = model.tokenizer.encode(images.to(model.device) * 2 - 1)
        return ((model.tokenizer.decode(tokens) + 1) / 2).cpu()

    real = open_images(options.real, size=size, crop="center", resize_ratio=1.0)
    report = evaluate_generator(
        generate,
        batches(real, limit=options.limit),
        classifier,
        classes=model.config.classes,
        per_class=options.per_class,
        batch_size=100,
        seed=options.seed,
        reconstruct=reconstruct,
        class_names=model.config.class_names,
    )
    from rich.console import Console

    Console().print(report.table())
    count = options.per_class * model.config.classes
    print(f"ratio of Fréchet distances, generated / reconstructed: {report.frechet_ratio:.2f}")
    print(f"{count} images in {seconds:.1f} s: {count / seconds:.1f} images a second")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(report.to_json(), out / "report.json")

    names = model.config.class_names or [str(c) for c in range(model.config.classes)]
    labels = [c for c in range(model.config.classes) for _ in range(8)]
    samples = model.generate(labels, len(labels), options.seed, **sampling)
    captions = [names[label] for label in labels]
    save_png(contact_sheet(samples, columns=8, labels=captions, scale=2), out / "samples.png", overwrite=True)
    if options.training:
        first = samples[::8]
        training = open_images(options.training, size=size, crop="center", resize_ratio=1.0)
        found = nearest_neighbours(first, batches(training), classifier, k=3)
        rows = [(names[i], [first[i], *found.features.images[i], *found.pixels.images[i]]) for i in range(len(first))]
        headings = ["sample", "nearest in features", "", "", "nearest in pixels", "", ""]
        save_png(comparison_sheet(rows, headings, scale=2), out / "nearest.png", overwrite=True)
    print(f"report and sheets are in {out}")


if __name__ == "__main__":
    main()
