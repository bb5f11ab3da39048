"""What compression saves, and what it costs: attention really computed, bytes held, time, and the pictures.

    python benchmarks/litevar.py var-cifar10 --lite PLAN --classifier FILE --real TEST --out FOLDER

PLAN is a folder that `nextscale calibrate` wrote. Both models draw the same classes with the same random numbers, used
so that what is equally probable under both is equally drawn: only then does the difference of two Fréchet distances
come from the models and not from the draws. Its spread is that of as many pictures taken again from those drawn. The
plain model is in bfloat16 where memory and time are compared. The classifier is a TorchScript file: images in [0, 1] ->
(features, logits); without one no distances are measured. `--depths` counts attention for models of VAR's shapes at 256
pixels, and measures the memory of a whole process of the first, with random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import in_child, in_turn, machine, median_ratio, peak_memory, random_model, reset_peak_memory
from generation_quality import batches
from rich.console import Console
from rich.table import Table
from torch import Tensor

import nextscale
from nextscale.core.accounting import nbytes
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import write_json
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import ImageDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.datasets.images import open_images
from nextscale.evaluation.classifier import load_classifier
from nextscale.evaluation.distances import Moments, frechet_distance
from nextscale.loading import cast
from nextscale.pictures import comparison_sheet, save_png
from nextscale.tasks.generation.drawing import class_name
from nextscale.tasks.generation.litevar import LiteConfig, LitePlan, compress
from nextscale.tasks.generation.litevar_attention import Work, lite_attention
from nextscale.tasks.generation.litevar_cache import Vectors
from nextscale.tasks.generation.litevar_calibration import attention_saved, early_share, scores_left
from nextscale.tasks.generation.litevar_packing import linears
from nextscale.tasks.generation.litevar_search import best_keys, late_scales, tile_attention
from nextscale.tasks.generation.var import VARConfig
from nextscale.tasks.tokenizers.residual_vq import SCHEDULE_256, ResidualVQConfig

SAMPLING: dict[str, Any] = {"top_k": 0, "top_p": 0.96}
AGAIN = 50
"""How often pictures are taken again for the spread."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lite", required=True, help="folder of the plan")
    parser.add_argument("--classifier", help="features for Fréchet distances")
    parser.add_argument("--real", help="test images")
    parser.add_argument("--limit", type=int, help="use only so many real images")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="where memory and time are measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--depths", type=int, nargs="*", default=[], help="such as 16 30")
    parser.add_argument("--scales", default=str(SCHEDULE_256), help="of --depths")
    parser.add_argument("--channels", type=int, default=160, help="of the tokenizer of --depths")
    parser.add_argument("--saving", type=float, default=0.75, help="of --depths")
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- memory and time ----------------------------------------------------------------------------------


def storage(model: Any, batch: int) -> dict[str, int]:
    """Bytes that drawing a batch holds: weights but the tokenizer's, places of windows, and the cache."""
    caches: list[Any] = []
    transformer = model.transformer
    allocate = transformer.allocate_cache

    def kept(*sizes: Any) -> Any:
        caches.append(allocate(*sizes))
        return caches[-1]

    transformer.allocate_cache = kept
    try:
        draw(model, batch)
    finally:
        del transformer.allocate_cache
    plans = [block.attention.plan for block in transformer.blocks] if hasattr(model, "plan") else []
    windows = sum(window.nbytes for plan in plans for window in plan.windows if window is not None)
    weights = nbytes(model) - nbytes(model.tokenizer)
    return {"weights": weights, "windows": windows, "cache": caches[-1].nbytes}


def draw(model: Any, batch: int) -> None:
    """All scales of a batch, without the image decoder, which is the same for both."""
    labels = (torch.arange(batch) % model.config.classes).to(model.device)
    for step in model.steps(labels, draws=model.draws(range(batch))):
        step.total.cpu()


