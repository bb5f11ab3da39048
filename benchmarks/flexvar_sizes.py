"""What one model of free scales draws at sizes it was not trained for, and how its quality follows the number of steps.

    python benchmarks/flexvar_sizes.py MODEL --classifier FILE --real TEST --out FOLDER

Writes sizes.png (each class at every size, the same seeds), steps.png (distance to the real test images and share
classified as asked for, over the number of steps to the model's own size) and figures.json. The classifier is a
TorchScript file: images in [0, 1] -> (features, logits). Images of other sizes than the classifier's are averaged to
its size before it sees them; of longer ones it sees the middle.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nextscale
from nextscale.cli.parsing import parse_size
from nextscale.core.checkpoint import write_atomically, write_text
from nextscale.datasets.images import open_images
from nextscale.evaluation.classifier import load_classifier
from nextscale.evaluation.distances import frechet_distance
from nextscale.evaluation.generation import FeatureSet
from nextscale.pictures import comparison_sheet, save_png


def batches(source: str, size: int, limit: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Real images in [0, 1] and their labels."""
    dataset = open_images(source, size=size, crop="center", resize_ratio=1.0)
    count = min(len(dataset), limit or len(dataset))
    for start in range(0, count, 250):
        batch = dataset.fetch(range(start, min(start + 250, count)))
        yield (batch["image"] + 1) / 2, batch["label"]


def seen(images: Tensor, size: int) -> Tensor:
    """Images at the classifier's size: their middle square, averaged to it."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[..., top : top + side, left : left + side]
    return square if side == size else F.interpolate(square, size=(size, size), mode="area")


def measure(
    model: Any, schedule: Any, classifier: Any, real: Tensor, size: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Fréchet distance, share classified as asked for, and images per second, of images of every class."""
    labels = [label for label in range(model.config.classes) for _ in range(options.per_class)]
    drawn, seconds = FeatureSet(classifier), 0.0
    sampling = {"guidance": options.guidance, "top_k": options.top_k, "top_p": options.top_p}
    for start in range(0, len(labels), 100):
        part = labels[start : start + 100]
        seeds = [options.seed + start + i for i in range(len(part))]
        began = time.perf_counter()
        images = model.generate(part, len(part), seeds, schedule=schedule, batch_size=100, **sampling)
        seconds += time.perf_counter() - began
        drawn.add((seen(images, size), torch.tensor(part)))
    assert drawn.labels is not None
    right = (drawn.logits.argmax(1) == drawn.labels).float().mean()
    return {
        "scales": str(schedule),
        "tokens": schedule.length,
        "images": len(labels),
        "frechet": frechet_distance(drawn.features, real),
        "classified": float(right),
        "images_per_second": len(labels) / seconds,
    }


def curve(rows: list[dict[str, Any]], path: Path) -> Path:
    """A picture of the figures over the number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row["steps"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, name, title in (
        (axes[0], "frechet", "Fréchet distance to test images (less is better)"),
        (axes[1], "classified", "share classified as asked for"),
    ):
        axis.plot(steps, [row[name] for row in rows], marker="o", color="#2450b8")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("steps")
        axis.set_xticks(steps)
        axis.grid(alpha=0.3)
    saved = write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    plt.close(figure)
    return saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--real", required=True, help="test images, labelled")
    parser.add_argument("--sizes", nargs="+", default=["16", "24", "32", "48", "32x64"])
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 5, 6, 7, 8, 9, 10, 11, 12])
    parser.add_argument("--per-class", type=int, default=200)
    parser.add_argument("--shown", type=int, default=10, help="classes on the sheet of sizes")
    parser.add_argument("--guidance", type=float, help="unless given, the model's own")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=0.96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use only so many real images")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    model = nextscale.load(options.model)
    classifier, out = load_classifier(options.classifier, device=model.device), Path(options.out)
    own = model.tokenizer.image_size(model.config.schedule)[0]
    real = FeatureSet(classifier)
    for batch in batches(options.real, own, options.limit):
        real.add(batch)
    half = real.features[: real.count // 2], real.features[real.count // 2 :]
    figures: dict[str, Any] = {
        "model": options.model,
        "guidance": model.config.guidance if options.guidance is None else options.guidance,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "real_images": real.count,
        "frechet_real_halves": frechet_distance(*half),
        "steps": [],
        "sizes": [],
    }
    for steps in options.steps:
        schedule = model.schedule_for(steps=steps)
        row = {"steps": steps, **measure(model, schedule, classifier, real.features, own, options)}
        figures["steps"].append(row)
        print(f"{steps:3d} steps: {row}", flush=True)
    shown = range(min(options.shown, model.config.classes))
    columns: list[Tensor] = []
    for text in options.sizes:
        schedule = model.schedule_for(parse_size(text))
        row = {"size": text, **measure(model, schedule, classifier, real.features, own, options)}
        figures["sizes"].append(row)
        print(f"{text:>6} pixels: {row}", flush=True)
        columns.append(
            model.generate(
                list(shown), len(shown), options.seed, schedule=schedule, guidance=options.guidance,
                top_k=options.top_k, top_p=options.top_p,
            )
        )  # fmt: skip
    names = model.config.class_names or [str(label) for label in range(model.config.classes)]
    rows = [(str(names[label]).split(",")[0], [column[label] for column in columns]) for label in shown]
    out.mkdir(parents=True, exist_ok=True)
    save_png(comparison_sheet(rows, options.sizes, scale=2), out / "sizes.png", overwrite=True)
    curve(figures["steps"], out / "steps.png")
    write_text(json.dumps(figures, indent=2) + "\n", out / "figures.json")
    print(f"sizes.png, steps.png and figures.json are in {out}")


if __name__ == "__main__":
    main()
