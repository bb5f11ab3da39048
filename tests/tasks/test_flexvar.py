"""FlexVAR: any list of scales, the official sampler's rules, files both ways, training with drawn lists, editing."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nextscale.core.checkpoint import read_folder, weightless
from nextscale.core.heads import CategoricalEmitter
from nextscale.core.random import ImageDraws
from nextscale.core.schedule import ScaleSchedule
from nextscale.core.training import TrainingConfig
from nextscale.datasets.images import open_images
from nextscale.tasks.data import ImageData
from nextscale.tasks.generation.drawing import draw
from nextscale.tasks.generation.editing import edit
from nextscale.tasks.generation.flexvar import (
    PRESETS,
    FlexVAR,
    OfficialSampling,
    averaged,
    config_from_official,
    is_official,
    waves,
)
from nextscale.tasks.generation.flexvar_editing import accept, expand, on_canvas, refine
from nextscale.tasks.generation.flexvar_lists import PUBLISHED, RandomLists
from nextscale.tasks.generation.flexvar_recipe import FlexVARRecipe
from nextscale.tasks.generation.flexvar_training import FlexVARTraining
from nextscale.tasks.generation.var import is_official as is_official_var
from nextscale.tasks.tokenizers.flex_vq import FlexVQ
from nextscale.tasks.tokenizers.tokenize import write_tokens

LISTS = ("1 2 4", "1 2 3 4 6", "1 1x2 2x3 4x8")


@pytest.fixture(scope="module")
def flexvar(tiny: SimpleNamespace) -> FlexVAR:
    return tiny.flexvar(class_names=("tench", "fox", "hare", "owl", "boat"))


@pytest.mark.parametrize("options", [{}, {"conditioning": "shared"}, {"attention": "dot"}])
@pytest.mark.parametrize("scales", LISTS)
def test_stepping_on_forced_tokens_is_teacher_forcing(scales: str, options: dict[str, Any], tiny: Any) -> None:
    """Also where the first scales are run in one pass, and in training form, where a bias stands for segments."""
    model, schedule = tiny.flexvar(**options), ScaleSchedule.parse(scales)
    quantizer = model.tokenizer.quantizer
    tokens, labels = torch.randint(16, (2, schedule.length)), torch.tensor([1, 5])
    with torch.inference_mode():
        inputs = model.tokenizer.teacher_inputs(tokens, schedule)
        at_once = model(inputs, labels, schedule)
        session, total, steps = model.start(labels, schedule), quantizer.begin(2, schedule), []
        for k, part in enumerate(schedule.split(tokens)):
            hidden = session.step(k, quantizer.next_input(total, schedule, k) if k else None)
            steps.append(session.logits(hidden, slice(None)))
            total = quantizer.advance(total, quantizer.lookup(part), schedule, k)
        joined = inputs[:, : schedule.ranges[2][1] - 1]
        together = model.start(labels, schedule).step(2, joined, first=0)
    torch.testing.assert_close(torch.cat(steps, 1), at_once, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        session.logits(together, slice(None)), at_once[:, : joined.shape[1] + 1], rtol=0, atol=1e-4
    )
    assert at_once.std() > 0.1
    model.train()
    torch.testing.assert_close(model(inputs.clone(), labels, schedule), at_once.clone(), rtol=0, atol=1e-4)


def test_positions_are_averages_of_one_map(flexvar: FlexVAR) -> None:
    table = waves(16, 8)
    assert table.shape == (1, 16, 8, 8)
    row, column, m = 5, 3, 2
    frequency = 10000 ** (-2 * m / 16)
    assert table[0, 2 * m, row, column].item() == pytest.approx(torch.tensor(row * frequency).sin().item(), abs=1e-6)
    assert table[0, 2 * m + 1, row, column].item() == pytest.approx(
        torch.tensor(column * frequency).cos().item(), abs=1e-6
    )
    spread = averaged(table, ScaleSchedule.parse("1 4x2 8"))
    torch.testing.assert_close(spread[0, 0], table.mean((2, 3))[0])
    torch.testing.assert_close(spread[0, 2], table[0, :, :2, 4:].mean((1, 2)))
    assert torch.equal(spread[0, 9:].mT.unflatten(1, (8, 8)), table[0])


def test_positions_are_kept_until_the_map_changes(tiny: SimpleNamespace) -> None:
    model, schedule = tiny.flexvar(), ScaleSchedule.parse("1 2x3")
    with torch.no_grad():
        first = model.positions(schedule)
        assert model.positions(ScaleSchedule.parse("1 2x3")) is first
        model.position_embedding.mul_(2)
        torch.testing.assert_close(model.positions(schedule), 2 * first)
        assert model.to(torch.bfloat16).positions(schedule).dtype == torch.bfloat16
    assert model.positions(schedule).requires_grad


def test_images_of_any_size(flexvar: FlexVAR) -> None:
    assert flexvar.generate("fox", n=2).shape == (2, 3, 8, 8)
    assert flexvar.generate("fox", schedule="1 2 4x8").shape == (1, 3, 8, 16)
    long = flexvar.generate([1, 2, 3], seed=4, schedule=flexvar.schedule_for((12, 8), 5), batch_size=2)
    assert long.shape == (3, 3, 12, 8)
    alone = flexvar.generate(2, seed=5, schedule=flexvar.schedule_for((12, 8), 5))
    torch.testing.assert_close(long[1:2], alone, rtol=0, atol=1e-5)
    [drawn] = draw(flexvar, [1, 2], 2, forming=1, given={"schedule": "1 2 3 5"})
    assert drawn.forming is not None and drawn.forming.shape == (4, 1, 3, 10, 10)
    assert drawn.tokens.shape == (2, 1 + 4 + 9 + 25)


def test_lists_by_size(flexvar: FlexVAR) -> None:
    assert flexvar.schedule_for() == flexvar.config.schedule
    assert str(flexvar.schedule_for((8, 8), 4)) == "1 2 3 4"
    assert str(flexvar.schedule_for((4, 4))) == "1 2"
    assert flexvar.schedule_for((6, 16)).final.grid == (3, 8)
    with pytest.raises(ValueError, match="images of 7 x 8 pixels are not possible: sides are multiples of 2"):
        flexvar.schedule_for((7, 8))
    for wrong in ("2 4", "1 2x2x3"):
        with pytest.raises(ValueError, match=f"the list '{wrong}' does not suit: it must begin with '1'"):
            flexvar.generate(0, schedule=wrong)


# --- guidance and the official rules ------------------------------------------------------------------


def guided(model: FlexVAR, weights: Tensor, **options: Any) -> None:
    """The logits are the two classes' in these weights, (conditional, unconditional) per scale."""
    schedule = ScaleSchedule.parse(options.get("schedule", model.config.schedule))
    steps = list(model.steps(torch.tensor([2, 4]), draws=ImageDraws([0, 1]), guidance=3.0, **options))
    tokens, logits = (torch.cat([getattr(step, name) for step in steps], 1) for name in ("tokens", "logits"))
    with torch.inference_mode():
        inputs = model.tokenizer.teacher_inputs(tokens, schedule)
        given, none = (model(inputs, labels, schedule) for labels in (torch.tensor([2, 4]), torch.tensor([5, 5])))
    each = weights[schedule.levels()]
    torch.testing.assert_close(logits, each[:, :1] * given + each[:, 1:] * none, rtol=0, atol=3e-4)


