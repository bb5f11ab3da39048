"""A small VAR and its tokenizer trained on a folder of images by one process and by two; ``test_processes.py`` reads
the results."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import read_folder, write_json
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.training import TrainingConfig
from nextscale.tasks.data import ImageData
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.generation.var_recipe import VARRecipe
from nextscale.tasks.tokenizers.recipe import TokenizerRecipe
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ
from nextscale.tasks.tokenizers.training import TokenizerLossConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from processes import launch, warm_up  # beside this folder, also where it runs as a program

STEPS = 50


def load(source: str, tokenizer: Any = None) -> Any:
    state, config = read_folder(source)
    return (VAR if config["system"] == "var" else ResidualVQ).from_saved(state, config)


def images(folder: Path) -> str:
    """Twenty images of two classes: the last of an epoch's batches is filled."""
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(10):
            pixels = np.random.default_rng(i + 100 * (label == "dog")).integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(pixels).resize((18, 18)).save(folder / label / f"{i}.png")
    return str(folder)


def tokenizer_recipe(source: str, folder: Path, sharding: Any) -> TokenizerRecipe:
    """Both phases from the first step on."""
    return TokenizerRecipe(
        data=ImageData(source, size=16, flip=True, resize_ratio=1.125),
        training=TrainingConfig(
            str(folder), epochs=2, batch_size=8, learning_rate=1e-3, log_every=1, sharding=sharding, average=0.9
        ),
        scales="1 2 4",
        autoencoder=AutoencoderConfig(8, (1, 1, 1), 1, latent_channels=4, attention=False, norm_groups=4),
        quantizer=QuantizerConfig(vocabulary=16, channels=4),
        loss=TokenizerLossConfig(
            adversarial=0.5, adversarial_start=0, discriminator_channels=8, discriminator_levels=1
        ),
    )


def var_recipe(source: str, tokenizer: str, folder: Path, **changes: Any) -> VARRecipe:
    training = TrainingConfig(
        str(folder), epochs=STEPS * 8 / 20, batch_size=8, learning_rate=0.05, log_every=1, average=0.9, save_every=0
    )
    return VARRecipe(
        data=ImageData(source, validation=source, size=16, flip=True, resize_ratio=1.125),
        tokenizer=tokenizer,
        depth=2,
        width=32,
        heads=2,
        drop_path=0.2,
        label_drop=0.3,
        training=replace(training, **changes),
    )


def run(recipe: Any) -> list[dict[str, float]]:
    """The log of a run; the main process keeps the model."""
    runner = recipe.trainer(load)
    runner.run()
    if runner.processes.main:
        recipe.finish(runner)
    log = Path(recipe.training.output) / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def alone(recipe: Any) -> list[dict[str, float]]:
    def child(rank: int) -> Any:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        return run(recipe)

    log: list[dict[str, float]] = launch(1, child)[0]
    return log


def main(folder: Path) -> None:
    warm_up()
    source, found = images(folder / "images"), {}
    found["tokenizer"] = alone(tokenizer_recipe(source, folder / "tokenizer", "none"))
    # A model without transformer blocks is copied, whatever is asked for.
    copied = tokenizer_recipe(source, folder / "tokenizer_2", "full")
    found["tokenizer_2"] = launch(2, lambda rank: run(copied))[0]
    model = str(folder / "tokenizer" / "model")
    found["alone"] = alone(var_recipe(source, model, folder / "alone"))
    for sharding in ("none", "full"):
        recipe = var_recipe(source, model, folder / sharding, sharding=sharding)
        found[sharding] = launch(2, lambda rank, recipe=recipe: run(recipe))[0]  # type: ignore[misc]
    write_json(folder / "results.json", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
