"""What a refiner costs in quality and gains in speed, for every number of drafted scales, as a table and a curve.

    python benchmarks/code_quality.py DRAFTER REFINER --classifier FILE --real TEST --out FOLDER

Draws the same classes and seeds with the drafter alone, with the pair for 1, 2, … drafted scales, and with the refiner
alone; all are timed in turn. The classifier is a TorchScript file: images in [0, 1] -> (features, logits).
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import in_turn, machine, median_ratio
from generation_quality import batches

import nextscale
from nextscale.core.checkpoint import write_atomically, write_json
from nextscale.datasets.images import open_images
from nextscale.evaluation.classifier import load_classifier
from nextscale.evaluation.distances import frechet_distance
from nextscale.evaluation.generation import FeatureSet
from nextscale.pictures import comparison_sheet, save_png
from nextscale.tasks.generation.code import CoDe


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafter", help="name, file or folder")
    parser.add_argument("refiner", help="name, file or folder")
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--real", required=True, help="test images, labelled")
    parser.add_argument("--per-class", type=int, default=200)
    parser.add_argument("--guidance", type=float, help="unless given, the drafter's own")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=0.96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use only so many real images")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each; one more is not counted")
    parser.add_argument("--out", required=True)
    return parser


def measure(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    drafter, refiner = nextscale.load(options.drafter), nextscale.load(options.refiner)
    classes, scales = drafter.config.classes, len(drafter.config.schedule)
    models = {scales: drafter}  # by the number of scales that the drafter draws
    models |= {drafted: CoDe([drafter, refiner], [drafted]).eval() for drafted in range(scales - 1, 0, -1)}
    models[0] = refiner
    sampling = {"guidance": options.guidance, "top_k": options.top_k, "top_p": options.top_p}
    if sampling["guidance"] is None:
        sampling["guidance"] = drafter.config.guidance

    classifier = load_classifier(options.classifier, device=drafter.device)
    real, size = FeatureSet(classifier), drafter.tokenizer.image_size()[0]
    for batch in batches(open_images(options.real, size=size, crop="center", resize_ratio=1.0), limit=options.limit):
        real.add(batch)

    def draw(model: Any, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(start, start + count) % classes
        seeds = [options.seed + start + i for i in range(count)]
        return model.generate(labels.tolist(), count, seeds, batch_size=count, **sampling), labels

    times = in_turn(
        {str(drafted): partial(draw, model, 0, options.batch) for drafted, model in models.items()},
        options.rounds,
        drafter.device,
    )
    total, figures, rows = options.per_class * classes, [], []
    for drafted, model in models.items():
        drawn = FeatureSet(classifier)
        for start in range(0, total, options.batch):
            drawn.add(draw(model, start, min(options.batch, total - start)))
        assert drawn.labels is not None
        name = {scales: "drafter alone", 0: "refiner alone"}.get(drafted, f"{drafted} scales drafted")
        taken = times[str(drafted)]
        figures.append(
            {
                "what": name,
                "drafted_scales": drafted,
                "images_per_second": options.batch / statistics.median(taken),
                "times_as_fast_as_the_drafter": median_ratio(times[str(scales)], taken),
                "classified": (drawn.logits.argmax(1) == drawn.labels).double().mean().item(),
                "frechet": frechet_distance(drawn.features, real.features),
            }
        )
        rows.append((name, list(draw(model, 0, classes)[0])))
    headings = list(drafter.config.class_names or map(str, range(classes)))
    save_png(comparison_sheet(rows, headings, scale=2), out / "samples.png", overwrite=True)
    return {
        "figures": figures,
        "images": total,
        "real_images": real.count,
        "batch": options.batch,
        "sampling": sampling,
        "machine": machine(drafter.device),
    }


def plot(figures: list[dict[str, Any]], path: Path) -> None:
    """Speed against both figures of quality; every point carries the number of drafted scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    speeds = [each["times_as_fast_as_the_drafter"] for each in figures]
    for axis, name, title, factor in (
        (axes[0], "frechet", "Fréchet distance (lower is better)", 1),
        (axes[1], "classified", "classified as asked, %", 100),
    ):
        values = [each[name] * factor for each in figures]
        axis.plot(speeds, values, marker="o", color="#2450b8")
        for each, x, y in zip(figures, speeds, values, strict=True):
            axis.annotate(f"{each['drafted_scales']}", (x, y), textcoords="offset points", xytext=(6, 6))
        axis.set(xlabel="times as fast as the drafter alone", title=title)
        axis.grid(alpha=0.3)
    figure.suptitle("Points: number of scales that the drafter draws")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    options = arguments().parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    result = measure(options, out)
    write_json(out / "figures.json", result)
    plot(result["figures"], out / "curve.png")
    table = Table("", "images/s", "x drafter", "classified as asked", "Fréchet distance")
    for each in result["figures"]:
        table.add_row(
            each["what"],
            f"{each['images_per_second']:.1f}",
            f"{each['times_as_fast_as_the_drafter']:.2f}",
            f"{each['classified']:.1%}",
            f"{each['frechet']:.3f}",
        )
    Console().print(table)
    print(
        f"{result['images']:,} images each, against {result['real_images']:,} real ones; figures and curve are in {out}"
    )


if __name__ == "__main__":
    main()
