"""Depth models on held-out pairs against maps that look at no photo; and how long a photo and a folder take.

    python benchmarks/depth_quality.py MODEL [MODEL ...] --train SCENES --test SCENES --out FOLDER

Predictions are compared after median alignment, as models of relative depth need it, and metric ones also as they are.
Two floors stand beside them: the best constant, which after alignment is any constant, and the mean map of the
training pairs. With --speed the first model's command is timed in processes of its own, loading included, on photos of
640 x 480 and 4000 x 3000 pixels, and 654 predictions of 640 x 480 are evaluated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine
from PIL import Image

import nextscale
from nextscale.core.checkpoint import write_json, write_text
from nextscale.datasets.depth import DepthSource, open_source
from nextscale.evaluation.depth import depth_metrics, mean_over_images
from nextscale.evaluation.depth_alignment import align
from nextscale.pictures import comparison_sheet, depth_picture, save_png
from nextscale.tasks.depth.predictor import DepthModel

METRICS = ("abs_rel", "rmse", "d1", "d2", "d3")
SHOWN = 6
PHOTOS = {"640 x 480": (480, 640), "4000 x 3000": (3000, 4000)}
PREDICTIONS = 654

Predict = Callable[[int], np.ndarray]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names, files or folders")
    parser.add_argument("--train", required=True, help="prepared pairs that the models learned from: the mean map")
    parser.add_argument("--test", required=True, help="prepared pairs that they never saw")
    parser.add_argument("--limit", type=int, help="only so many of them")
    parser.add_argument("--device")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--out", required=True)
    return parser


# --- quality ------------------------------------------------------------------------------------------


def mean_map(pairs: DepthSource, shape: tuple[int, int]) -> np.ndarray:
    """Mean depth of the training pairs, pixel by pixel, where it is known."""
    total, count = np.zeros(shape), np.zeros(shape)
    for index in range(len(pairs)):
        depth, valid = pairs.depth(index)
        total[valid] += depth[valid]
        count += valid
    return total / np.maximum(count, 1)


def compare(predict: Predict, pairs: DepthSource, count: int, aligned: bool) -> dict[str, float]:
    """Means over images of each metric."""
    found = []
    for index in range(count):
        depth, valid = pairs.depth(index)
        truth, prediction = depth[valid].astype(np.float64), predict(index)[valid].astype(np.float64)
        if aligned:
            prediction = align(truth, prediction, "median")(prediction)
        found.append(depth_metrics(truth, np.maximum(prediction, 1e-3), METRICS))
    return mean_over_images(found)


def predictions(model: DepthModel, pairs: DepthSource, count: int) -> list[np.ndarray]:
    maps = []
    for index in range(count):
        photo = torch.from_numpy(pairs.image(index).copy()).permute(2, 0, 1).float() / 255
        maps.append(model.predict(photo).depth.numpy())
    return maps


def quality(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    train, test = open_source("scenes", options.train), open_source("scenes", options.test)
    count = min(len(test), options.limit or len(test))
    average = mean_map(train, test.depth(0)[0].shape)
    rows = {
        "best constant": {"aligned": compare(lambda index: np.ones_like(average), test, count, aligned=True)},
        "mean map of the training pairs": {"aligned": compare(lambda index: average, test, count, aligned=True)},
    }
    shown = [
        (f"scene {index}", [test.image(index).transpose(2, 0, 1), _colours(test, index)])
        for index in range(min(SHOWN, count))
    ]
    for name in options.models:
        model = nextscale.load(name, device=options.device)
        maps = predictions(model, test, count)
        rows[name] = {"aligned": compare(maps.__getitem__, test, count, aligned=True)}
        if model.unit == "metre":
            rows[name]["metric"] = compare(maps.__getitem__, test, count, aligned=False)
        for (_, pictures), index in zip(shown, range(count), strict=False):
            pictures.append(_colours(test, index, maps[index]))
    headings = ["photo", "truth", *(Path(name).name for name in options.models)]
    save_png(comparison_sheet(shown, headings), out / "depth.png", overwrite=True)
    return {"images": count, "training_pairs": len(train), "figures": rows}


def _colours(pairs: DepthSource, index: int, prediction: np.ndarray | None = None) -> Any:
    """The true depth, or a prediction aligned to it, in the truth's colours."""
    depth, valid = pairs.depth(index)
    near, far = float(depth[valid].min()), float(depth[valid].max())
    if prediction is None:
        return depth_picture(np.where(valid, depth, 0), near=near, far=far)
    whole = prediction.astype(np.float64)
    scale = np.median(depth[valid]) / np.median(whole[valid])
    return depth_picture((whole * scale).clip(near, far), near=near, far=far)


