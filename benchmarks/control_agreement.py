"""How closely a model's images follow their control: F1 of canny edges, beside samples without control.

    python benchmarks/control_agreement.py MODEL [MODEL …] --images TEST --out FOLDER

Canny edges of test images are given to each model (CAR or ControlVAR) with the image's class; the edges of what it
draws are compared with the control, and so are those of samples of the same class and seed without a control. The
tokenizer's reconstruction of the image itself says how well its codes can follow edges at all. The sheet shows edges
and samples only: its controls come from the model's own samples without control.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import nextscale
from nextscale.core.checkpoint import write_json
from nextscale.datasets.images import open_images
from nextscale.evaluation.control import edge_agreement
from nextscale.pictures import comparison_sheet, save_png
from nextscale.tasks.generation.controls import Extraction, edges_of, extract_batch
from nextscale.tasks.generation.drawing import class_name

TOLERANCES = (0, 1)
"""Pixels by which edges may lie beside each other; the first is what the ratio is taken of."""
SHOWN, SEEDS = 8, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--images", required=True, help="test images with classes")
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--guidance", type=float, help="unless given, each model's own")
    parser.add_argument("--top-k", type=int, default=900)
    parser.add_argument("--top-p", type=float, default=0.96)
    parser.add_argument("--low", type=int, help="canny's thresholds; unless given, those each model was trained with")
    parser.add_argument("--high", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    out, results = Path(options.out), []
    for source in options.models:
        model = nextscale.load(source)
        result = measure(model, source, options)
        results.append(result)
        name = Path(source).parent.name if Path(source).name == "model" else Path(source).name
        save_png(sheet(model, extraction_of(model, options), options), out / f"{name}.png", overwrite=True)
        for tolerance, figures in result["tolerance"].items():
            print(
                f"{source}, {tolerance} pixels: controlled {figures['controlled']:.3f}, "
                f"without control {figures['uncontrolled']:.3f}, ratio {figures['ratio']:.2f}; "
                f"reconstructed {figures['reconstructed']:.3f}"
            )
    write_json(out / "control_agreement.json", {"settings": vars(options), "models": results})
    print(f"written: {out / 'control_agreement.json'}")


def extraction_of(model: Any, options: argparse.Namespace) -> Extraction:
    """How the model's control pictures were made, or are to be."""
    config = model.config
    made = [getattr(config, "extraction", None), *getattr(config, "extractions", ())]
    how = next((each for each in made if each is not None and each.kind == "canny"), None) or Extraction("canny")
    return replace(how, **{k: v for k in ("low", "high") if (v := getattr(options, k)) is not None})


def draw(
    model: Any, labels: list[int], seeds: list[int], control: Tensor | None, options: argparse.Namespace
) -> Tensor:
    given: dict[str, Any] = {} if control is None else {"control": control, "control_type": "canny"}
    sampling = {"guidance": options.guidance, "top_k": options.top_k, "top_p": options.top_p}
    images: Tensor = model.generate(labels, len(labels), seeds, batch_size=50, **sampling, **given)
    return images


def measure(model: Any, source: str, options: argparse.Namespace) -> dict[str, Any]:
    """Mean agreement of controlled, uncontrolled and reconstructed images with the control."""
    how, size = extraction_of(model, options), model.tokenizer.image_size()[0]
    dataset = open_images(options.images, size=size, crop="center", resize_ratio=1.0).require_labels()
    number = min(options.number, len(dataset))
    batch = dataset.fetch([i * (len(dataset) // number) for i in range(number)])
    photos, labels = (batch["image"] + 1) / 2, batch["label"].tolist()
    control = extract_batch(photos, how)
    seeds = [options.seed + i for i in range(number)]
    begun = time.perf_counter()
    pictures = {"controlled": draw(model, labels, seeds, control, options)}
    seconds = time.perf_counter() - begun
    pictures["uncontrolled"] = draw(model, labels, seeds, None, options)
    with torch.no_grad():
        tokens = model.tokenizer.encode(batch["image"].to(model.device))
        pictures["reconstructed"] = (model.tokenizer.decode(tokens).cpu() + 1) / 2
    wanted = [edges_of(photo, how.low, how.high) for photo in photos]
    found = {name: [edges_of(image, how.low, how.high) for image in images] for name, images in pictures.items()}
    figures: dict[str, Any] = {}
    for tolerance in TOLERANCES:
        means = {
            name: float(np.mean([edge_agreement(a, b, tolerance).f1 for a, b in zip(wanted, edges, strict=True)]))
            for name, edges in found.items()
        }
        figures[str(tolerance)] = {**means, "ratio": means["controlled"] / max(means["uncontrolled"], 1e-9)}
    density = {name: float(np.mean(edges)) for name, edges in {"control": wanted, **found}.items()}
    return {
        "model": source,
        "images": number,
        "extraction": asdict(how),
        "tolerance": figures,
        "edge_density": density,
        "seconds_per_image": seconds / number,
    }


def sheet(model: Any, how: Extraction, options: argparse.Namespace) -> Any:
    """Controls from the model's own samples, and what it draws from each of them."""
    count = min(SHOWN, model.config.classes)
    labels = [model.config.classes * i // count for i in range(count)]
    control = extract_batch(draw(model, labels, [1000 + options.seed] * count, None, options), how)
    columns = [draw(model, labels, [options.seed + i] * count, control, options) for i in range(SEEDS)]
    rows = [
        (class_name(model, label), [control[row], *(column[row] for column in columns)])
        for row, label in enumerate(labels)
    ]
    headings = ["control", *(f"seed {options.seed + i}" for i in range(SEEDS))]
    return comparison_sheet(rows, headings, scale=max(1, 128 // control.shape[-1]))


if __name__ == "__main__":
    main()
