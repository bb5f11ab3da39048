"""Models against the degraded input and the best of classical methods, and a photo of many megapixels.

    python benchmarks/restoration_quality.py MODEL [MODEL ...] --images TEST --tuning TRAIN --out FOLDER

Several models stand side by side, such as one trained with its prior and one without. Options of the classical methods
are those that do best on photographs of TRAIN, each degradation for itself; deconvolution is told the blur's kernel.
Figures are kept image by image: the same command goes on where it was stopped. With --large HEIGHTxWIDTH the first
model restores a photo of that size in a process of its own, stopped half-way and gone on with: memory and time.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from common import in_child, machine, peak_memory, reset_peak_memory

import nextscale
from nextscale.core.checkpoint import write_json, write_text
from nextscale.datasets.degradations import degrade, parse_steps
from nextscale.datasets.pairs import as_float, find_pairs, read_rgb
from nextscale.evaluation.classical import Classical, tuned
from nextscale.pictures import comparison_sheet, save_png
from nextscale.tasks.restoration.evaluation import Setting, evaluate, open_examples, summary
from nextscale.tasks.restoration.tiling import TileStore

TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Gaussian noise 25": ("noise25", ("nlm", "tv", "wavelet")),
    "JPEG quality 10": ("jpeg10", ("nlm", "tv", "wavelet")),
    "low light": ("low-light", ("gamma", "clahe")),
    "haze": ("hazy", ("dcp", "clahe", "gamma")),
    "defocus, radius 2": ("defocus:radius=2+noise:sigma=2", ("wiener", "lucy")),
    "rain": ("rain-heavy", ("nlm", "tv", "wavelet")),
}
"""Degradation and classical methods by name."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names, files or folders; none: the classical methods alone")
    parser.add_argument("--images", required=True, help="clean test photographs: a folder")
    parser.add_argument("--tuning", help="other clean photographs, for the classical methods' options")
    parser.add_argument("--tuning-images", type=int, default=4, help="how many of them, the middle of each")
    parser.add_argument("--tuning-side", type=int, default=160, help="side of that middle in pixels")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--limit", type=int, help="only so many test photographs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--protocol", default="basicsr")
    parser.add_argument("--device")
    parser.add_argument("--large", help="HEIGHTxWIDTH of a photo to be restored in tiles, such as 3000x4000")
    parser.add_argument("--out", required=True)
    parser.add_argument("--only-large", action="store_true", help=argparse.SUPPRESS)
    return parser


# --- quality ------------------------------------------------------------------------------------------