def test_guidance_formulas(tiny: SimpleNamespace) -> None:
    model = tiny.flexvar()
    t = torch.tensor([0.0, 1.5, 3.0])
    guided(model, torch.stack((1 + t, -t), 1))
    guided(model, torch.tensor([[3.0, -2.0]]).expand(3, 2), guidance_form="llamagen")
    official = tiny.flexvar(official_sampling=OfficialSampling(max_side=4))
    long = "1 1x2 2 2x3 3 3x4 4 4x5 5 5x6 6 6x7"
    t = torch.tensor([3 * k / 9 if k < 7 else 3.0 for k in range(12)])
    guided(official, torch.stack((1 + t, -t), 1), schedule=long)
    steep = tiny.flexvar(official_sampling=OfficialSampling())
    t = torch.arange(12) * 3 / 9  # above the strength after the tenth scale
    guided(steep, torch.stack((1 + t, -t), 1), schedule=long)
    with pytest.raises(ValueError, match="guidance_form is 'cosine'; expected var or llamagen"):
        model.generate(1, guidance_form="cosine")


def test_official_rules_take_the_likeliest_at_some_sides() -> None:
    official = OfficialSampling()
    greedy = {name: [s.height for s in schedule.scales if official.greedy(s)] for name, schedule in PUBLISHED.items()}
    assert greedy["10"] == [] and greedy["8"] == [7] and greedy["11"] == [7, 9, 11]
    assert greedy["13"] == [7, 9, 12, 14] and greedy["512"] == [7, 9, 12, 14, 23, 32]


