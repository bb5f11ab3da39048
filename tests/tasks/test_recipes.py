"""Recipes from images to a model that generates, and the errors they name."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.checkpoint import read_folder
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.training import TrainingConfig
from nextscale.datasets.images import open_images
from nextscale.tasks.data import ImageData, stream
from nextscale.tasks.generation.var import VAR
from nextscale.tasks.generation.var_finetune import LoRAConfig
from nextscale.tasks.generation.var_recipe import VARRecipe
from nextscale.tasks.tokenizers.recipe import TokenizerRecipe
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ
from nextscale.tasks.tokenizers.tokenize import fingerprint, write_tokens


@pytest.fixture(scope="module")
def images(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.images(tmp_path_factory.mktemp("data") / "images", side=16))


def training(folder: Path, **changes: Any) -> TrainingConfig:
    usual = {"epochs": 3, "batch_size": 8, "log_every": 1, "save_every": 2, "average": 0.9, "warmup_epochs": 0}
    return TrainingConfig(str(folder), **{**usual, **changes})


def tokenizer_recipe(images: str, folder: Path, **changes: Any) -> TokenizerRecipe:
    return TokenizerRecipe(
        data=ImageData(images, validation=images, size=16, flip=True, resize_ratio=1.0),
        training=training(folder),
        scales="1 2 4",
        autoencoder=AutoencoderConfig(8, (1, 1, 1), 1, latent_channels=4, attention=False, norm_groups=4),
        quantizer=QuantizerConfig(vocabulary=16, channels=4),
        **changes,
    )


def load(source: str, tokenizer: ResidualVQ | None = None) -> Any:
    state, config = read_folder(source)
    return (VAR if config["system"] == "var" else ResidualVQ).from_saved(state, config)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(images: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The whole way: a tokenizer, its tokens, a VAR; each after three steps."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = tokenizer_recipe(images, folder / "tokenizer")
    run = recipe.trainer(load)
    run.run()
    tokenizer = recipe.finish(run)
    opened = open_images(images, size=16, resize_ratio=1)
    tokens = write_tokens(ResidualVQ.load(tokenizer), opened, folder / "tokens")
    var = VARRecipe(
        tokenizer=str(tokenizer),
        tokens=str(tokens),
        validation_tokens=str(tokens),
        depth=1,
        width=16,
        heads=2,
        training=training(folder / "var"),
    )
    run = var.trainer(load)
    run.run()
    return SimpleNamespace(
        folder=folder, tokenizer=str(tokenizer), tokens=str(tokens), recipe=var, var=str(var.finish(run))
    )


def test_from_images_to_images(trained: SimpleNamespace) -> None:
    log = rows(trained.folder / "tokenizer")
    assert [row["step"] for row in log] == [1, 2, 3, 3]
    assert log[-1]["validation/psnr"] > 0
    log = rows(trained.folder / "var")
    assert log[-1].keys() >= {"validation/cross_entropy_last", "validation/accuracy"}
    assert log[-1]["validation/loss"] == pytest.approx(log[-1]["validation/cross_entropy"], rel=1e-4)
    model = load(trained.var, None)
    assert model.config.class_names == ("cat", "dog")
    assert model.config.transformer.drop_path == pytest.approx(0.1 / 24)
    pictures = model.generate("cat", n=2)
    assert pictures.shape == (2, 3, 16, 16)
    assert pictures.isfinite().all()


def test_the_averaged_weights_are_kept(trained: SimpleNamespace) -> None:
    run = replace(trained.recipe).trainer(load)
    assert run.resume()
    with run.averaged():
        kept = {k: v.clone() for k, v in run.task.model.state_dict().items()}
    saved = load(trained.var, None).state_dict()
    assert all(torch.equal(saved[k], kept[k]) for k in saved)
    assert not torch.equal(run.task.model.state_dict()["head.linear.weight"], kept["head.linear.weight"])


@pytest.mark.parametrize("rank", [0, 2])
def test_fine_tuning_on_images(rank: int, images: str, trained: SimpleNamespace, tmp_path: Path) -> None:
    recipe = VARRecipe(
        data=ImageData(images, validation=images, size=16, resize_ratio=1.0),
        init=trained.var,
        classes=3,
        lora=LoRAConfig(rank),
        training=training(tmp_path),
    )
    run = recipe.trainer(load)
    run.run()
    model = load(str(recipe.finish(run)), None)
    assert model.config.classes == 3
    assert model.generate(2).isfinite().all()
    start = load(trained.var, None).state_dict()
    tokenizer = {k: v for k, v in model.state_dict().items() if k.startswith("tokenizer.")}
    assert all(torch.equal(v, start[k]) for k, v in tokenizer.items())


def test_starting_tokenizer_is_taken_over(images: str, trained: SimpleNamespace, tmp_path: Path) -> None:
    recipe = tokenizer_recipe(images, tmp_path, init=trained.tokenizer)
    start, built = ResidualVQ.load(trained.tokenizer).state_dict(), recipe.build(load).state_dict()
    assert all(torch.equal(start[k], built[k]) for k in start)


def test_the_tokenizer_inside_a_model_is_trained_too(images: str, trained: SimpleNamespace, tmp_path: Path) -> None:
    """There it is frozen, and shipped in half precision."""

    def halved(source: str, tokenizer: Any = None) -> Any:
        return load(source).to(torch.bfloat16)

    built = tokenizer_recipe(images, tmp_path, init=trained.var).build(halved)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in built.parameters())


def test_an_autoencoder_gets_new_codes(images: str, trained: SimpleNamespace, tmp_path: Path) -> None:
    codes = QuantizerConfig(vocabulary=8, channels=4, smoothing=0.0)
    recipe = replace(tokenizer_recipe(images, tmp_path, autoencoder_init=trained.var), quantizer=codes, scales="4")
    built, start = recipe.build(load), load(trained.var).tokenizer.state_dict()
    own = {name: value for name, value in built.state_dict().items() if not name.startswith("quantizer.")}
    assert all(torch.equal(start[name], value) for name, value in own.items())
    assert built.quantizer.codebook.weight.shape == (8, 4) and not len(built.quantizer.smoothers)
    with pytest.raises(ValueError, match="give init, for a whole tokenizer, or autoencoder_init"):
        replace(recipe, init=trained.var).build(load)


def test_a_decoder_alone_keeps_the_tokens(images: str, trained: SimpleNamespace, tmp_path: Path) -> None:
    recipe = tokenizer_recipe(images, tmp_path, init=trained.tokenizer, decoder_only=True)
    run = recipe.trainer(load)
    run.run()
    before, after = ResidualVQ.load(trained.tokenizer), ResidualVQ.load(recipe.finish(run))
    assert fingerprint(after) == fingerprint(before)
    assert not torch.equal(after.decoder.conv_out.weight, before.decoder.conv_out.weight)
    with pytest.raises(ValueError, match="decoder_only keeps the codes of a trained tokenizer: give init"):
        replace(recipe, init=None).build(load)


def test_a_samples_numbers_are_its_own(images: str, trained: SimpleNamespace, tmp_path: Path) -> None:
    """What drops a label must not be what mirrors an image or picks a view."""
    config = training(tmp_path, batch_size=8)
    flipped = ImageData(images, size=16, flip=True, resize_ratio=1.0).open_training(0, labels=True)
    plain = open_images(images, size=16, resize_ratio=1.0)
    drawn, mirrored = [], []
    batches = stream(flipped, config)(0, 8)
    for _ in range(40):
        batch = next(batches)
        original = plain.fetch(batch["index"].tolist())["image"]
        mirrored.append((batch["image"] != original).flatten(1).any(1))
        drawn.append(batch["uniform"])
    uniform, mirror = torch.cat(drawn), torch.cat(mirrored)
    for part in (uniform < 0.3, uniform >= 0.3):
        assert 0.3 < mirror[part].float().mean() < 0.7
    assert uniform.min() >= 0 and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.06)
    skipped = stream(flipped, config)(39, 8)
    assert torch.equal(next(skipped)["uniform"], drawn[39])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "give either data .images. or tokens"),
        ({"tokenizer": None}, "a VAR needs a tokenizer"),
        ({"lora": LoRAConfig(2)}, "LoRA adapts a trained model: give init"),
        ({"classes": 1}, "the data has classes up to 1, the model 1"),
        ({"class_names": ["a"]}, "1 class names were given for 2 classes"),
        ({"scales": "1 4"}, "were made with scales '1 2 4' and tokenizer .*, the model has '1 4'"),
        ({"heads": 3}, "width 16 is not a multiple of the 3 heads"),
    ],
)
def test_what_does_not_belong_together_is_named(
    changes: dict[str, Any], message: str, trained: SimpleNamespace
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(trained.recipe, **changes).trainer(load)


def test_tokens_of_another_tokenizer_are_refused(trained: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = ResidualVQ.load(trained.tokenizer)
    with torch.no_grad():
        tokenizer.quantizer.codebook.weight.add_(1)
    recipe = replace(trained.recipe, tokenizer=str(tokenizer.save(tmp_path)))
    with pytest.raises(ValueError, match="make them again"):
        recipe.trainer(load)


def test_held_out_data_must_belong(
    images: str, trained: SimpleNamespace, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    opened = open_images(images, size=16, resize_ratio=1)
    tokenizer = ResidualVQ.load(trained.tokenizer)
    tiny.scattered(tokenizer.quantizer, 0)
    other = write_tokens(tokenizer, opened, tmp_path / "tokens")
    with pytest.raises(ValueError, match=f"the tokens in {other} were made with"):
        replace(trained.recipe, validation_tokens=str(other)).trainer(load)
    birds = tiny.images(tmp_path / "birds", side=16, classes=("bird", "cat"))
    data = ImageData(images, validation=str(birds), size=16, resize_ratio=1.0)
    with pytest.raises(ValueError, match="held-out data has the classes bird, cat …, the training data cat, dog"):
        replace(trained.recipe, tokens=None, validation_tokens=None, data=data).trainer(load)


def test_image_sizes_must_fit(images: str, trained: SimpleNamespace, tmp_path: Path) -> None:
    data = ImageData(images, size=12, resize_ratio=1.0)
    with pytest.raises(ValueError, match=r"stand for images of 16 pixels, data\.size is 12"):
        replace(trained.recipe, tokens=None, validation_tokens=None, data=data).trainer(load)
    with pytest.raises(ValueError, match="16 pixels, the data has 12: the last scale must be 3"):
        replace(tokenizer_recipe(images, tmp_path), data=data).build(load)
    with pytest.raises(ValueError, match="batch_size 8 must be a positive multiple of accumulation 3"):
        training(tmp_path, accumulation=3)
