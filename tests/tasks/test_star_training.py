"""STAR's training: both stages, tokens left out, texts dropped, growing to more scales, and whole runs."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nextscale
from nextscale.cli.train import load_initial
from nextscale.core.cross_attention import Packed
from nextscale.core.optim import parameter_groups
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.tasks.generation.star import STAR
from nextscale.tasks.generation.star_config import STARConfig
from nextscale.tasks.generation.star_recipe import STARRecipe, take_over
from nextscale.tasks.generation.star_training import (
    STARHeadTraining,
    STARLossConfig,
    STARTraining,
    drop_texts,
    initialize,
    kept_places,
    known_tokens,
)
from nextscale.tasks.generation.star_transformer import STARBlocksConfig, kept_segments
from nextscale.tasks.generation.text import TextEncoderConfig, TextFeatures
from nextscale.tasks.generation.text_recipe import CaptionData

SCHEDULE = ScaleSchedule.squares(1, 2, 4)


def build(
    tiny: SimpleNamespace, *, schedule: ScaleSchedule = SCHEDULE, conditioning: Any = "none", **options: Any
) -> STAR:
    blocks = STARBlocksConfig(16, 2, 2, text_width=12, conditioning=conditioning)
    text = TextEncoderConfig("nowhere")
    config = STARConfig(blocks, vocabulary=16, code_channels=4, schedule=schedule, text=text, **options)
    torch.manual_seed(0)
    model = initialize(STAR(config, tiny.tokenizer(schedule=schedule)), head=1)
    for part in (model.transformer, *([] if model.stable is None else [model.stable])):
        tiny.scattered(part, 1)
    return model


def a_batch(count: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    states = Packed(torch.randn(3 * count, 12, generator=generator), (3,) * count)
    text = TextFeatures(states, torch.randn(count, 12, generator=generator))
    return {"image": torch.randn(count, 3, 8, 8, generator=generator).clamp(-1, 1), "text": text}


def test_initial_weights(tiny: SimpleNamespace) -> None:
    torch.manual_seed(0)
    blocks = STARBlocksConfig(64, 8, 2, text_width=12)
    config = STARConfig(blocks, vocabulary=16, code_channels=4, schedule=SCHEDULE, rotary=False, stable_from=2)
    model = initialize(STAR(config, tiny.tokenizer()))
    usual = (1 / 64 / 3) ** 0.5
    block = model.transformer.blocks[0]
    for tensor, factor in (
        (block.attention.qkv.weight, 1),
        (block.attention.projection.weight, 1 / 4),
        (block.cross_attention.projection.weight, 1),
        (model.head.weight, 0.02),
        (model.position_embedding, 1),
        (model.stable.transformer.blocks[0].attention.projection.weight, 1),
        (model.stable.head.weight, 1),
    ):
        assert tensor.std().item() == pytest.approx(factor * usual, rel=0.15)
    assert not block.cross_attention.query.bias.any()
    before = block.attention.qkv.weight.clone(), model.stable.head.weight.clone()
    initialize(model, backbone=False)
    assert torch.equal(block.attention.qkv.weight, before[0])
    assert not torch.equal(model.stable.head.weight, before[1])


def test_the_loss_falls_and_leaves_the_tokenizer_alone(tiny: SimpleNamespace) -> None:
    model = build(tiny).train()
    task, batch = STARTraining(model), a_batch()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=3e-3)
    losses = []
    for step in range(8):
        loss, metrics = task.loss("star", model, batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert set(metrics) == {"cross_entropy", "cross_entropy_last", "accuracy", "accuracy_last"}
    assert all(p.grad is None for p in model.tokenizer.parameters())
    assert model.loss(a_batch())[0].item() == pytest.approx(task.evaluate(a_batch())["loss"].item())


def test_levels_that_modulate_do_not_decay(tiny: SimpleNamespace) -> None:
    model = build(tiny, conditioning="shared")
    decay = {id(p) for p in parameter_groups(model, 1.0)[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decay}
    assert "text_embedding.weight" in names and "transformer.blocks.0.cross_attention.query.weight" in names
    free = ("level_", "shared_modulation", "start_position", "bias", "log_scale", "modulation_offset")
    assert not [name for name in names if any(part in name for part in free)]


# --- tokens left out --------------------------------------------------------------------------------


def test_which_tokens_are_left_out() -> None:
    config = STARLossConfig(length=15, cut_from=2)
    keep = kept_places(SCHEDULE, config, torch.arange(16).flip(0))
    assert keep is not None and keep.tolist() == list(range(15))
    drawn = kept_places(SCHEDULE, config)
    assert drawn is not None and len(drawn) == 15 and drawn[:5].tolist() == [0, 1, 2, 3, 4]
    assert [(s.start, s.stop, s.visible) for s in kept_segments(SCHEDULE, drawn)] == [(0, 1, 1), (1, 5, 5), (5, 15, 15)]
    assert [s.stop for s in kept_segments(SCHEDULE, torch.tensor([0, 3, 2]))] == [1, 3]
    assert kept_places(SCHEDULE, STARLossConfig()) is None
    assert kept_places(SCHEDULE, STARLossConfig(length=21)) is None
    with pytest.raises(ValueError, match="leaves 17 of 21 tokens out, and from scale 2 on there are 16"):
        kept_places(SCHEDULE, STARLossConfig(length=4, cut_from=2))
    with pytest.raises(ValueError, match="from scale 13 on there are 0"):
        kept_places(SCHEDULE, STARLossConfig(length=20))


def test_tokens_left_out_change_nothing_that_comes_before_them(tiny: SimpleNamespace) -> None:
    model, batch = build(tiny).eval(), a_batch()
    task = STARTraining(model, STARLossConfig(length=18, cut_from=2))
    _, inputs = task.tokens(batch["image"])
    keep = kept_places(SCHEDULE, task.config)
    assert keep is not None
    with torch.inference_mode():
        cut, whole = model(inputs, batch["text"], None, keep), model(inputs, batch["text"])
    torch.testing.assert_close(cut[:, :5], whole[:, :5], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(cut[:, 5:], whole[:, keep[5:]], atol=1e-4)
    mean = task.loss("star", model, batch | {"permutation": torch.arange(16)}, 0)[0]
    summed = STARTraining(model, replace(task.config, cut_sum=True))
    total = summed.loss("star", model, batch | {"permutation": torch.arange(16)}, 0)[0]
    torch.testing.assert_close(total, 2 * mean)


def test_which_texts_are_dropped() -> None:
    texts, uniform = ["a", "a long description of it", "another long description"], torch.tensor([0.0, 0.05, 0.5])
    assert drop_texts(texts, uniform, 0.1) == ["", "", texts[2]]
    assert drop_texts(texts, uniform, 0.1, spare_short=20) == ["a", "", texts[2]]
    assert drop_texts(texts, uniform, 0.0) == texts


# --- the sampling head ------------------------------------------------------------------------------


def test_the_sampling_head_learns_alone(tiny: SimpleNamespace) -> None:
    model = build(tiny, stable_from=1).train()
    task, batch = STARHeadTraining(model), a_batch()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=3e-3), []
    batch |= {"ratio": torch.tensor([0.9, 0.6]), "known_uniform": torch.rand(2, 20)}
    for step in range(8):
        loss, metrics = task.loss("star", model, batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {"stable"}
    assert set(metrics) == {"cross_entropy", "accuracy", "known"}
    assert all(p.grad is not None for p in trained)
    with pytest.raises(ValueError, match="has no sampling head to train"):
        STARHeadTraining(build(tiny))
    with pytest.raises(ValueError, match="leave length at 0"):
        STARHeadTraining(model, STARLossConfig(length=10))


def test_known_tokens_cost_a_constant_and_show_their_codes(tiny: SimpleNamespace) -> None:
    model, batch = build(tiny, stable_from=1).eval(), a_batch()
    task = STARHeadTraining(model)
    shown = {"ratio": torch.zeros(2), "known_uniform": torch.zeros(2, 20)}  # all are known
    loss, metrics = task.loss("star", model, batch | shown, 0)
    assert metrics["known"].item() == 100
    constant = torch.log1p(16 * torch.tensor(-10.0).exp()) * 20 / 21
    torch.testing.assert_close(loss.detach(), constant, atol=1e-6, rtol=1e-4)
    assert known_tokens(torch.tensor([1.0, 0.5]), torch.tensor([[0.0, 0.9], [0.66, 0.67]])).tolist() == [
        [False, False],
        [True, False],
    ]


def test_the_head_of_one_scale_steps_as_it_is_trained_but_for_what_its_text_sees(tiny: SimpleNamespace) -> None:
    """Trained on the last scale alone the head is the one that samples; with more scales its text sees them all."""
    batch = a_batch()
    for first, same in ((2, True), (1, False)):
        model = build(tiny, stable_from=first).eval()
        assert model.stable is not None
        tokens, inputs = STARTraining(model).tokens(batch["image"])
        start = SCHEDULE.ranges[first][0]
        known = model.tokenizer.quantizer.lookup(tokens[:, start:])
        with torch.inference_mode():
            at_once = model(inputs, batch["text"], known=known)[:, -16:]
            features = model.hidden(inputs, batch["text"])[:, -16:]
            text = model.stable.read(batch["text"].pooled)
            rotation = model.rotation(SCHEDULE)
            stepped = model.stable(text, features, known[:, -16:], SCHEDULE, 2, 2, rotation)
        assert torch.allclose(at_once, stepped, atol=2e-5) is same
    with pytest.raises(ValueError, match="no sampling head"):
        build(tiny)(inputs, batch["text"], known=known)


# --- runs -------------------------------------------------------------------------------------------


def test_growing_to_more_scales(tiny: SimpleNamespace) -> None:
    longer = ScaleSchedule.squares(1, 2, 3, 4)
    for conditioning in ("none", "shared"):
        old = build(tiny, conditioning=conditioning, rotary=False)
        new = build(tiny, schedule=longer, conditioning=conditioning, rotary=False, stable_from=3)
        take_over(new, old)
        assert torch.equal(new.level_embedding.weight[:3], old.level_embedding.weight)
        repeated = torch.equal(new.level_embedding.weight[3], old.level_embedding.weight[2])
        assert repeated is (conditioning == "shared")
        assert new.position_embedding is not None and old.position_embedding is not None
        assert torch.equal(new.position_embedding[:, :21], old.position_embedding)
        assert torch.equal(new.head.weight, old.head.weight)
    other = STARConfig(STARBlocksConfig(32, 2, 2, text_width=12), vocabulary=16, code_channels=4, schedule=SCHEDULE)
    with pytest.raises(ValueError, match="train with its sizes and its tokenizer's codes"):
        take_over(STAR(other, tiny.tokenizer()), build(tiny))


@pytest.fixture(scope="module")
def recipe(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> STARRecipe:
    folder = tmp_path_factory.mktemp("star")
    tiny.images(folder / "images")
    tiny.tokenizer().save(folder / "tokenizer")
    training = TrainingConfig(str(folder / "run"), epochs=1, batch_size=4, save_every=0, log_every=1)
    data = CaptionData(str(folder / "images"), size=8, captions="classes", template="a {class}")
    return STARRecipe(
        str(folder / "tokenizer"), data, text_width=12, width=16, depth=2, heads=2, training=training,
        loss=STARLossConfig(spare_short=0),
    )  # fmt: skip


def test_a_run_of_both_stages(recipe: STARRecipe) -> None:
    run = recipe.trainer(load_initial)
    run.run()
    finished = recipe.finish(run)
    model = nextscale.load(finished, device="cpu")
    assert model.config.transformer.cross_attention == "own" and model.stable is None
    assert model.generate("a cat", seed=1).shape == (1, 3, 8, 8)
    folder = Path(recipe.training.output).parent / "head"
    second = replace(
        recipe, stage="sampler", init=str(finished), stable_from=2, text_encoder=str(finished / "text-encoder"),
        training=replace(recipe.training, output=str(folder)),
    )  # fmt: skip
    run = second.trainer(load_initial)
    run.run()
    head = nextscale.load(second.finish(run), device="cpu")
    assert head.config.stable_from == 2
    assert torch.equal(head.head.weight, model.head.weight)
    assert head.generate("a cat", seed=1).shape == (1, 3, 8, 8)


def test_what_a_recipe_refuses(recipe: STARRecipe) -> None:
    with pytest.raises(ValueError, match="expected one of d16, d30"):
        replace(recipe, size="d20")
    with pytest.raises(ValueError, match="trained on a finished backbone"):
        replace(recipe, stage="sampler")
    with pytest.raises(ValueError, match=r"the longest here has 5.*spare_short 0"):
        replace(recipe, loss=STARLossConfig()).trainer(load_initial)
    with pytest.raises(ValueError, match=r"stand for images of 6 pixels, data\.size is 8"):
        replace(recipe, scales="1 2 3").trainer(load_initial)
    with pytest.raises(ValueError, match="label_smoothing is 2"):
        STARLossConfig(label_smoothing=2)