def test_the_emitter_under_official_rules(tiny: SimpleNamespace) -> None:
    schedule = ScaleSchedule.parse("1 2 7 4")
    plain, official = tiny.flexvar(), tiny.flexvar(official_sampling=OfficialSampling(max_side=3))
    assert plain.emitter(CategoricalEmitter(5), schedule).top_k == 5
    assert official.emitter(CategoricalEmitter(5), schedule).top_k == (5, 5, 1, 1)
    assert official.emitter(CategoricalEmitter((3, 4, 5, 6)), schedule).top_k == (3, 4, 1, 1)


def test_codes_that_may_not_be_drawn(flexvar: FlexVAR) -> None:
    [free] = draw(flexvar, 1, 1)
    banned = sorted(set(free.tokens.flatten().tolist()))[:3]
    [drawn] = draw(flexvar, 1, 1, given={"invalid_ids": banned})
    assert not set(banned) & set(drawn.tokens.flatten().tolist())
    with pytest.raises(ValueError, match="invalid_ids has 16; codes are 0 to 15"):
        flexvar.generate(1, invalid_ids=[16])


# --- files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"conditioning": "shared"}, {"attention": "dot"}])
def test_official_round_trip(options: dict[str, Any], tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.flexvar(**options)
    state = model.to_official()
    assert is_official(state) and not is_official_var(state)
    assert "lvl_1L" not in state and tuple(state["pos_1LC"].shape) == (1, 16, 8, 8)
    torch.save({"trainer": {"var_wo_ddp": state}, "epoch": 3}, tmp_path / "x.pth")
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    again = FlexVAR.from_official(content, model.tokenizer, schedule="1 2 4", heads=2)
    assert again.config == replace(
        model.config, official_sampling=OfficialSampling(), transformer=again.config.transformer
    )
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert again.to_official().keys() == state.keys()


def test_released_layout(tiny: SimpleNamespace) -> None:
    config = PRESETS["flexvar-d16"]
    assert config.official_sampling is not None and config.guidance == 2.5
    with weightless():
        model = FlexVAR(config, FlexVQ())
    state = model.to_official()
    assert {k: tuple(state[k].shape) for k in ("pos_1LC", "pos_start", "head.weight", "class_emb.weight")} == {
        "pos_1LC": (1, 1024, 32, 32),
        "pos_start": (1, 1, 1024),
        "head.weight": (8912, 1024),
        "class_emb.weight": (1001, 1024),
    }
    count = sum(v.numel() for k, v in state.items() if not k.endswith(("attn_bias_for_masking", "zero_k_bias")))
    assert count == pytest.approx(315.6e6, rel=1e-3)
    assert config_from_official(state).transformer == config.transformer


def test_own_files_round_trip(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model = tiny.flexvar(official_sampling=OfficialSampling(max_side=5), guidance_form="llamagen")
    again = FlexVAR.from_saved(*read_folder(model.save(tmp_path)))
    assert again.config == model.config
    assert torch.equal(again.generate(1, seed=3), model.generate(1, seed=3))


# --- editing -------------------------------------------------------------------------------------------


def test_refinement_goes_on_from_an_images_maps(flexvar: FlexVAR) -> None:
    image, schedule = torch.rand(3, 6, 10), ScaleSchedule.parse("1 2 3 4x6")
    accepted = accept(flexvar, image[None], schedule, 2)
    tokens = flexvar.tokenizer.encode(image[None] * 2 - 1, schedule)
    torch.testing.assert_close(accepted.inputs, flexvar.tokenizer.teacher_inputs(tokens, schedule)[:, : 4 + 9])
    steps = list(flexvar.steps(torch.tensor([1]), draws=ImageDraws([0]), accepted=accepted, schedule=schedule))
    assert [step.index for step in steps] == [2, 3]
    with torch.inference_mode():
        logits = flexvar(accepted.inputs, torch.tensor([1]), schedule.prefix(3))[:, 5:]
        none = flexvar(accepted.inputs, torch.tensor([5]), schedule.prefix(3))[:, 5:]
    t = 2.5 * 2 / 3
    torch.testing.assert_close(steps[0].logits, (1 + t) * logits - t * none, rtol=0, atol=2e-4)
    drawn = refine(flexvar, image, 2, "fox", n=2, seed=3, schedule="1 2 3 4x6")
    assert drawn.shape == (2, 3, 8, 12)
    torch.testing.assert_close(
        refine(flexvar, image, 2, "fox", seed=4, schedule=schedule), drawn[1:], rtol=0, atol=1e-5
    )
    for scales in (0, 4):
        with pytest.raises(ValueError, match=f"{scales} scales of 4 are to be kept; expected 1 to 3"):
            refine(flexvar, image, scales, schedule=schedule)


def test_expansion_keeps_the_image_where_it_lies(flexvar: FlexVAR) -> None:
    image, schedule = torch.rand(3, 4, 4), ScaleSchedule.parse("1 2x4 4x8")
    canvas, mask = on_canvas(image, schedule, 2)
    assert canvas.shape == (3, 8, 16) and torch.equal(canvas[:, 2:6, 6:10], image)
    assert mask.sum() == 4 and mask[1:3, 3:5].all()
    assert torch.equal(canvas[:, 0, 6:10], image[:, 0])
    steps = expand(flexvar, image, schedule, 2, n=2, place=(0, 8))
    assert steps.shape == (2, 3, 8, 16)
    for place in ((0, 14), (1, 0)):
        with pytest.raises(ValueError, match=r"does not lie on a canvas of 8 x\s+16"):
            expand(flexvar, image, schedule, place=place)


def test_in_painting_at_another_size(flexvar: FlexVAR) -> None:
    image, schedule = torch.rand(3, 8, 12), ScaleSchedule.parse("1 2x3 4x6")
    kept = edit(flexvar, image, torch.ones(4, 6), schedule=schedule)
    rebuilt = (flexvar.tokenizer.decode(flexvar.tokenizer.encode(image[None] * 2 - 1, schedule), schedule) + 1) / 2
    torch.testing.assert_close(kept, rebuilt, rtol=0, atol=1e-5)


# --- training ------------------------------------------------------------------------------------------

SMALL = RandomLists(
    standard="1 2 4", standard_share=0.2, first="1", middle="1x2 2 3", middle_count=(0, 2), late="", late_count=(0, 0),
    final="4", removals=(), budget=40, keep_final=True,
)  # fmt: skip


def test_a_step_picks_its_scales_from_the_tokens(tiny: SimpleNamespace) -> None:
    model = tiny.flexvar()
    task = FlexVARTraining(model, lists=SMALL, seed=2, held=SMALL.everything)
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    batch = {"label": torch.tensor([0, 1, 2]), "uniform": torch.tensor([0.0, 0.5, 0.9])}
    tokens = {"tokens": model.tokenizer.encode(images, SMALL.everything), **batch}
    seen = set()
    for step in range(12):
        loss, metrics = task.loss("flexvar", model, tokens, step)
        other, _ = task.loss("flexvar", model, {"image": images, **batch}, step)
        torch.testing.assert_close(loss, other)
        schedule = task.list_at(step)
        seen.add(str(schedule))
        with torch.no_grad():
            own = model.tokenizer.encode(images, schedule)
            logits = model(model.tokenizer.teacher_inputs(own, schedule), torch.tensor([5, 1, 2]), schedule)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.mT, own))
        assert metrics["length"] == schedule.length
    assert len(seen) > 3
    whole, _ = model.loss({"image": images, **batch})
    evaluated = FlexVARTraining(model).evaluate({"image": images, **batch})
    torch.testing.assert_close(whole, evaluated["loss"])


