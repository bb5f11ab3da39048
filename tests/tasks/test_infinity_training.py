"""From images with texts to a model that draws prompts: a bitwise tokenizer, an Infinity, and what each is told."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import nextscale
from nextscale.core.autoencoder import AutoencoderConfig
from nextscale.core.cross_attention import Packed
from nextscale.core.optim import parameter_groups
from nextscale.core.phases import leave_out
from nextscale.core.quantizer import QuantizerConfig
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.datasets.captions import CaptionError, colours_of, open_captions
from nextscale.datasets.images import open_images
from nextscale.tasks.generation.infinity import Infinity
from nextscale.tasks.generation.infinity_recipe import InfinityData, InfinityRecipe
from nextscale.tasks.generation.infinity_training import InfinityLossConfig, InfinityTraining, token_weights
from nextscale.tasks.generation.text_recipe import CaptionData
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig
from nextscale.tasks.tokenizers.bitwise_training import BitwiseTokenizerRecipe
from nextscale.tasks.tokenizers.bitwise_vq import BitwiseVQ
from nextscale.tasks.tokenizers.residual_vq import ResidualVQ, ResidualVQConfig
from nextscale.tasks.tokenizers.training import TokenizerLossConfig


def load(source: Any, tokenizer: Any = None) -> Any:
    return nextscale.load(source, device="cpu")


def training(folder: Path, **changes: Any) -> TrainingConfig:
    usual: dict[str, Any] = {"epochs": 1, "batch_size": 4, "log_every": 1, "average": 0.9, "warmup_epochs": 0}
    return TrainingConfig(str(folder), **{**usual, **changes})


@pytest.fixture(scope="module")
def images(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.images(tmp_path_factory.mktemp("data") / "images", side=8))


def tokenizer_recipe(images: str, folder: Path, **changes: Any) -> BitwiseTokenizerRecipe:
    return BitwiseTokenizerRecipe(
        data=CaptionData(images, validation=images, size=8, resize_ratio=1.0),
        training=training(folder, sample_every=1),
        scales="1 2 4",
        autoencoder=AutoencoderConfig(8, (1, 1), 1, attention=False, norm_groups=4),
        quantizer=BitwiseQuantizerConfig(6),
        loss=TokenizerLossConfig(adversarial=0.1, adversarial_start=0, discriminator_levels=0, perceptual=0.0),
        early=0.5,
        **changes,
    )


@pytest.fixture(scope="module")
def trained(images: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("runs")
    recipe = tokenizer_recipe(images, folder / "tokenizer")
    run = recipe.trainer(load)
    run.run()
    tokenizer = recipe.finish(run)
    infinity = infinity_recipe(images, tokenizer, folder / "infinity")
    run = infinity.trainer(load)
    run.run()
    return SimpleNamespace(
        folder=folder, tokenizer=tokenizer, recipe=infinity, run=run, model=infinity.finish(run), first=recipe
    )


def infinity_recipe(images: str, tokenizer: Path, folder: Path, **changes: Any) -> InfinityRecipe:
    return InfinityRecipe(
        tokenizer=str(tokenizer),
        data=InfinityData(images, validation=images, size=8, resize_ratio=1.0, captions="classes"),
        text_width=16,
        text_length=8,
        text_drop=0.5,
        size="125m",
        width=16,
        depth=2,
        heads=2,
        mlp_ratio=2.0,
        gate=0.1,
        modulation=0.1,
        training=training(folder),
        **changes,
    )


def test_the_whole_way(trained: SimpleNamespace, images: str) -> None:
    rows = [json.loads(line) for line in (trained.folder / "tokenizer" / "log.jsonl").read_text().splitlines()]
    assert {"psnr", "psnr_early", "quantizer", "usage/all", "adversarial"} <= set(rows[0])
    examples = trained.first.examples(trained.first.trainer(load))
    assert [name for name, _ in examples.rows] == ["images", "1 scales", "2 scales", "3 scales"]
    rows = [json.loads(line) for line in (trained.folder / "infinity" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "cross_entropy", "bit_accuracy", "bit_accuracy_last"} <= set(rows[0])
    assert rows[0]["loss"] < 1.0
    assert "validation/bit_accuracy" in rows[-1]
    model = nextscale.load(trained.model, device="cpu")
    assert isinstance(model, Infinity)
    assert model.generate(["a red cat", "a blue dog"], guidance=2.0).shape == (2, 3, 8, 8)
    examples = trained.recipe.examples(trained.run)
    assert (len(examples.rows), len(examples.headings or ())) == (2, 8)
    again = infinity_recipe(images, trained.tokenizer, trained.folder / "more", init=str(trained.model))
    built = again.build(model.text_encoder, lambda source, tokenizer=None: nextscale.load(source, device="cpu"))
    assert built.config.text_drop == 0.5


def test_texts_of_other_lengths_need_no_other_graph(trained: SimpleNamespace) -> None:
    model = nextscale.load(trained.model, device="cpu")
    schedule, graphs = model.config.schedule, []

    def text(*lengths: int) -> Packed:
        return Packed(torch.randn(sum(lengths), model.config.text_width), lengths)

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    inputs = torch.randn(3, schedule.length - schedule.lengths[0], model.config.token_bits)
    texts = [text(3, 5, 4), text(5, 2, 5), text(1, 4, 5)]
    expected = [model(inputs, each) for each in texts]
    leave_out(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(inputs, texts[0]), expected[0])
    made = len(graphs)
    assert made > 0
    for each, result in zip(texts[1:], expected[1:], strict=True):
        torch.testing.assert_close(compiled(inputs, each), result)
    assert len(graphs) == made


def test_a_tokenizer_starts_from_another_kinds_autoencoder(images: str, tmp_path: Path) -> None:
    autoencoder = AutoencoderConfig(8, (1, 1), 1, latent_channels=6, attention=False, norm_groups=4)
    other = ResidualVQ(ResidualVQConfig(autoencoder, QuantizerConfig(8, 6), ScaleSchedule.parse("1 2 4")))
    start = tokenizer_recipe(images, tmp_path / "run", init="other").build(lambda source: other)
    assert isinstance(start, BitwiseVQ)
    assert torch.equal(start.encoder.conv_in.weight, other.encoder.conv_in.weight)
    assert torch.equal(start.decoder.conv_out.weight, other.decoder.conv_out.weight)
    small = ResidualVQ(
        ResidualVQConfig(
            AutoencoderConfig(4, (1, 3), 1, latent_channels=5, image_channels=1, attention=False, norm_groups=2),
            QuantizerConfig(8, 5),
            ScaleSchedule.parse("1 2 4"),
        )
    )
    with pytest.raises(ValueError, match="no weight of the autoencoder in other"):
        tokenizer_recipe(images, tmp_path / "run", init="other").build(lambda source: small)


def test_losses(trained: SimpleNamespace, tiny: SimpleNamespace) -> None:
    model: Infinity = nextscale.load(trained.model, device="cpu")
    tiny.scattered(model.transformer, 0)
    texts = model.features(["a red cat", "a dog"])
    batch = {"image": torch.rand(2, 3, 8, 8) * 2 - 1, "text": texts, "uniform": torch.tensor([0.0, 1.0])}
    task = InfinityTraining(model, InfinityLossConfig(flip_strength=0.0))
    plain, metrics = task.loss("infinity", model, batch, 0)
    assert set(metrics) == {"cross_entropy", "bit_accuracy", "bit_accuracy_last"}
    summed = InfinityTraining(model, InfinityLossConfig(flip_strength=0.0, bits="sum", reweight=False))
    assert summed.loss("infinity", model, batch, 0)[0].item() == pytest.approx(
        6 * float(metrics["cross_entropy"]), rel=1e-4
    )
    fewer = InfinityTraining(model, InfinityLossConfig(flip_strength=0.0, scales=2))
    assert fewer.teacher_forced(batch, model.config.schedule).tokens.shape == (2, 5, 6)
    torch.manual_seed(0)
    flipped = InfinityTraining(model, InfinityLossConfig(flip_strength=1.0)).teacher_forced(
        batch, model.config.schedule
    )
    whole = task.teacher_forced(batch, model.config.schedule)
    assert torch.equal(flipped.tokens[:, :1], whole.tokens[:, :1])
    assert not torch.equal(flipped.inputs, whole.inputs)
    plain.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith("tokenizer.")]
    assert missing == []
    assert model.loss(batch)[0].item() > 0
    weights = token_weights(model.config.schedule, reweight=True)
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights[0] / weights[-1]) == pytest.approx(4)
    kept = [p for group in parameter_groups(model, 1.0) if not group["decays"] for p in group["params"]]
    for parameter in (model.null_text, model.pool.query, model.start_position, model.level_embedding.weight):
        assert any(parameter is each for each in kept)
    assert not any(model.memory[0].weight is each for each in kept)


def test_texts_beside_images(images: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    folder = tiny.images(tmp_path / "texts", per_class=2)
    files = sorted(folder.rglob("*.png"))
    for number, image in enumerate(files):
        if number % 2:
            image.with_suffix(".json").write_text(json.dumps({"text": f"text {number}", "other": f"other {number}"}))
        else:
            image.with_suffix(".txt").write_text(f" text {number} \n")
    opened = open_images(str(folder), size=8, labels=False)
    texts = open_captions(str(folder), opened)
    assert texts.fetch([0, 3, 1])["text"] == ["text 0", "text 3", "text 1"]
    assert texts.vocabulary() == [f"text {number}" for number in range(4)]
    with pytest.raises(CaptionError, match=r"2 of 4 images have no text: .*one of missing"):
        open_captions(str(folder), opened, field="missing")
    files[1].with_suffix(".json").write_text("[")
    with pytest.raises(CaptionError, match=r"1 of 4 images have no text"):
        open_captions(str(folder), opened)
    shard = tmp_path / "part-0.tar.gz"
    with tarfile.open(shard, "w:gz") as tar:
        for number, image in enumerate(files[:2]):
            for name, data in ((f"{number}.png", image.read_bytes()), (f"{number}.txt", f"shard {number}".encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    packed = open_captions(str(shard), open_images(str(shard), size=8))
    assert packed.fetch([1, 0])["text"] == ["shard 1", "shard 0"]


def test_captions_of_classes_and_colours(images: str) -> None:
    opened = open_images(images, size=8, resize_ratio=1)
    made = open_captions(images, opened, captions="classes", template="a {colour} {class}")
    batch = made.fetch([0, 7])
    colours = colours_of(batch["image"])
    assert batch["text"] == [f"a {colours[0]} cat", f"a {colours[1]} dog"]
    assert "cat dog" in made.vocabulary()[0]
    assert colours_of(torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 2, 2)) == ["red"]
    with pytest.raises(CaptionError, match="has 2 classes with 1 names"):
        open_captions(images, opened, captions="classes", class_names=["cat"])


def test_training_at_several_aspect_ratios(trained: SimpleNamespace, tmp_path: Path) -> None:
    lines = []
    for number, shape in enumerate([(40, 40), (30, 66), (64, 31), (50, 52), (33, 64), (70, 33)]):
        Image.new("RGB", shape, (40 * number, 90, 10)).save(tmp_path / f"{number}.png")
        lines.append({"image_path": f"{number}.png", "long_caption": "It is red. It is small.", "text": "red"})
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = str(tmp_path / "all.jsonl")
    recipe = infinity_recipe(source, trained.tokenizer, tmp_path / "run", scales="1 2 4 6 8 12 16")
    data = InfinityData(source, size=32, ratios=[0.5, 1.0, 2.0], short_captions=0.5, cut_captions=True)
    recipe = replace(recipe, data=data, training=training(tmp_path / "run", epochs=4, batch_size=2))
    run, shapes, texts = recipe.trainer(load), set(), set()
    for batch, _ in zip(run.batches(0, 2), range(12), strict=False):
        shapes.add(tuple(batch["image"].shape))
        texts.update(batch["text"])
    assert shapes == {(2, 3, 32, 32), (2, 3, 44, 22), (2, 3, 22, 44)}  # 16 x 16 and 22 x 11 tokens of two pixels
    assert texts == {"red", "It is red.", "It is red. It is small."}
    run.run()
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(row["loss"] < 1.5 for row in rows)
    model = nextscale.load(recipe.finish(run), device="cpu")
    assert model.generate(["red"], ratio="1:2").shape == (1, 3, 44, 22)
    assert len(recipe.examples(run).rows) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": [1.1]}, r"ratios has 1\.1; expected some of 0\.333"),
        ({"ratios": [], "flip": True}, "need texts of their own"),
        ({"ratios": [], "captions": "classes"}, "need texts of their own"),
    ],
)
def test_aspect_ratios_that_cannot_be_trained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfinityData("x", **changes)


def test_a_size_without_published_lists_is_refused(trained: SimpleNamespace, images: str, tmp_path: Path) -> None:
    recipe = infinity_recipe(images, trained.tokenizer, tmp_path)
    recipe = replace(recipe, data=InfinityData(images, size=8, ratios=[]))
    with pytest.raises(ValueError, match=r"data\.size is 8; expected 32, 64, 96, 128"):
        recipe.trainer(load)


def test_recipes_that_cannot_work(images: str, trained: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size is '3b'; expected one of 125m"):
        InfinityRecipe(tokenizer="x", data=InfinityData(images), size="3b")
    wrong = infinity_recipe(images, trained.tokenizer, tmp_path, scales="1 2 3")
    with pytest.raises(ValueError, match=r"stand for images of 6 pixels, data\.size is 8"):
        wrong.trainer(load)
    model = nextscale.load(trained.tokenizer, device="cpu")
    assert isinstance(model, BitwiseVQ)
    with pytest.raises(ValueError, match="early is -1"):
        tokenizer_recipe(images, tmp_path).__class__(data=CaptionData(images), early=-1)
    with pytest.raises(ValueError, match="flip_strength is 2"):
        InfinityLossConfig(flip_strength=2)
