"""G3PT: scale by scale as all at once, sets without order, conditions, files; its training on a folder of balls."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nextscale
from nextscale.core.checkpoint import CheckpointError
from nextscale.core.random import ImageDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.core.transformer import TransformerConfig
from nextscale.datasets.array_store import ArrayStoreWriter
from nextscale.datasets.shapes import KIND, ShapeSamples, packed_row, quantised, restored
from nextscale.tasks.generation.text import TextEncoderConfig
from nextscale.tasks.generation.text_small import make_encoder
from nextscale.tasks.generation.var_training import ProgressiveConfig
from nextscale.tasks.shapes.g3pt import G3PT, PRESETS, G3PTConfig
from nextscale.tasks.shapes.g3pt_conditions import ShapeConditions
from nextscale.tasks.shapes.g3pt_data import ShapeData
from nextscale.tasks.shapes.g3pt_recipe import G3PTRecipe, PointTokenizerRecipe
from nextscale.tasks.shapes.g3pt_tokenizer import PRESETS as TOKENIZERS
from nextscale.tasks.shapes.g3pt_tokenizer import PointTokenizer, PointTokenizerConfig
from nextscale.tasks.shapes.g3pt_tokenizer_training import PointTokenizerLossConfig
from nextscale.tasks.shapes.g3pt_tokenizer_training import initialize as initialize_tokenizer
from nextscale.tasks.shapes.g3pt_training import G3PTLossConfig, G3PTTraining, initialize
from nextscale.tasks.shapes.pictures import LearnedEncoderConfig
from nextscale.tasks.tokenizers.bitwise_quantizer import BitwiseQuantizerConfig

SCHEDULE = ScaleSchedule.counts(1, 3, 6)
LEARNED = LearnedEncoderConfig(8, 8, 2)
SIZES: dict[str, Any] = {"width": 16, "heads": 2, "latents": 8, "points": 32, "encoder_depth": 1, "decoder_depth": 1}


def tokenizer_config(**changes: Any) -> PointTokenizerConfig:
    quantizer = BitwiseQuantizerConfig(4)
    return PointTokenizerConfig(**{**SIZES, "octaves": 3, "quantizer": quantizer, "schedule": SCHEDULE, **changes})


def build(tiny: SimpleNamespace, **changes: Any) -> G3PT:
    torch.manual_seed(0)
    tokenizer = initialize_tokenizer(PointTokenizer(tokenizer_config()))
    blocks = TransformerConfig(16, 2, 2, conditioning=changes.pop("conditioning", "shared"))
    usual = {"classes": 2, "class_names": ("box", "ball"), "learned": LEARNED, "picture_width": 8}
    model = initialize(G3PT(G3PTConfig(blocks, 16, 4, SCHEDULE, **{**usual, **changes}), tokenizer))
    tiny.scattered(model, 0)
    return model.eval()


def picture(value: int = 200) -> Image.Image:
    return Image.new("RGB", (10, 8), (value, 30, 30))


@pytest.mark.parametrize("symbols", ["number", "bits"])
@pytest.mark.parametrize("learned", [None, LEARNED], ids=["class", "class and picture"])
def test_stepping_is_what_teacher_forcing_gives(symbols: Any, learned: Any, tiny: SimpleNamespace) -> None:
    model = build(tiny, symbols=symbols, learned=learned)
    conditions = model.prepare(["ball", 0] if learned is None else ["ball", picture()])
    steps = list(model.steps(conditions, draws=ImageDraws([0, 1]), guidance=0.0))
    tokens = torch.cat([step.tokens for step in steps], dim=1)
    bits = tokens if symbols == "bits" else model.tokenizer.quantizer.bits_of(tokens)
    inputs = model.tokenizer.quantizer.teacher_inputs(bits, SCHEDULE)
    with torch.no_grad():
        logits = model(inputs, conditions)
        torch.testing.assert_close(torch.cat([step.logits for step in steps], dim=1), logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(inputs[:, :3], conditions, scales=2), logits[:, :4], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(steps[-1].total, model.tokenizer.quantizer.decode(bits, SCHEDULE)[-1])


def test_a_scale_is_a_set(tiny: SimpleNamespace) -> None:
    """Permuting a scale's queries with their embeddings permutes its tokens, and leaves all other scales alone."""
    model = build(tiny)
    bits = torch.rand(2, 10, 4) > 0.5
    conditions, quantizer = model.prepare([0, 1]), model.tokenizer.quantizer
    with torch.no_grad():
        logits = model(quantizer.teacher_inputs(bits, SCHEDULE), conditions)
        order = torch.tensor([0, 3, 1, 2, 4, 5, 6, 7, 8, 9])
        quantizer.queries.copy_(quantizer.queries[order])
        model.position_embedding.copy_(model.position_embedding[:, order])
        again = model(quantizer.teacher_inputs(bits[:, order], SCHEDULE), conditions)
    torch.testing.assert_close(again, logits[:, order], atol=1e-5, rtol=1e-4)