def tuning_pairs(options: argparse.Namespace, degradation: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pairs = []
    if options.tuning is None:
        return pairs
    for pair in find_pairs(options.tuning).items[: options.tuning_images]:
        assert pair.clean is not None
        clean = as_float(read_rgb(pair.clean))
        top, left = (max((side - options.tuning_side) // 2, 0) for side in clean.shape[-2:])
        middle = clean[:, top : top + options.tuning_side, left : left + options.tuning_side]
        pairs.append(degrade(middle, parse_steps(degradation), options.seed, pair.name))
    return pairs


def classical(options: argparse.Namespace, degradation: str, methods: tuple[str, ...]) -> dict[str, Classical]:
    """Each method with its best options; the defaults where there are no photographs to tune on."""
    pairs, found = tuning_pairs(options, degradation), {}
    kernels = [kernel for step in parse_steps(degradation) if (kernel := step.psf()) is not None]
    for method in methods:
        fixed: dict[str, Any] = {"psf": kernels[0]} if kernels else {}
        found[method] = tuned(method, pairs, fixed) if pairs else Classical(method, fixed)
    return found


def quality(options: argparse.Namespace, models: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    rows, sheet = [], []
    for task in options.tasks:
        degradation, methods = TASKS[task]
        setting = Setting(
            options.images, degradation, seed=options.seed, protocol=options.protocol, limit=options.limit
        )
        _, examples = open_examples(setting)
        tuned_methods = classical(options, degradation, methods)
        restorers = {name: (method.restore, f"classical:{method}") for name, method in tuned_methods.items()}
        restorers |= {name: (model.restore, name) for name, model in models.items()}
        figures: dict[str, Any] = {}
        folder = out / "figures" / degradation.replace(":", "-")
        for number, (name, (restore, owner)) in enumerate(restorers.items()):
            results = list(evaluate(restore, examples, folder / f"{number}-{Path(name).name}", owner))
            figures[name] = summary(results)
        best = max(methods, key=lambda name: figures[name]["output"]["psnr"])
        # One photograph of each task, by the best classical method and by every model.
        degraded, clean = examples[0].load()
        shown = [degraded, tuned_methods[best].restore(degraded)]
        shown += [model.restore(degraded).cpu().float().clamp(0, 1) for model in models.values()]
        sheet.append((task, [*shown, clean]))
        rows.append(
            {
                "task": task,
                "degradation": degradation,
                "images": len(examples),
                "input": figures[best]["input"],
                "best_classical": best,
                "classical": {name: figures[name]["output"] for name in methods},
                "options": {name: str(method) for name, method in tuned_methods.items()},
                "models": {name: figures[name]["output"] for name in models},
            }
        )
    headings = ["input", "best classical", *(Path(name).name for name in models), "truth"]
    save_png(comparison_sheet(sheet, headings), out / "sheet.png", overwrite=True)
    return rows


def table(rows: list[dict[str, Any]], models: list[str]) -> str:
    """Markdown: PSNR / SSIM, and the first model's lead over the input and the best classical method in dB."""

    def cell(figures: dict[str, float]) -> str:
        return f"{figures['psnr']:.2f} / {figures['ssim']:.4f}"

    header = ["degradation", "input", "best classical", *(Path(name).name for name in models)]
    header += ["over input, dB", "over classical, dB"] if models else []
    lines = [header, ["---"] * len(header)]
    for row in rows:
        best = row["classical"][row["best_classical"]]
        line = [row["task"], cell(row["input"]), f"{cell(best)} ({row['options'][row['best_classical']]})"]
        line += [cell(row["models"][name]) for name in models]
        if models:
            ours = row["models"][models[0]]["psnr"]
            line += [f"{ours - row['input']['psnr']:+.2f}", f"{ours - best['psnr']:+.2f}"]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- a large photo ------------------------------------------------------------------------------------


class Stopped(Exception):
    """The photo was stopped half-way, as asked."""


def large(options: argparse.Namespace) -> dict[str, Any]:
    """Restore one photo of the given size, stopped half-way and gone on with; figures of memory and time."""
    height, width = (int(side) for side in options.large.split("x"))
    first = find_pairs(options.images).items[0]
    assert first.clean is not None
    tile = as_float(read_rgb(first.clean))
    # The test photograph, mirrored over and over.
    while min(tile.shape[-2] - height, tile.shape[-1] - width) < 0:
        dim = -2 if tile.shape[-2] < height else -1
        tile = torch.cat([tile, tile.flip(dim)], dim)
    photo = degrade(tile[:, :height, :width].clone(), parse_steps("noise25"), options.seed)[0]
    model = nextscale.load(options.models[0], device=options.device)
    store = TileStore(Path(options.out) / "tiles", options.models[0])
    reset_peak_memory(model.device)
    tiles = 0

    def stop(done: int, total: int) -> None:
        nonlocal tiles
        tiles = total
        if done >= total / 2:
            raise Stopped

    start = time.perf_counter()
    with suppress(Stopped):
        model.restore(photo, progress=stop, store=store)
    stopped, calls = time.perf_counter() - start, []
    start = time.perf_counter()
    restored = model.restore(photo, progress=lambda done, total: calls.append(done), store=store)
    rest = time.perf_counter() - start
    store.clear()
    assert restored.shape == photo.shape and bool(torch.isfinite(restored).all())
    megapixels = height * width / 1e6
    return {
        "megapixels": megapixels,
        "tiles": tiles,
        "seconds_to_half": stopped,
        "seconds_from_there": rest,
        "seconds_per_megapixel": (stopped + rest) / megapixels,
        "peak_gigabytes": peak_memory(model.device) / 1e9,
        "reports_of_progress": len(calls),
    }


def main() -> None:
    options = arguments().parse_args()
    if options.large and not options.models:
        raise SystemExit("--large needs a model")
    if options.only_large:
        print(json.dumps(large(options)))
        return
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    models = {name: nextscale.load(name, device=options.device) for name in options.models}
    rows = quality(options, models, out)
    device = next(iter(models.values())).device if models else torch.device("cpu")
    result: dict[str, Any] = {"tasks": rows, "protocol": options.protocol, "machine": machine(device)}
    text = table(rows, options.models)
    print(text)
    if options.large:
        words = [options.models[0], "--images", options.images, "--large", options.large, "--out", options.out]
        words += ["--device", options.device] if options.device else []
        result["large"] = in_child([*words, "--only-large"])
        told = result["large"]
        line = (
            f"{told['megapixels']:.1f} megapixels in {told['tiles']} tiles, stopped half-way and gone on with: "
            f"{told['seconds_per_megapixel']:.1f} seconds per megapixel, {told['peak_gigabytes']:.2f} GB at most"
        )
        print(line)
        text += f"\n\n{line}"
    write_json(out / "figures.json", result)
    write_text(f"{text}\n", out / "table.md")
    print(f"figures, table and sheet are in {out}")


if __name__ == "__main__":
    main()