def compare_resources(plain: Any, lite: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes and seconds of both, in bfloat16."""
    sides = {"plain": plain, "lite": lite}
    held = {name: storage(model, options.batch) for name, model in sides.items()}
    calls = {name: (lambda model=model: draw(model, options.batch)) for name, model in sides.items()}
    times = in_turn(calls, options.rounds, plain.device)
    return {
        "batch": options.batch,
        "bytes": held,
        "byte_ratio": sum(held["lite"].values()) / sum(held["plain"].values()),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "times_as_fast": median_ratio(times["plain"], times["lite"]),
    }


# --- pictures -----------------------------------------------------------------------------------------


class RacingDraws(ImageDraws):
    """Each symbol runs for an exponential time over its probability, and the first to arrive is drawn.

    The times are the same for both models, so that a symbol changes only where its probability does. Searching one
    uniform number in the summed probabilities would change it with those of all symbols before it.
    """

    def categorical(self, probabilities: Tensor) -> Tensor:
        return (probabilities / self.exponential(probabilities.shape, probabilities.device)).argmax(-1)


@torch.inference_mode()
def pictures(model: Any, labels: list[int], seeds: list[int]) -> Tensor:
    """One for each class and seed, (n, 3, height, width) in [0, 1]."""
    given = torch.tensor(labels, device=model.device)
    *_, last = model.steps(given, draws=RacingDraws(seeds), emitter=CategoricalEmitter(**SAMPLING))
    return model.picture(last.total).cpu()


def features(model: Any, classifier: Any, options: argparse.Namespace) -> Tensor:
    found, size = [], 100
    for start in range(0, options.samples, size):
        numbers = range(start, min(start + size, options.samples))
        labels, seeds = [i % model.config.classes for i in numbers], [options.seed + i for i in numbers]
        found.append(classifier(pictures(model, labels, seeds))[0])
    return torch.cat(found)


def difference(drawn: dict[str, Tensor], real: Moments) -> dict[str, Any]:
    """Fréchet distances to real images, and the spread of their difference over pictures taken again."""
    distances = {name: frechet_distance(each, real) for name, each in drawn.items()}
    generator, again = torch.Generator().manual_seed(0), list[float]()
    for _ in range(AGAIN):
        chosen = torch.randint(len(drawn["plain"]), (len(drawn["plain"]),), generator=generator)
        plain, lite = (frechet_distance(drawn[name][chosen], real) for name in ("plain", "lite"))
        again.append((lite - plain) / distances["plain"])
    return {
        "frechet": distances,
        "difference": distances["lite"] / distances["plain"] - 1,
        "difference_spread": statistics.stdev(again),
    }


def compare_quality(plain: Any, lite: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Fréchet distances to real images, of the same seeds."""
    classifier = load_classifier(options.classifier)
    real_images = open_images(options.real, size=plain.tokenizer.image_size()[0], crop="center", resize_ratio=1.0)
    real = Moments.of(torch.cat([classifier(images)[0] for images, _ in batches(real_images, limit=options.limit)]))
    lite.attention_work.clear()
    drawn = {name: features(model, classifier, options) for name, model in (("plain", plain), ("lite", lite))}
    return {
        "samples": options.samples,
        **difference(drawn, real),
        "frechet_between": frechet_distance(drawn["plain"], drawn["lite"]),
    }


def sheet(plain: Any, lite: Any, out: Path, seed: int) -> None:
    """The same classes and seeds from both."""
    classes, columns = min(plain.config.classes, 10), 6
    labels = [label for label in range(classes) for _ in range(columns)]
    both = [pictures(model, labels, [seed + i for i in range(len(labels))]) for model in (plain, lite)]
    rows = []
    for label in range(classes):
        part = slice(label * columns, (label + 1) * columns)
        rows.append((class_name(plain, label), [*both[0][part], *both[1][part]]))
    headings = ["plain", *[""] * (columns - 1), "lite", *[""] * (columns - 1)]
    save_png(
        comparison_sheet(rows, headings, scale=max(1, 64 // both[0].shape[-1])), out / "samples.png", overwrite=True
    )


def bars(resources: dict[str, Any], out: Path) -> None:
    """Bytes of weights and cache, plain and lite."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 2.2), layout="constrained")
    bottom = [0.0, 0.0]
    for part, colour in (("weights", "#35618f"), ("windows", "#8a8a8a"), ("cache", "#c9822b")):
        sizes = [resources["bytes"][side][part] / 1e6 for side in ("plain", "lite")]
        axes.barh(["bfloat16", "lite"], sizes, left=bottom, label=part, color=colour)
        bottom = [a + b for a, b in zip(bottom, sizes, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(f"MB to draw {resources['batch']} images")
    axes.legend(frameon=False, ncols=3, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "memory.png", dpi=150)
    plt.close(figure)


# --- models of VAR's shapes ---------------------------------------------------------------------------


def nearby_attention(schedule: ScaleSchedule, heads: int) -> dict[int, Tensor]:
    """Attention that falls off with the distance on the map, faster in some heads: random weights have none such."""
    reach = torch.linspace(0.1, 1, heads)[:, None, None]
    found = {}
    for index in late_scales(schedule):
        places = [_places(schedule, j) for j in range(index + 1)]
        apart = torch.cdist(places[-1], torch.cat(places))
        older = torch.cat([torch.full((n,), float(index - j)) for j, n in enumerate(schedule.lengths[: index + 1])])
        weights = (-apart / reach - 0.3 * older).softmax(-1)
        found[index] = tile_attention(weights, schedule, index)[None]
    return found


def _places(schedule: ScaleSchedule, index: int) -> Tensor:
    """Centres of a scale's cells, in a square of side 1."""
    height, width = schedule[index].grid
    rows, columns = (torch.arange(n).add(0.5) / n for n in (height, width))
    return torch.cartesian_prod(rows, columns)


def shape_plan(depth: int, options: argparse.Namespace, names: list[str]) -> LitePlan:
    schedule = ScaleSchedule.parse(options.scales)
    late = late_scales(schedule)[0]
    left = scores_left(options.saving, 2, early_share(schedule, late))
    # Blocks are alike here: one is searched, and its keys taken for all.
    keys = best_keys(nearby_attention(schedule, depth), schedule, left)
    precision = {name: 16 if "contract" in name else 8 for name in names}
    every = {index: kept.expand(depth, -1, -1, -1) for index, kept in keys.items()}
    return LitePlan(LiteConfig(schedule, precision, share_from=late), keys=every)


def left_out(plan: LitePlan) -> float:
    """The share of scores that windows leave out, whatever is shared: what the published formula starts from."""
    return attention_saved(LitePlan(replace(plan.config, share_from=None), plan.widths, plan.keys), 1)


def count_attention(depth: int, options: argparse.Namespace) -> dict[str, Any]:
    """The attention of one image with guidance, counted by the attention itself; on no data, so at no cost."""
    plan, work = shape_plan(depth, options, []), Work()
    schedule, meta = plan.config.schedule, torch.device("meta")
    assert plan.config.share_from is not None
    one, two = (Vectors.of(torch.empty(n, schedule.length, depth, 64, device=meta)) for n in (1, 2))
    for index, ((_, stop), window) in enumerate(zip(schedule.ranges, plan.windows(0), strict=True)):
        keys = one if index >= plan.config.share_from else two
        query = torch.empty(keys.rows, schedule.lengths[index], depth, 64, device=meta)
        place = None if window is None else window.to(meta)
        lite_attention(query, keys, two, stop, 1.0, window=place, work=work)
    return {
        "depth": depth,
        "full_gflop": 2 * work.full * depth / 1e9,
        "done_gflop": 2 * work.done * depth / 1e9,
        "saved": work.saved,
        "scores_left_out": left_out(plan),
        "published_formula": 1 - (1 - left_out(plan)) / 2,
    }


def measure_process(options: argparse.Namespace) -> None:
    """In a process of its own: print the largest memory of drawing a batch with one side."""
    depth = options.depths[0]
    config = VARConfig.of_depth(depth, schedule=ScaleSchedule.parse(options.scales))
    tokenizer = ResidualVQConfig(AutoencoderConfig(channels=options.channels), schedule=config.schedule)
    model = random_model(config, tokenizer)
    if options.only == "lite":
        compress(model, shape_plan(depth, options, [name for name, _ in linears(model)]))
    cast(model, torch.bfloat16)
    held = storage(model, options.batch)
    reset_peak_memory(torch.device("cpu"))
    draw(model, options.batch)
    print(json.dumps({"peak": peak_memory(torch.device("cpu")), "bytes": held}))


# --- the report ---------------------------------------------------------------------------------------


def main() -> None:
    options = arguments()
    if options.only:
        measure_process(options)
        return
    out, console = Path(options.out), Console()
    plain, lite = nextscale.load(options.model), nextscale.load(options.model, lite=options.lite)
    result: dict[str, Any] = {"machine": machine(plain.device), "plan": lite.plan.config.measured}
    began = time.perf_counter()
    if options.classifier:
        result["quality"] = compare_quality(plain, lite, options)
        console.print(f"Fréchet distances {result['quality']} in {time.perf_counter() - began:.0f} s")
    sheet(plain, lite, out, options.seed)
    work = lite.attention_work
    result["attention"] = {
        "saved": work.saved,
        "scores_left_out": left_out(lite.plan),
        "published_formula": 1 - (1 - left_out(lite.plan)) / 2,
    }
    plain, lite = (nextscale.load(options.model, dtype="bfloat16", lite=each) for each in (None, options.lite))
    result["resources"] = compare_resources(plain, lite, options)
    bars(result["resources"], out)
    result["shapes"] = [count_attention(depth, options) for depth in options.depths]
    if options.depths:
        sides = {side: in_child([*sys.argv[1:], "--only", side]) for side in ("plain", "lite")}
        result["process"] = {"depth": options.depths[0], "batch": options.batch, **sides}
    table = Table("figure", "value")
    for name, value in _flat(result):
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    settings = {name: value for name, value in vars(options).items() if name != "only"}
    console.print(
        f"written: {write_json(out / 'litevar.json', {'settings': settings, **result})}, samples.png, memory.png"
    )


def _flat(value: dict[str, Any], path: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, each in value.items():
        if name in ("divergence", "machine"):
            continue
        if isinstance(each, list):
            each = {str(i): item for i, item in enumerate(each)}
        rows += _flat(each, f"{path}{name}.") if isinstance(each, dict) else [(path + name, each)]
    return rows


if __name__ == "__main__":
    main()