def test_generate_from_seeds_guided(tiny: SimpleNamespace) -> None:
    model, done = build(tiny), list[tuple[int, int]]()
    options: dict[str, Any] = {"guidance": 1.5, "resolution": 8, "stride": 2, "top_k": 5}
    shapes = model.generate([0, picture(), None], seed=4, batch_size=2, progress=lambda *at: done.append(at), **options)
    assert done == [(i + 1, 6) for i in range(6)] and len(shapes) == 3
    [alone] = model.generate(picture(), seed=5, **options)
    np.testing.assert_allclose(alone.vertices, shapes[1].vertices, atol=1e-4)
    assert all(abs(shape.vertices).max(initial=0) < 1.05 for shape in shapes)
    # Without guidance the unguided branch is not run, and where both are alike it changes nothing.
    none = model.prepare(None)
    strong, plain = (list(model.steps(none, draws=ImageDraws([0]), guidance=g))[-1] for g in (3.0, 0.0))
    assert torch.equal(strong.tokens, plain.tokens)


def test_conditions(tiny: SimpleNamespace, tmp_path: Path) -> None:
    make_encoder(tmp_path / "words", ["a red ball"], kind="clip", width=8, max_length=8)
    text = TextEncoderConfig(str(tmp_path / "words"), "clip", 8, padded=True)
    model = build(tiny, text=text, text_width=8)
    picture().save(tmp_path / "red.png")
    given = model.prepare(["box", "a red ball", tmp_path / "red.png", None])
    assert given.labels.tolist() == [0, 2, 2, 2] and len(given.select([1, 1])) == 2
    assert given.said is not None and given.said.tolist() == [False, True, False, False]
    assert given.shown is not None and given.shown.tolist() == [False, False, True, False]
    pooled, prefix = model.read(given)
    assert prefix is not None and torch.equal(prefix[0], prefix[1]) and not torch.equal(prefix[0], prefix[2])
    assert torch.equal(pooled[2], pooled[3]) and not torch.equal(pooled[1], pooled[3])
    torch.testing.assert_close(model.prepare(str(tmp_path / "red.png")).said, torch.tensor([True]))
    saved = nextscale.load(model.save(tmp_path / "saved"), device="cpu")
    (tmp_path / "words").rename(tmp_path / "moved")
    again = saved.prepare(["box", "a red ball", tmp_path / "red.png", None])
    torch.testing.assert_close(saved.read(again), (pooled, prefix))
    seeing = build(tiny)
    assert seeing.prepare(str(tmp_path / "red.png")).shown is not None
    for wrong, words in ((2.5, "a condition is 2.5"), ("bal", "did you mean ball"), (9, "class 9"), ([], "empty")):
        with pytest.raises(ValueError, match=words):
            seeing.prepare(wrong)
    with pytest.raises(ValueError, match="sees no pictures; it is told by classes"):
        build(tiny, learned=None).prepare(picture())
    with pytest.raises(ValueError, match="reads no texts; it is told by classes, pictures"):
        _ = seeing.reader.text_encoder


def test_training_shows_one_condition_or_none() -> None:
    there = torch.ones(5, dtype=torch.bool)
    all_of_them = ShapeConditions(torch.zeros(5, dtype=torch.long), torch.zeros(5, 1, 1), there)
    shown = all_of_them.dropped(torch.tensor([0.05, 0.15, 0.5, 0.6, 0.99]), 0.1, none=3)
    assert shown.labels.tolist() == [3, 0, 0, 3, 3]
    assert shown.shown is not None and shown.shown.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("symbols", ["number", "bits"])
def test_learns_coarse_scales_first(symbols: Any, tiny: SimpleNamespace) -> None:
    model = build(tiny, symbols=symbols)
    config = G3PTLossConfig(ProgressiveConfig(0.5, -1, 0.1), flip=0.2, reweight=True)
    task = G3PTTraining(model, config, total=20)
    assert [task.stage(step).scales for step in (0, 5, 10)] == [1, 2, 3]
    batch = {"features": torch.randn(4, 8, 16), "label": torch.tensor([0, 1, -1, 1]), "image": torch.rand(4, 3, 8, 8)}
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2), []
    for step in range(20):
        optimizer.zero_grad()
        loss, metrics = task.loss(task.name, model.train(), dict(batch), step)
        loss.backward()
        optimizer.step()
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < losses[10] and not model.tokenizer.training
    evaluated = task.evaluate(batch)
    assert {"loss", "cross_entropy", "cross_entropy_last", "accuracy"} <= set(evaluated)
    assert model.null_picture is not None and model.null_picture.grad is not None
    torch.manual_seed(0)
    plain, _ = model.loss(batch)
    assert plain.isfinite()


