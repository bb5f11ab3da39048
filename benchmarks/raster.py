"""Next-scale prediction against raster next-token prediction, on the same blocks, loop and cache.

    python benchmarks/raster.py --var MODEL --raster MODEL --classifier FILE --real TEST --out FOLDER
    python benchmarks/raster.py --depth 16 --batch 1

The first measures two trained models: their images in the features of a classifier (a TorchScript file: images in
[0, 1] -> (features, logits)), at several strengths of guidance, and the time that drawing takes. The second measures
the time alone, of models of any size with random weights. Times are of calls taken in turn in one process, with
guidance.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import PRECISIONS, in_turn, machine, median_ratio, random_model, synchronize
from torch import Tensor

import nextscale
from nextscale.cli.console import table
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import write_json
from nextscale.core.schedule import ScaleSchedule
from nextscale.datasets.images import open_images
from nextscale.evaluation.classifier import Classifier, load_classifier
from nextscale.evaluation.distances import frechet_distance, precision_recall
from nextscale.evaluation.generation import FeatureSet
from nextscale.loading import cast
from nextscale.pictures import comparison_sheet, save_png
from nextscale.planning import step_operations
from nextscale.tasks.generation.raster import Raster, raster_order
from nextscale.tasks.generation.var import VARConfig
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig

CHUNK = 100
"""Images drawn at once where quality is measured."""


# --- the models ---------------------------------------------------------------------------------------


def random_pair(options: argparse.Namespace) -> dict[str, Any]:
    """Two models of one depth with random weights, over the same finest grid."""
    schedule = ScaleSchedule.parse(options.scales)
    tokenizer = ResidualVQConfig(AutoencoderConfig(channels=options.channels), schedule=schedule)
    config = VARConfig.of_depth(options.depth, schedule=schedule)
    grid = ScaleSchedule((schedule.final,))
    raster = Raster(replace(config, schedule=raster_order(grid)), ResidualVQ(replace(tokenizer, schedule=grid)))
    with torch.no_grad():
        for parameter in (raster.start_position, raster.position_embedding):
            parameter.normal_(std=0.02)
    pair: dict[str, Any] = {"next-scale": random_model(config, tokenizer), "raster": raster.eval()}
    return {name: cast(model.to(options.device), PRECISIONS[options.dtype]) for name, model in pair.items()}


def sizes(model: Any) -> dict[str, Any]:
    """What is to be equal, and what is not."""
    blocks = sum(p.numel() for p in model.transformer.blocks.parameters())
    everything = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = model.tokenizer.config.schedule.length
    batch = {
        "tokens": torch.zeros(1, tokens, dtype=torch.long, device=model.device),
        "label": torch.zeros(1, dtype=torch.long, device=model.device),
        "uniform": torch.ones(1, device=model.device),
    }
    _, flops = step_operations(model.training_task(), model.system, model, batch, "bf16")
    return {
        "parameters of the blocks": blocks,
        "parameters": everything,
        "tokens": tokens,
        "passes": len(model.config.schedule),
        "training GFLOPs an image": flops / 1e9,
    }


def show_sizes(found: Mapping[str, dict[str, Any]]) -> str:
    keys = next(iter(found.values()))
    rows = [
        [key, *(f"{each[key]:,.4g}" if "GFLOPs" in key else f"{each[key]:,}" for each in found.values())]
        for key in keys
    ]
    return table(["", *found], rows)


# --- time ---------------------------------------------------------------------------------------------


def times(models: Mapping[str, Any], batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a batch with the image decoder and without, and how many times as fast the first model is."""
    device = next(iter(models.values())).device
    guidance = {name: strength if strength else 1.0 for name, strength in options.strengths.items()}

    def whole(name: str) -> None:
        models[name].generate(0, batch, 0, batch_size=batch, guidance=guidance[name])

    def alone(name: str) -> None:
        model = models[name]
        labels = torch.zeros(batch, dtype=torch.long, device=device)
        emitter = model.make_emitter(top_k=900, top_p=0.96)
        for _ in model.steps(labels, draws=model.draws(range(batch)), emitter=emitter, guidance=guidance[name]):
            pass
        synchronize(device)

    kinds = {"with decoding": whole, "transformer alone": alone}
    calls = {(kind, name): (lambda k=call, n=name: k(n)) for kind, call in kinds.items() for name in models}
    taken = in_turn({f"{kind}/{name}": call for (kind, name), call in calls.items()}, options.rounds, device)
    rows = []
    for kind in kinds:
        both = [taken[f"{kind}/{name}"] for name in models]
        seconds = {name: statistics.median(each) / batch for name, each in zip(models, both, strict=True)}
        rows.append({"batch": batch, "measured": kind, "seconds an image": seconds, "ratio": median_ratio(*both[::-1])})
    return rows


# --- quality ------------------------------------------------------------------------------------------


