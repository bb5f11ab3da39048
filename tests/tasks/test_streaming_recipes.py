"""Trainings on streamed shards: what recipes open, and a run that meets a broken shard, is stopped and goes on."""

import io
import json
import tarfile
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.training import TrainingConfig
from nextscale.datasets.stream_shards import open_stream_shards, write_index
from nextscale.datasets.streaming import StreamedImages
from nextscale.tasks.data import ImageData, stream, stream_shards
from nextscale.tasks.generation.controls import Extraction
from nextscale.tasks.generation.controlvar_data import Kinds, PairDataset
from nextscale.tasks.generation.text_recipe import CaptionData
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.generation.var_recipe import VARRecipe
from nextscale.tasks.tokenizers.recipe import TokenizerRecipe, example_images


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Three shards of eight images with labels and texts, in an index."""
    monkeypatch.setenv("NEXTSCALE_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for i in range(8):
                buffer = io.BytesIO()
                Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "png")
                files = {"png": buffer.getvalue(), "cls": b"%d" % (i % 5), "txt": b"noise %d" % (8 * number + i)}
                for suffix, data in files.items():
                    member = tarfile.TarInfo(f"{number}{i}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    write_index(tmp_path / "train.json", open_stream_shards(str(tmp_path / "{0..2}.tar")))
    stream_shards.cache_clear()
    return str(tmp_path / "train.json")


def recipe(source: str, folder: Path, **changes: Any) -> TokenizerRecipe:
    return TokenizerRecipe(
        data=ImageData(source, size=8, resize_ratio=1.0, shuffle_buffer=3),
        training=TrainingConfig(str(folder), **{"epochs": 2.0, "batch_size": 8, "log_every": 1, **changes}),
        scales="1 2",
        autoencoder=AutoencoderConfig(8, (1, 1, 1), 1, latent_channels=4, attention=False, norm_groups=4),
        quantizer=QuantizerConfig(vocabulary=16, channels=4),
    )


def load(source: str, tokenizer: Any = None) -> Any:
    raise AssertionError(f"nothing is loaded, and {source} was")


def test_a_run_meets_a_broken_shard_is_stopped_and_goes_on(shards: str, tmp_path: Path) -> None:
    whole = Path(shards).parent / "1.tar"
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    unbroken = recipe(shards, tmp_path / "unbroken").trainer(load)
    assert (unbroken.steps, unbroken.samples_per_epoch) == (6, 24)
    unbroken.run()
    skipped = (tmp_path / "unbroken" / "skipped.txt").read_text().splitlines()
    assert len(skipped) == 1 and skipped[0].startswith(f"{whole} (from sample ")
    log = [json.loads(line) for line in (tmp_path / "unbroken" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["skipped"] == 1

    run = recipe(shards, tmp_path / "stopped").trainer(load)

    class Stop(Exception): ...

    def stop(step: int, *_: Any) -> None:
        if step == 4:
            run.save()
            raise Stop

    run.hooks.progress = stop
    with pytest.raises(Stop):
        run.run()
    again = recipe(shards, tmp_path / "stopped").trainer(load)
    again.run()
    states = [r.task.phases["tokenizer" if "tokenizer" in r.task.phases else next(iter(r.task.phases))].state_dict()
              for r in (unbroken, again)]  # fmt: skip
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_pictures_of_a_run_come_from_the_stream(shards: str) -> None:
    assert example_images(ImageData(shards, size=8), seed=0).shape == (8, 3, 8, 8)


def test_classes(shards: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    options: dict[str, Any] = {"tokenizer": "x", "depth": 1, "width": 16, "heads": 2}
    data = ImageData(shards, size=8, resize_ratio=1.0)
    training = TrainingConfig(str(tmp_path), epochs=0.4, batch_size=8, log_every=1)
    made = VARRecipe(data=data, classes=5, training=training, **options).trainer(lambda *_: tokenizer)
    model = made.task.phases["var"]
    assert isinstance(model, VAR) and model.config.classes == 5
    made.run()
    assert made.step == 1
    with pytest.raises(ValueError, match="streamed do not say how many classes there are: give classes"):
        VARRecipe(data=data, training=training, **options).open()
    one = VARRecipe(data=data, classes=1, training=training, **options).open()
    assert next(stream(one, training)(0, 4))["label"].tolist() == [0] * 4


def test_texts(shards: str) -> None:
    config = TrainingConfig(batch_size=4)
    beside = CaptionData(shards, size=8, resize_ratio=1.0).open_texts(0)
    for batch in islice(stream(beside, config)(0, 4), 3):
        assert batch["text"] == [f"noise {index}" for index in batch["index"].tolist()]
        assert set(batch) >= {"image", "label", "index", "epoch", "uniform", "name", "skipped", "text"}
    assert beside.fetch([3, 9])["text"] == ["noise 3", "noise 9"]
    with pytest.raises(ValueError, match="name a text_encoder"):
        beside.vocabulary()
    names = ["ant", "bee", "cow", "dog", "eel"]
    told = CaptionData(shards, size=8, captions="classes", template="one {class}", class_names=names).open_texts(0)
    batch = next(stream(told, config)(0, 4))
    assert batch["text"] == [f"one {names[label]}" for label in batch["label"].tolist()]
    assert told.vocabulary() == ["one ant bee cow dog eel"]
    with pytest.raises(ValueError, match="give class_names"):
        CaptionData(shards, size=8, captions="classes").open_texts(0)


def test_local_shards_are_streamed_only_when_told(shards: str) -> None:
    local = str(Path(shards).parent / "*.tar")
    assert not isinstance(ImageData(local, size=8).training_images(0, labels=False), StreamedImages)
    told = ImageData(local, size=8, streaming=True, lanes=6)
    images = told.training_images(0, labels=False)
    assert isinstance(images, StreamedImages) and len(images) == 24 and images.plan(2).lanes == 6
    with pytest.raises(ValueError, match="can only be streamed, and here images are read in any order"):
        told.open_training(0, labels=False)
    with pytest.raises(ValueError, match="give held-out images in a folder"):
        ImageData(local, validation="https://host/a.tar").open_validation(labels=False)
    pairs: Any = images
    with pytest.raises(ValueError, match="cannot be streamed"):
        PairDataset(pairs, Kinds((Extraction("canny", 100, 200),), None), [])