def table(result: dict[str, Any]) -> str:
    lines = [["", "alignment", *METRICS], ["---"] * (2 + len(METRICS))]
    for name, figures in result["figures"].items():
        for kind, found in figures.items():
            word = "median" if kind == "aligned" else "none"
            lines.append([Path(name).name, word, *(f"{found[metric]:.3f}" for metric in METRICS)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- speed --------------------------------------------------------------------------------------------


def timed(words: list[str]) -> dict[str, float]:
    """Seconds of a command, and its largest resident size in GB."""
    script = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    command = [sys.executable, "-m", "nextscale.cli", *words]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *command], stdout=subprocess.PIPE, text=True, check=True)
    took = time.perf_counter() - start
    code, kilobytes = (int(word) for word in done.stdout.split())
    if code:
        raise RuntimeError(f"nextscale {' '.join(words)} ended with {code}")
    return {"seconds": took, "gigabytes": kilobytes * 1024 / 1e9}


def speed(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    test, figures = open_source("scenes", options.test), {}
    for name, (height, width) in PHOTOS.items():
        photo = out / f"photo-{width}.jpg"
        Image.fromarray(test.image(0)).resize((width, height), Image.Resampling.BICUBIC).save(photo)
        words = ["depth", str(photo), "--model", options.models[0], "--out", str(out / "photos"), "--overwrite"]
        figures[name] = min((timed(words) for _ in range(2)), key=lambda found: found["seconds"])
    folder = made_up(out / "folder")
    words = ["evaluate", "depth", str(folder / "predictions"), "--data", str(folder / "pairs.yaml")]
    words += ["--dataset", "folder", "--out", str(out / "evaluation"), "--top", "0"]
    shutil.rmtree(out / "evaluation", ignore_errors=True)  # else it would go on from there, at once
    found = timed(words)
    return {"photos": figures, "predictions_per_second": PREDICTIONS / found["seconds"]}


def made_up(folder: Path) -> Path:
    """A data set of PNG files and a folder of predictions for it."""
    rng = np.random.default_rng(0)
    for name in ("photos", "depths", "predictions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(PREDICTIONS):
        coarse = rng.uniform(1, 8, (6, 8)).astype(np.float32)
        # Bicubic interpolation oversteps, even below zero.
        truth = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)).clip(1, 8)
        Image.fromarray((truth * 1000).astype(np.uint16)).save(folder / "depths" / f"{index:03}.png")
        np.save(folder / "predictions" / f"{index:03}.npy", (truth * rng.uniform(0.8, 1.2)).astype(np.float32))
        Image.new("RGB", (640, 480)).save(folder / "photos" / f"{index:03}.jpg")
    lines = ["image: photos/{name}.jpg", "depth: depths/{name}.png", "encoding: nyu"]
    write_text("\n".join(lines) + "\n", folder / "pairs.yaml")
    return folder


def main() -> None:
    options = arguments().parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    result = {**quality(options, out), "machine": machine(torch.device(options.device or "cpu"))}
    text = table(result)
    print(text)
    if options.speed:
        result["speed"] = speed(options, out)
        print(json.dumps(result["speed"], indent=1))
    write_json(out / "figures.json", result)
    write_text(f"{text}\n", out / "table.md")
    print(f"figures, table and picture are in {out}")


if __name__ == "__main__":
    main()