def real_images(options: argparse.Namespace, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in [0, 1] and labels."""
    dataset = open_images(options.real, size=size, crop="center", resize_ratio=1.0)
    count = min(len(dataset), options.limit or len(dataset))
    for start in range(0, count, 250):
        batch = dataset.fetch(range(start, min(start + 250, count)))
        yield (batch["image"] + 1) / 2, batch["label"]


def quality(
    model: Any, classifier: Classifier, real: FeatureSet, options: argparse.Namespace
) -> list[dict[str, float]]:
    """A row for every strength of guidance, with the distance that the tokenizer's own reconstructions have."""
    rebuilt = FeatureSet(classifier)
    for images, _ in real_images(options, model.tokenizer.image_size()[0]):
        tokens = model.tokenizer.encode(images.to(model.device) * 2 - 1)
        rebuilt.add((model.tokenizer.decode(tokens).cpu() + 1) / 2)
    least = frechet_distance(rebuilt.features, real.features)
    labels = torch.arange(model.config.classes).repeat_interleave(options.per_class)
    order = torch.randperm(real.count, generator=torch.Generator().manual_seed(options.seed))
    alike = real.features[order[: len(labels)]]
    rows = []
    for guidance in options.guidance:
        drawn = FeatureSet(classifier)
        for start in range(0, len(labels), CHUNK):
            part = labels[start : start + CHUNK].tolist()
            seeds = [options.seed + start + number for number in range(len(part))]
            drawn.add(model.generate(part, len(part), seeds, batch_size=CHUNK, guidance=guidance))
        spread = precision_recall(alike, drawn.features[: len(alike)], 3)
        rows.append(
            {
                "guidance": guidance,
                "distance": frechet_distance(drawn.features, real.features),
                "classified": float((drawn.logits.argmax(1) == labels).double().mean()),
                "precision": spread.precision,
                "recall": spread.recall,
                "distance of reconstructions": least,
            }
        )
    return rows


def show_quality(found: Mapping[str, list[dict[str, Any]]]) -> str:
    header = ["model", *next(iter(found.values()))[0]]
    rows = [[name, *(f"{value:.3f}" for value in row.values())] for name, each in found.items() for row in each]
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--var", help="trained model of next scales")
    parser.add_argument("--raster", help="trained model of next tokens")
    parser.add_argument("--classifier")
    parser.add_argument("--real", help="test images, labelled")
    parser.add_argument("--limit", type=int, help="use only so many real images")
    parser.add_argument("--per-class", type=int, default=200)
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 1.0, 2.0, 5.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--depth", type=int, default=16, help="of models with random weights")
    parser.add_argument("--scales", default="1 2 3 4 5 6 8 10 13 16", help="of the one; the other has the last alone")
    parser.add_argument("--channels", type=int, default=160, help="of their tokenizers")
    parser.add_argument("--dtype", choices=PRECISIONS, default="bfloat16", help="of their weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=3, help="calls of each; one more is not counted")
    parser.add_argument("--out", help="folder for figures.json and a sheet of samples")
    options = parser.parse_args()
    trained = options.var is not None
    if (options.var is None) != (options.raster is None) or (trained and None in (options.classifier, options.real)):
        parser.error("give --var, --raster, --classifier and --real together, or none of them")

    if trained:
        loaded = {"next-scale": options.var, "raster": options.raster}
        models = {name: nextscale.load(place, device=options.device) for name, place in loaded.items()}
    else:
        models = random_pair(options)
    result: dict[str, Any] = {"sizes": {name: sizes(model) for name, model in models.items()}}
    print(show_sizes(result["sizes"]))

    options.strengths = {name: model.config.guidance for name, model in models.items()}
    if trained:
        size = models["raster"].tokenizer.image_size()[0]
        classifier, found = load_classifier(options.classifier, device=options.device), {}
        real = FeatureSet(classifier)
        for batch in real_images(options, size):
            real.add(batch)
        for name, model in models.items():
            found[name] = quality(model, classifier, real, options)
            best = min(found[name], key=lambda row: row["distance"])
            options.strengths[name] = best["guidance"]
        result["quality"] = found
        print(f"\n{show_quality(found)}")
    result["times"] = [row for batch in options.batch for row in times(models, batch, options)]
    header = ["batch", "measured", *(f"{name}, seconds an image" for name in models), "times as fast"]
    rows = [
        [str(r["batch"]), r["measured"], *(f"{s:.4f}" for s in r["seconds an image"].values()), f"{r['ratio']:.1f}"]
        for r in result["times"]
    ]
    print(f"\n{table(header, rows)}")
    result["machine"] = machine(torch.device(options.device))
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    if options.out:
        out = Path(options.out)
        write_json(out / "figures.json", result)
        if trained:
            write_sheet(models, options, out / "samples.png")
        print(f"written: {out}")


def write_sheet(models: Mapping[str, Any], options: argparse.Namespace, path: Path) -> None:
    """A column for every class, two rows of each model, at the guidance that suits it best."""
    rows = []
    for name, model in models.items():
        classes = list(range(model.config.classes))
        for seed in (options.seed, options.seed + 1):
            seeds = [seed] * len(classes)
            images = model.generate(classes, len(classes), seeds, guidance=options.strengths[name])
            rows.append((name, list(images)))
    model = models["raster"]
    names = model.config.class_names or [str(label) for label in range(model.config.classes)]
    save_png(comparison_sheet(rows, list(names), scale=2), path, overwrite=True)


if __name__ == "__main__":
    main()