def test_figures_of_the_last_scale_are_those_of_the_usual_one(tiny: SimpleNamespace) -> None:
    model = tiny.flexvar()
    batch = {"image": torch.zeros(1, 3, 8, 8), "label": torch.tensor([0]), "uniform": torch.tensor([0.5])}
    _, metrics = FlexVARTraining(model).loss_of(model, batch, ScaleSchedule.parse("1 3"))
    assert set(metrics) == {"cross_entropy", "accuracy"}


@pytest.fixture(scope="module")
def images(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.images(tmp_path_factory.mktemp("data") / "images"))


def test_from_tokens_to_images(images: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = tiny.flex_tokenizer()
    opened = open_images(images, size=8, resize_ratio=1)
    tokens = write_tokens(tokenizer, opened, tmp_path / "tokens", schedule=SMALL.everything)
    steps = TrainingConfig(str(tmp_path / "run"), epochs=3, batch_size=8, log_every=1, average=0.9)
    recipe = FlexVARRecipe(
        tokens=str(tokens), validation_tokens=str(tokens), tokenizer="t", depth=1, width=16, heads=2, position_side=4,
        lists=SMALL, training=steps,
    )  # fmt: skip

    def load(source: str, tokenizer_: Any = None) -> Any:
        return {"t": tokenizer, "v": tiny.tokenizer()}.get(source) or model

    run = recipe.trainer(load)
    run.run()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"validation/loss", "validation/accuracy_last"} <= log[-1].keys()
    folder = recipe.finish(run)
    model = FlexVAR.from_saved(*read_folder(folder))
    assert model.config.class_names == ("cat", "dog") and str(model.config.schedule) == "1 2 4"
    assert model.generate("cat", schedule="1 2 3x6").shape == (1, 3, 6, 12)
    data = ImageData(images, size=8, resize_ratio=1.0)
    further = replace(recipe, tokens=None, validation_tokens=None, data=data, tokenizer=None, init="m", guidance=1.0)
    built = further.build(further.open(), load)
    assert torch.equal(built.position_embedding, model.position_embedding) and built.config.guidance == 1.0
    with pytest.raises(ValueError, match="v has a ResidualVQ; FlexVAR needs a tokenizer whose scales stand alone"):
        replace(recipe, tokenizer="v").trainer(load)
    with pytest.raises(ValueError, match="m is a FlexVAR of 2 classes; expected a FlexVAR of 3"):
        replace(further, classes=3).trainer(load)
    with pytest.raises(ValueError, match=r"with scales '1 1x2 2 3 4' and tokenizer .*, the model has '1 2 4'"):
        replace(recipe, lists=replace(SMALL, middle="2", middle_count=(0, 1))).trainer(load)
    with pytest.raises(ValueError, match="a FlexVAR needs a tokenizer"):
        replace(recipe, tokenizer=None)