@pytest.mark.parametrize(("size", "billions"), [("0.1b", 0.1), ("0.5b", 0.5), ("1.5b", 1.5)])
def test_presets_have_the_published_sizes(size: str, billions: float) -> None:
    with torch.device("meta"):
        tokenizer = PointTokenizer(TOKENIZERS["g3pt-tokenizer"])
        for kind in ("image", "text"):
            model = G3PT(PRESETS[f"g3pt-{kind}-{size}"], tokenizer)
            count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("tokenizer."))
            assert count / 1e9 == pytest.approx(billions, rel=0.04)


def test_mistakes(tiny: SimpleNamespace) -> None:
    model = build(tiny)
    with pytest.raises(ValueError, match="do not belong together"):
        G3PT(G3PTConfig(TransformerConfig(16, 1, 2, conditioning="shared")), model.tokenizer)
    with pytest.raises(ValueError, match="give image or learned"):
        build(tiny, image=PRESETS["g3pt-image-0.1b"].image)
    with pytest.raises(ValueError, match="1 class names were given for 2 classes"):
        build(tiny, class_names=("box",))
    with pytest.raises(ValueError, match="not modulated"):
        build(tiny, conditioning="none")
    with pytest.raises(CheckpointError, match="no official files"):
        nextscale.load({"x": torch.zeros(1)}, system="g3pt")
    with pytest.raises(ValueError, match="no official files"):
        model.to_official()


# --- from a prepared folder to a model ----------------------------------------------------------------


def prepare(folder: Path, number: int = 6) -> Path:
    """Balls of two classes, small and large, with a picture each."""
    rng = np.random.default_rng(0)
    samples = ShapeSamples(64, 64, 64, views=1, size=8)
    settings = {"samples": {**vars(samples), "noise": list(samples.noise)}, "classes": ["small", "large"]}
    writer = ArrayStoreWriter(folder, kind=KIND, settings=settings, columns=samples.columns(), shard_size=4)
    for i in range(number):
        radius = 0.5 + 0.4 * (i % 2)
        normals = rng.normal(size=(64, 3))
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        near = normals * radius + rng.normal(0, 0.05, (64, 3))
        queries = quantised(np.concatenate((rng.uniform(-1, 1, (64, 3)), near)))
        inside = np.linalg.norm(restored(queries), axis=1) < radius
        image = np.full((1, 8, 8, 3), 100 + 100 * (i % 2), np.uint8)
        writer.write({"name": f"ball {i}"}, packed_row(i % 2, normals * radius, normals, queries, inside, image=image))
    writer.finish()
    return folder


def test_recipes_from_a_folder_to_a_mesh(tmp_path: Path) -> None:
    data = ShapeData(str(prepare(tmp_path / "shapes")), str(tmp_path / "shapes"), surface=32, uniform=32, near=32)
    common: dict[str, Any] = {"batch_size": 3, "log_every": 1, "average": 0.9, "warmup_epochs": 0}
    training = TrainingConfig(str(tmp_path / "tokenizer"), epochs=2, learning_rate=0.2, **common)
    first = PointTokenizerRecipe(
        data, "1 3 6", **SIZES, octaves=3, quantizer=BitwiseQuantizerConfig(4),
        loss=PointTokenizerLossConfig(continuous=0.5, partial=0.5), training=training,
    )  # fmt: skip

    def load(source: str, tokenizer: Any = None) -> Any:
        return nextscale.load(source, device="cpu")

    run = first.trainer(load)
    run.run()
    rows = [json.loads(line) for line in (tmp_path / "tokenizer" / "log.jsonl").read_text().splitlines()]
    assert "fit" not in rows[0] and any("fit" in row for row in rows)
    assert {"validation/iou", "validation/iou_half", "validation/iou_continuous"} <= set(rows[-1])
    assert [name for name, _ in first.examples(run).rows] == ["1 scales", "3 scales"]
    place = first.finish(run)
    assert first.build(load).config.schedule == SCHEDULE
    second = G3PTRecipe(
        str(place), data, width=16, depth=1, heads=2, pictures="learned", texts=True, picture=LEARNED, picture_width=8,
        text_width=8, training=TrainingConfig(str(tmp_path / "g3pt"), epochs=1, **common),
    )  # fmt: skip
    run = second.trainer(load)
    run.run()
    rows = [json.loads(line) for line in (tmp_path / "g3pt" / "log.jsonl").read_text().splitlines()]
    assert "validation/cross_entropy" in rows[-1]
    assert len(second.examples(run).rows[0][1]) == 2
    model = nextscale.load(second.finish(run), device="cpu")
    assert model.config.class_names == ("small", "large") and model.config.prefix == 4
    shapes = model.generate(["large", "a small ball", picture()], resolution=8, guidance=1.0)
    assert len(shapes) == 3
